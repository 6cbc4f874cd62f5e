"""A server for half an hour at 70% of what it can do: does it hold its memory, its files and its word?

    python -m bench.soak [--minutes 30] [--load 0.7] [--out docs/soak.md] [--plot docs/images/soak.png]

Capacity is measured first: four callers that ask one after another, all tasks in turn, for 20 s (`--probe`). Then
requests come at random times (a Poisson process) at `--load` of that; one in twenty leaves before its answer, one in
twenty is malformed. Resident memory, open files and requests in flight are read from the server's own /metrics. Exits
with 1 if an answer was wrong, or if memory grew by more than 5% or descriptors were lost after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
import numpy as np

from bench.gateway import PARTS, ask, gateway
from bench.machine import describe

CALLERS = 4
SAMPLES = 240
LEAVE_S = 0.05
GROWTH = 0.05
SPARE_FILES = 8
REFUSED = "malformed, refused"
MIB = 2**20
TASKS = tuple(PARTS)
WATCHED = ("process_resident_memory_bytes", "process_open_fds", "saccade_in_flight_requests")


@dataclass
class Soak:
    """What happened: (seconds since the start, bytes, files, requests in flight) of each sample; what was answered."""

    capacity: float
    rate: float
    samples: list[tuple[float, float, float, float]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    @property
    def settled(self) -> np.ndarray:
        """The samples [N, 4] after the first tenth, in which buffers grow to their size."""
        return np.array(self.samples[len(self.samples) // 10 :])

    @property
    def growth(self) -> float:
        """By what share the straight line through the samples of memory rises from its beginning to its end."""
        seconds, memory = self.settled[:, 0], self.settled[:, 1]
        slope, start = np.polyfit(seconds - seconds[0], memory, 1)
        return float(slope * (seconds[-1] - seconds[0]) / start)

    @property
    def files(self) -> tuple[float, float]:
        """Open files when the least requests were in flight, at first and at last (the least of a tenth)."""
        part = max(1, len(self.settled) // 10)
        idle = self.settled[:, 2] - self.settled[:, 3]
        return float(np.min(idle[:part])), float(np.min(idle[-part:]))

    @property
    def faults(self) -> int:
        """Answers that were neither right, nor the refusal of a malformed request."""
        return sum(times for status, times in self.answers.items() if status not in ("200", "left", REFUSED))

    @property
    def good(self) -> bool:
        return not self.faults and self.growth <= GROWTH and self.files[1] - self.files[0] <= SPARE_FILES


async def capacity(client: httpx.AsyncClient, seconds: float) -> float:
    """Requests a second of callers that never rest."""
    turns, done, until = count(), 0, time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < until:
            (await ask(client, TASKS[next(turns) % len(TASKS)])).raise_for_status()
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done / (time.perf_counter() - began)


async def soak(client: httpx.AsyncClient, found: Soak, seconds: float) -> None:
    rng, turns = random.Random(0), count()
    sampling = asyncio.create_task(sample(client, found, seconds))
    began, at = time.perf_counter(), 0.0
    async with asyncio.TaskGroup() as group:
        while (at := at + rng.expovariate(found.rate)) < seconds:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            group.create_task(one(client, found, next(turns), rng.random()))
    await sampling


async def one(client: httpx.AsyncClient, found: Soak, turn: int, luck: float) -> None:
    task, began = TASKS[turn % len(TASKS)], time.perf_counter()
    try:
        if luck < 0.05:
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S), httpx.AsyncClient(base_url=client.base_url) as own:
                    await ask(own, task)
            found.answers["left"] += 1
        elif luck < 0.1:
            status = (await client.post(f"/{task}", files={"image": ("a.png", b"no picture")})).status_code
            found.answers[REFUSED if 400 <= status < 500 else str(status)] += 1
        else:
            status = str((await ask(client, task, seed=turn)).status_code)
            found.answers[status] += 1
            found.latencies.append(time.perf_counter() - began)
    except httpx.TransportError as error:
        found.answers[type(error).__name__] += 1


async def sample(client: httpx.AsyncClient, found: Soak, seconds: float) -> None:
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as own:
        while (now := time.perf_counter() - began) < seconds:
            text = (await own.get("/metrics")).text
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            memory, files, in_flight = (float(values[name]) for name in WATCHED)
            found.samples.append((now, memory, files, in_flight))
            await asyncio.sleep(seconds / SAMPLES)


def told(found: Soak, minutes: float) -> str:
    memory, files = found.settled[:, 1] / MIB, found.settled[:, 2]
    p50, p95, p99 = (f"{value * 1e3:.0f}" for value in np.percentile(found.latencies, (50, 95, 99)))
    answers = ", ".join(f"{status} x {times}" for status, times in sorted(found.answers.items()))
    return "\n".join(
        [
            f"Machine: {describe('onnxruntime', 'openvino', 'uvicorn')}.",
            "",
            "| what | figure |",
            "|---|---|",
            f"| capacity, all tasks in turn | {found.capacity:.2f} requests a second |",
            f"| asked for {minutes:g} minutes | {found.rate:.2f} a second: {found.answers.total()} in all |",
            f"| answers | {answers} |",
            f"| of them wrong | {found.faults} |",
            f"| time to the answer | p50 {p50} ms, p95 {p95} ms, p99 {p99} ms |",
            f"| resident memory after the first tenth | {memory.min():.0f} to {memory.max():.0f} MiB, "
            f"median {statistics.median(memory):.0f}; trend {found.growth:+.1%} over the rest |",
            f"| open files after the first tenth | {files.min():.0f} to {files.max():.0f}; "
            f"beside requests in flight {found.files[0]:.0f} at first, {found.files[1]:.0f} at last |",
        ]
    )


def draw(found: Soak, file: Path) -> None:
    import matplotlib.pyplot as plt

    seconds, memory, files, in_flight = np.array(found.samples).T
    figure, axes = plt.subplots(3, sharex=True, figsize=(8, 6), layout="constrained")
    for axis, values, name in zip(
        axes, (memory / MIB, files, in_flight), ("resident MiB", "open files", "in flight"), strict=True
    ):
        axis.plot(seconds / 60, values, lw=1)
        axis.set_ylabel(name)
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    axes[0].set_title(f"{found.rate:.2f} requests a second, {found.rate / found.capacity:.0%} of capacity")
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=120)


async def bench(arguments: argparse.Namespace) -> Soak:
    settings = {"model_repository": arguments.model_repository} if arguments.model_repository else {}
    async with gateway(**settings) as client:
        for task in TASKS:
            (await ask(client, task)).raise_for_status()
        most = await capacity(client, arguments.probe)
        found = Soak(most, most * arguments.load)
        await soak(client, found, arguments.minutes * 60)
        return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--probe", type=float, default=20)
    parser.add_argument("--model-repository", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args(argv)
    found = asyncio.run(bench(arguments))
    table = told(found, arguments.minutes)
    sys.stdout.write(table + "\n")
    if arguments.plot:
        draw(found, arguments.plot)
    if arguments.out:
        picture = "\n\n![Memory, files and requests in flight](images/soak.png)" if arguments.plot else ""
        arguments.out.write_text(f"# A soak\n\nMade by `python -m bench.soak`.\n\n{table}{picture}\n")
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
