"""A replayed load of mixed requests: one at a time, batches of requests, and batches of steps in several orders.

    python -m bench.replay [--requests 300] [--turns 3] [--loads 0.5,0.8,1.1] [--policies ...] [--seed 0]
                           [--out docs/scheduling-figures.md] [--plot docs/images/replay.png]
    python -m bench.replay --leavers 500
    python -m bench.replay --crowd 24

The real pipeline and engine in this process, without HTTP. Requests of all tasks, steps 1-50, members 1-10 and several
sizes come at random times (a Poisson process) at a share of the capacity, which is measured first. Every policy gets
the same requests at the same times; the policies take turns, and each turn has requests of its own. A deadline is three
times what the request takes alone. Before every cell a request is timed that is always the same: `probe` tells how fast
the machine was. `--leavers`: clients that leave at random moments; exits with 1 if a place leaks, or more of one that
has left is executed than was running. `--crowd`: the same requests alone and amid others; exits with 1 if a byte
differs. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench import leaving
from bench.machine import describe
from bench.traffic import Answering, Costs, Request, Shape, arrivals, ask, capacity, opened, replay, shapes, timed
from saccade.backends import Ticket
from saccade.backends.embedded import Embedded
from saccade.backends.order import ByDeadline, Dial, FirstCome, Order, RoundRobin
from saccade.backends.stepping import Stepping
from saccade.pipeline import Pipeline
from saccade.repository import Repository, find_repository
from server import allocator

STRETCH = 3.0
MOST_TOGETHER = 8
LONGEST_CELL_S = 180.0
PROBE = Shape("depth", 192, 5, 2)
Figures = dict[str, float]


class OneAtATime:
    """The next request begins when the one before it has been answered."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self._turn = pipeline, asyncio.Lock()

    async def __call__(self, request: Request) -> None:
        async with self._turn:
            await ask(self.pipeline, request.shape)


class RequestBatching:
    """Requests of one size and number of steps that wait together are run together, and answered when all are done."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._waiting: list[tuple[Request, asyncio.Future[None]]] = []
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> None:
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answered))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        await answered

    async def _run(self) -> None:
        while self._waiting:
            key = self._key(self._waiting[0][0])
            group = [one for one in self._waiting if self._key(one[0]) == key][:MOST_TOGETHER]
            self._waiting = [one for one in self._waiting if one not in group]
            await asyncio.gather(*(ask(self.pipeline, request.shape) for request, _ in group))
            for _, answered in group:
                answered.set_result(None)
        self._running = None

    def _key(self, request: Request) -> tuple[int, int]:
        return request.shape.edge, request.shape.steps


class StepBatching:
    """All at once, and the lane's order decides."""

    def __init__(self, pipeline: Pipeline, told: bool) -> None:
        self.pipeline, self.told = pipeline, told

    async def __call__(self, request: Request) -> None:
        now = asyncio.get_running_loop().time()
        ticket = Ticket(now + STRETCH * request.alone_s if self.told else None)
        await ask(self.pipeline, request.shape, ticket)


Made = tuple[Callable[[], Order], Callable[[Pipeline], Answering]]
POLICIES: dict[str, Made] = {
    "one request at a time": (FirstCome, OneAtATime),
    "request batching": (FirstCome, RequestBatching),
    "steps, first come": (FirstCome, lambda pipeline: StepBatching(pipeline, False)),
    "steps, in turn": (RoundRobin, lambda pipeline: StepBatching(pipeline, False)),
    "steps, by deadline": (ByDeadline, lambda pipeline: StepBatching(pipeline, True)),
    "ours": (Dial, lambda pipeline: StepBatching(pipeline, True)),
    "ours, deadlines not told": (Dial, lambda pipeline: StepBatching(pipeline, False)),
}


class Progress:
    """A line on the terminal that is written over and over."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.count, self.began = name, total, 0, time.perf_counter()

    def __call__(self) -> None:
        self.count += 1
        if sys.stderr.isatty() or self.count % max(1, self.total // 4) == 0:
            seconds = time.perf_counter() - self.began
            end = "\r" if sys.stderr.isatty() and self.count < self.total else "\n"
            sys.stderr.write(f"  {self.name}: {self.count} of {self.total}, {seconds:.0f} s   {end}")
            sys.stderr.flush()


def figures(requests: Sequence[Request], seconds: Sequence[float]) -> Figures:
    met = [took <= STRETCH * request.alone_s for request, took in zip(requests, seconds, strict=True)]
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    return {
        "mean": float(np.mean(seconds)), "p50": float(p50), "p95": float(p95), "p99": float(p99),
        "met": float(np.mean(met)),
    }  # fmt: skip


def table(found: dict[float, dict[str, Figures]]) -> str:
    """Ratios are to the first policy of the same load."""
    lines = [
        "| load | policy | mean s | p50 | p95 | p99 | in time | mean, ratio | probe, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for load, cells in found.items():
        first = next(iter(cells.values()))
        for name, one in cells.items():
            lines.append(
                f"| {load:.0%} | {name} | {one['mean']:.2f} | {one['p50']:.2f} | {one['p95']:.2f} | {one['p99']:.2f} | "
                f"{one['met']:.1%} | {one['mean'] / first['mean']:.2f} | {one['probe'] * 1e3:.0f} |"
            )
    return "\n".join(lines)


def plot(found: dict[float, dict[str, Figures]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, (key, title) in zip(axes, (("mean", "mean, s"), ("p95", "p95, s"), ("met", "in time")), strict=True):
        for name in next(iter(found.values())):
            bold = 2.4 if name == "ours" else 1.2
            axis.plot([100 * load for load in found], [cells[name][key] for cells in found.values()], "o-", label=name,
                      linewidth=bold)  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("load, % of capacity")
        if key != "met":
            axis.set_yscale("log")
    axes[0].legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


async def bench(args: argparse.Namespace) -> dict[float, dict[str, Figures]]:
    allocator.settle()  # as the server does
    backend = loaded(args)
    lane = await opened(backend, args.batch_size)
    costs = Costs()
    await costs.measure(Pipeline(lane), args.rounds, say)
    drawn = [shapes(args.requests, args.seed + turn) for turn in range(args.turns)]
    work_s = max(sum(map(costs, of_turn)) for of_turn in drawn)
    say(f"{backend.streams} streams, batches of {lane.batch_size}")
    say(f"{args.requests} requests are up to {work_s:.0f} s of work alone")
    most = await capacity(Pipeline(lane), shapes(args.probe, args.seed + args.turns), costs)
    cells_s = {load: work_s / most / min(load, 1.0) for load in args.loads}
    say(f"capacity: {most:.2f} s of such work a second, {args.requests / work_s * most:.2f} requests")
    cells = len(args.policies) * args.turns
    say(f"{cells} cells a load: about {cells * sum(cells_s.values()) / 60:.0f} minutes")
    if max(cells_s.values()) > LONGEST_CELL_S:
        say(f"a cell takes {max(cells_s.values()):.0f} s, longer than {LONGEST_CELL_S:.0f}: ask for fewer --requests")
    found: dict[float, dict[str, Figures]] = {}
    for load in args.loads:
        seen: dict[str, list[tuple[Request, float]]] = {name: [] for name in args.policies}
        probes: dict[str, list[float]] = {name: [] for name in args.policies}
        for turn, of_turn in enumerate(drawn):
            requests = arrivals(of_turn, costs, load * most, args.seed + turn)
            for name in args.policies:
                order, answering = POLICIES[name]
                fresh = await opened(backend, lane.batch_size, order())
                probes[name].append(statistics.median([await timed(ask(Pipeline(fresh), PROBE)) for _ in range(9)]))
                done = Progress(f"{load:.0%} {name}, turn {turn + 1} of {args.turns}", len(requests))
                seconds = await replay(requests, answering(Pipeline(fresh)), done)
                left(fresh)
                seen[name] += zip(requests, seconds, strict=True)
        found[load] = {
            name: figures(*zip(*pairs, strict=True)) | {"probe": statistics.mean(probes[name])}
            for name, pairs in seen.items()
        }
    await lane.aclose()
    return found


def loaded(args: argparse.Namespace) -> Embedded:
    repository = Repository(find_repository(args.repository))
    return Embedded.load(repository, threads=args.threads, streams=args.streams)


def left(lane: Stepping) -> None:
    if lane.waiting or lane.running or lane.backlog_s:
        raise RuntimeError(f"{lane.waiting} rows wait, {lane.running} run, although everybody has an answer")


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a replayed load of mixed requests")
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3, help="times that every policy has its turn at every load")
    parser.add_argument("--loads", type=lambda text: [float(one) for one in text.split(",")], default=[0.5, 0.8, 1.1])
    parser.add_argument("--policies", type=lambda text: text.split(";"), default=list(POLICIES), metavar="A;B")
    parser.add_argument("--rounds", type=int, default=5, help="times that each probe is asked")
    parser.add_argument("--probe", type=int, default=60, help="requests asked at once to find the capacity")
    parser.add_argument("--batch-size", type=int, help="measured where left out")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--leavers", type=int, help="clients that leave, instead of the load")
    parser.add_argument("--crowd", type=int, help="requests compared alone and in a crowd, instead of the load")
    args = parser.parse_args(argv)
    if args.leavers or args.crowd:
        backend = loaded(args)
        told = (
            leaving.leavers(backend, args.leavers, args.seed)
            if args.leavers
            else leaving.crowd(backend, args.crowd, args.seed)
        )
        sys.exit(asyncio.run(told))
    found = asyncio.run(bench(args))
    text = "\n\n".join(
        [
            f"{args.turns} x {args.requests} requests a line, policies turn about, seeds {args.seed} and on, in this "
            "process, without HTTP.\n"
            f"Machine: {describe('onnxruntime', 'openvino', 'numpy')}.",
            table(found),
        ]
    )
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.write_text(f"# A replayed load\n\nMade by `python -m bench.replay`.\n\n{text}\n")
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
