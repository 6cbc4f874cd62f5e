"""How many batches at once: what a lone request takes, and what a full server gets done, by number of streams.

    python -m bench.streams [--streams 1 2] [--turns 3] [--requests 60] [--out docs/streams.md]

The real pipeline, lane and engine, each time in a process of its own; the numbers of streams take turns. Alone: medians
of requests at the card's defaults and of one step of one member. Full: mixed requests (`bench.traffic`: steps 1-50,
members 1-10, all tasks, three sizes), all asked at once. Memory: the most that was resident. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from bench.machine import describe
from bench.traffic import SHARES, Shape, ask, opened, shapes, timed
from saccade.backends.embedded import Embedded
from saccade.backends.engines import default_threads
from saccade.pipeline import Pipeline
from saccade.repository import Repository, find_repository
from server import allocator

EDGE = 256
ROUNDS = 9
Figures = dict[str, float]
COLUMNS = {
    "start": "start, s",
    **{f"{task} alone": f"{task} alone, ms" for task in SHARES},
    "one step alone": "one step of one member, ms",
    "full": "all requests, s",
    "processor": "processor time, s",
    "memory": "memory, MiB",
}


def measured(path: Path, streams: int, count: int, seed: int) -> Figures:
    """Runs in a process of its own."""
    allocator.settle()  # as the server does
    return asyncio.run(_measured(path, streams, count, seed))


async def _measured(path: Path, streams: int, count: int, seed: int) -> Figures:
    began = time.perf_counter()
    lane = await opened(Embedded.load(Repository(path), streams=streams), None)
    found = {"start": time.perf_counter() - began}
    pipeline = Pipeline(lane)
    for task in SHARES:
        defaults = lane.card.tasks[task].defaults
        found[f"{task} alone"] = await _alone_ms(pipeline, Shape(task, EDGE, defaults.steps, defaults.ensemble_size))
    found["one step alone"] = await _alone_ms(pipeline, Shape("depth", EDGE, 1, 1))
    processor = time.process_time()
    found["full"] = await timed(asyncio.gather(*(ask(pipeline, shape) for shape in shapes(count, seed))))
    found["processor"] = time.process_time() - processor
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    await lane.aclose()
    return found


async def _alone_ms(pipeline: Pipeline, shape: Shape) -> float:
    await ask(pipeline, shape)
    return statistics.median([await timed(ask(pipeline, shape)) for _ in range(ROUNDS)]) * 1e3


def bench(path: Path, streams: Sequence[int], count: int, turns: int) -> str:
    seen: dict[int, list[Figures]] = defaultdict(list)
    for turn in range(turns):
        for number in streams:
            sys.stderr.write(f"{number} streams, turn {turn + 1} of {turns}\n")
            with get_context("spawn").Pool(1) as pool:
                seen[number].append(pool.apply(measured, (path, number, count, turn)))
    card = Repository(path).card(Repository(path).default())
    rows = []
    for number, found in seen.items():
        cells = [statistics.median(one[key] for one in found) for key in COLUMNS]
        rows.append(f"| {number} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(
        [
            f"Model {card.name} ({card.digest[:12]}), {default_threads()} threads; {EDGE} px alone, {count} mixed "
            f"requests asked at once; medians of {turns} turns.",
            f"Machine: {describe('openvino', 'numpy')}.",
            "",
            "| streams | " + " | ".join(COLUMNS.values()) + " |",
            "|---|" + "---|" * len(COLUMNS),
            *rows,
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="one batch after another, or several at once")
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    table = bench(find_repository(args.repository), args.streams, args.requests, args.turns)
    sys.stdout.write(table + "\n")
    if args.out:
        args.out.write_text(f"# One batch or several\n\nMade by `python -m bench.streams`.\n\n{table}\n")


if __name__ == "__main__":
    main()
