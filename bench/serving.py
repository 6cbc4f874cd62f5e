"""The server against a naive loop, in one run: latency of each task, throughput at 1, 4 and 16 requests at a time.

    python -m bench.serving [--repository model_repository] [--rounds 5] [--out docs/serving.md]

Server: `saccade serve` in a process of its own, asked over HTTP on loopback. Naive loop: the same pipeline and the same
weights in eager torch (fp32, all cores), one request after another in this process, without HTTP. The two alternate, so
a machine whose speed drifts drifts for both; medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

import httpx
import torch

from bench.gateway import EXAMPLES, PARTS, ask, gateway
from bench.machine import describe
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Inputs, Options, Pipeline
from saccade.repository import Repository, find_repository
from saccade.tasks import TaskName
from training.backend import TorchBackend

CONCURRENT = (1, 4, 16)


class Naive:
    """One request at a time."""

    def __init__(self, repository: Path) -> None:
        self.pipeline = Pipeline(TorchBackend.load(Repository(repository)))

    async def ask(self, task: TaskName, options: Options) -> None:
        files = {name: (EXAMPLES / file).read_bytes() for name, file in PARTS[task].items()}
        mask = files.pop("mask", None)
        pictures = {name: read_picture(data) for name, data in files.items()}
        inputs = Inputs(task, mask=None if mask is None else read_mask(mask), **pictures)
        await self.pipeline(inputs, options.resolve(self.pipeline.card, task))


class Server:
    """A server of our own, over HTTP."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def ask(self, task: TaskName, options: Options) -> None:
        answer = await ask(self.client, task, steps=options.steps, ensemble_size=options.ensemble_size)
        answer.raise_for_status()


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def latencies(naive: Naive, server: Server, options: Options, rounds: int) -> list[str]:
    """A row for each task: medians of `rounds` alternating requests, after one of each that is not counted."""
    rows = []
    for task in PARTS:
        times: dict[str, list[float]] = {"naive": [], "server": []}
        for turn in range(rounds + 1):
            for name, who in (("naive", naive), ("server", server)):
                seconds = await timed(lambda who=who, task=task: who.ask(task, options))
                if turn:
                    times[name].append(seconds)
        slow, fast = (statistics.median(times[n]) * 1e3 for n in ("naive", "server"))
        rows.append(f"| one {task} | {slow:.0f} ms | {fast:.0f} ms | {slow / fast:.2f} |")
    return rows


async def throughput(naive: Naive, server: Server, options: Options, rounds: int) -> list[str]:
    """A row for each concurrency: requests a second over 16 requests of mixed tasks, median of `rounds`."""
    tasks = list(islice(cycle(PARTS), 16))
    rows = []
    for concurrent in CONCURRENT:
        slow, fast = [], []
        for _ in range(rounds):
            slow.append(len(tasks) / await timed(lambda: ask_all(naive, tasks, options, 1)))
            fast.append(len(tasks) / await timed(lambda at_once=concurrent: ask_all(server, tasks, options, at_once)))
        a, b = statistics.median(slow), statistics.median(fast)
        rows.append(f"| {concurrent} at a time | {a:.2f} /s | {b:.2f} /s | {b / a:.2f} |")
    return rows


async def ask_all(who: Naive | Server, tasks: Sequence[TaskName], options: Options, at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def gated(task: TaskName) -> None:
        async with gate:
            await who.ask(task, options)

    await asyncio.gather(*map(gated, tasks))


async def bench(repository: Path, rounds: int, options: Options) -> str:
    naive = Naive(repository)
    async with gateway(model_repository=repository) as client:
        server = Server(client)
        rows = await latencies(naive, server, options, rounds)
        rows += await throughput(naive, server, options, max(1, rounds // 2))
    card = naive.pipeline.card
    asked = ", ".join(f"{k} {v}" for k, v in (("steps", options.steps), ("members", options.ensemble_size)) if v)
    return "\n".join(
        [
            f"Model {card.name} ({card.digest[:12]}), {asked or 'default settings'}, medians of {rounds} rounds.",
            f"Machine: {describe('onnxruntime', 'openvino', 'torch', 'numpy')}.",
            "",
            "| what | naive loop | server | ratio (above 1: the server is faster) |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the server against a naive loop")
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ensemble-size", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options = Options(steps=args.steps, ensemble_size=args.ensemble_size)
    table = asyncio.run(bench(find_repository(args.repository), args.rounds, options))
    sys.stdout.write(table + "\n")
    if args.out:
        args.out.write_text(f"# The server against a naive loop\n\nMade by `python -m bench.serving`.\n\n{table}\n")


if __name__ == "__main__":
    main()
