"""Triton behind the gateway against the model in the gateway's own process: cost, agreement, faults, drains.

    python -m bench.triton [--repository model_repository] [--rounds 200] [--out docs/triton.md]

`--out` keeps what stands above the line that names this bench, and replaces what stands below.

Triton is the real server with the tests' stand-in for its ONNX Runtime backend (`make test-triton` fetches it), on this
machine, one thread for the model as for the embedded engine. What a step costs more than embedded is therefore the
price of gRPC, of Triton's scheduler, and of its Python backend; NVIDIA's own backend does without the last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from bench.machine import describe
from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.backends.embedded import Embedded
from saccade.backends.triton import Triton
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Inputs, Options, Pipeline
from saccade.repository import Repository, find_repository
from saccade.tasks import TASKS, TaskName
from tests import toy
from tests.server import process
from tests.server.house import files
from tests.triton.server import Installation, TritonServer, running
from tests.triton.story import Asked, Gateway, gateway, inject, reload

EXAMPLES = Path(__file__).parent.parent / "examples"
REQUESTS = 8
MADE_BY = "The rest of this page is made by `python -m bench.triton`.\n\n"
REPORT = """\
Machine: {machine}, shared with other work (load average {load:.0f}).
Triton 2.51 with the stand-in backend, on loopback.

## What a call costs more

The fastest tenth of {rounds} calls (the toy, 64 px) and {fewer} calls (the default model, {edge} px), for others use
the machine too; embedded and Triton take turns. ONNX Runtime in fp32 on one thread in both. Triton's share holds its
batching delay of 0.5 ms.

| model | call | rows | KiB sent | embedded, ms | Triton, ms | more, ms |
|---|---|---|---|---|---|---|
{costs}

## Agreement

Answers of the default model to the pictures in `examples/` with its default options, through Triton and embedded;
depth in [0, 1], flow in pixels, amodal 0 or 1. Relative: root mean square over the largest value.

| task | embedded engine | largest difference | relative |
|---|---|---|---|
{close}

## Faults

{requests} requests of 40 steps run on a toy model when the fault comes. *Last answer*: seconds after the fault. *Back*:
seconds after the fault's end until a request is answered, without a restart of the gateway. *Slots*: gauges of the
gateway that are not 0 afterwards. *Shared memory*: segments in /dev/shm that Triton left after its own clean end. They
are those of its Python backend, which stands in for ONNX Runtime's here and which does not free what a model process
held that died or never answered; ONNX Runtime's own backend uses none, and a container's end frees all. A Triton that
has died is started again meanwhile, as its container would be; that is not counted.

| fault | servers | the {requests} requests got | last answer, s | lost | back, s | slots | shared memory |
|---|---|---|---|---|---|---|---|
{faults}

## Drains under load

| drain | requests | drains | answers |
|---|---|---|---|
{drains}
"""
Step = Callable[[Backend], Awaitable[object]]


@dataclass(frozen=True)
class Batch:
    """Inputs of the three parts for `rows` pictures of `edge` px."""

    latent: Array
    picture: Array
    task: Labels
    timestep: Labels
    conditioning: Conditioning

    @classmethod
    async def of(cls, backend: Backend, rows: int, edge: int) -> Batch:
        random = np.random.default_rng(0)
        latent = backend.card.latent
        cells = edge // latent.stride
        picture = random.uniform(-1, 1, (rows, 3, edge, edge)).astype(np.float32)
        task = np.full(rows, next(iter(backend.card.tasks.values())).label, np.int64)
        noise = random.standard_normal((rows, latent.channels, cells, cells), np.float32)
        seen = await backend.encode(picture, picture, task, Ticket())
        return cls(noise, picture, task, np.full(rows, 999, np.int64), seen)

    def steps(self) -> dict[str, tuple[int, Step]]:
        """What -> bytes that travel there, and the call."""
        shown = 2 * self.picture.nbytes
        given = self.latent.nbytes + sum(value.nbytes for value in self.conditioning.values())
        return {
            "encode": (shown, lambda b: b.encode(self.picture, self.picture, self.task, Ticket())),
            "denoise": (
                given,
                lambda b: b.denoise(self.latent, self.timestep, self.task, self.conditioning, Ticket()),
            ),
            "decode": (self.latent.nbytes, lambda b: b.decode(self.latent, Ticket())),
        }


async def milliseconds(backends: Sequence[Backend], step: Step, rounds: int) -> list[float]:
    """The slowest of the fastest tenth of `rounds` calls to each, taking turns, after three that do not count: what
    others do on the machine slows the rest.
    """
    times: list[list[float]] = [[] for _ in backends]
    for turn in range(rounds + 3):
        for backend, mine in zip(backends, times, strict=True):
            began = time.perf_counter()
            await step(backend)
            if turn >= 3:
                mine.append((time.perf_counter() - began) * 1e3)
    return [statistics.quantiles(mine, n=10)[0] for mine in times]


async def overhead(repository: Path, server: TritonServer, edge: int, rounds: int) -> list[str]:
    """A row for each part at batch 1 and 4."""
    embedded = Embedded.load(Repository(repository), engine="onnxruntime", precision="fp32", threads=1)
    triton = await Triton.connect([server.url])
    rows = []
    for count in (1, 4):
        batch = await Batch.of(embedded, count, edge)
        for name, (size, step) in batch.steps().items():
            here, there = await milliseconds([embedded, triton], step, rounds)
            rows.append(
                f"| {embedded.card.name} | {name} | {count} | {size / 1024:.0f} | {here:.2f} | {there:.2f} |"
                f" {there - here:.2f} |"
            )
    await triton.aclose()
    await embedded.aclose()
    return rows


def example(task: TaskName) -> Inputs:
    names = {"depth": ("photo.jpg",), "flow": ("frame_1.png", "frame_2.png"), "amodal": ("occluded.jpg",)}[task]
    pictures = [read_picture((EXAMPLES / name).read_bytes()) for name in names]
    mask = read_mask((EXAMPLES / "occluded_mask.png").read_bytes()) if task == "amodal" else None
    return Inputs(task, pictures[0], pictures[1] if len(pictures) > 1 else None, mask)


async def agreement(repository: Path, server: TritonServer) -> list[str]:
    """A row for each task and engine: how far Triton's answers are from the engine's."""
    triton = await Triton.connect([server.url])
    rows = []
    for engine, precision in (("onnxruntime", "fp32"), ("auto", "auto")):
        embedded = Embedded.load(Repository(repository), engine=engine, precision=precision, threads=1)
        for task in TASKS:
            options = Options().resolve(embedded.card, task)
            ours, theirs = [await Pipeline(backend)(example(task), options) for backend in (embedded, triton)]
            a, b = (np.asarray(answer.prediction, np.float32) for answer in (ours, theirs))
            span = float(np.abs(a).max())
            rows.append(
                f"| {task} | {embedded.engine} {embedded.precision} | {np.abs(a - b).max():.1e} |"
                f" {np.sqrt(np.mean((a - b) ** 2)) / span:.1e} |"
            )
        await embedded.aclose()
    await triton.aclose()
    return rows


@dataclass(frozen=True)
class Fault:
    """Something that happens to the first of `servers` while 8 requests run, and its end."""

    name: str
    servers: int
    strike: Callable[[TritonServer], object]
    heal: Callable[[TritonServer], object]
    timeout_s: float = 10.0
    steps: int = 40


def spoil(model: str, fault: str | None) -> Callable[[TritonServer], None]:
    return lambda server: inject(server.repository, model, fault)


def nothing(_: TritonServer) -> None:
    return None


FAULTS = [
    Fault("kill -9", 1, TritonServer.kill, TritonServer.start),
    Fault("kill -9 of one of two", 2, TritonServer.kill, TritonServer.start),
    Fault("SIGSTOP", 1, TritonServer.freeze, TritonServer.thaw),
    Fault("SIGSTOP of one of two", 2, TritonServer.freeze, TritonServer.thaw),
    Fault("SIGTERM (drain)", 1, TritonServer.stop, TritonServer.start),
    Fault("SIGTERM (drain) of one of two", 2, TritonServer.stop, TritonServer.start),
    Fault("the model's process dies", 1, lambda server: server.kill_stub("toy"), nothing),
    Fault("model unloaded and loaded, 3 times", 1, lambda s: [reload(s, "toy") for _ in range(3)], nothing),
    Fault("slow model (5 s a step)", 1, spoil("toy", "slow 5"), spoil("toy", None), timeout_s=2),
    Fault("model that returns nothing", 1, spoil("toy", "silent"), spoil("toy", None), timeout_s=2),
    Fault("model that returns NaN", 1, spoil("toy", "nan"), spoil("toy", None)),
    Fault("model that returns a wrong shape", 1, spoil("toy", "shape"), spoil("toy", None)),
    Fault("model that raises an error", 1, spoil("toy", "error"), spoil("toy", None)),
]


async def suffer(fault: Fault, repository: Path, folder: Path) -> str:
    """One row of the fault table."""
    servers = [TritonServer(repository, folder / str(number)) for number in range(fault.servers)]
    try:
        for server in servers:
            server.start()
        async with gateway(*servers, triton_timeout_s=fault.timeout_s) as house:
            asking = house.asking(REQUESTS, steps=fault.steps)
            await house.until_running()
            began = time.monotonic()
            await asyncio.to_thread(fault.strike, servers[0])
            asked = await asyncio.gather(*asking)
            last = max(one.ended for one in asked) - began
            await asyncio.to_thread(fault.heal, servers[0])
            back = await house.until_back(*servers)
            leaks = await house.leaks()
        for server in servers:
            await asyncio.to_thread(server.stop)
        left = sum(len(server.shared_memory()) for server in servers)
    finally:
        for server in servers:
            server.close()
        for model in ("toy-encoder", "toy", "toy-decoder"):
            inject(repository, model, None)
    lost = sum(one.status != 200 for one in asked)
    return (
        f"| {fault.name} | {fault.servers} | {told(asked)} | {last:.1f} | {lost} | {back:.1f} | {len(leaks)} | {left} |"
    )


def told(asked: Sequence[Asked]) -> str:
    seen = Counter(f"{one.status}{f' {one.problem}' if one.problem else ''}" for one in asked)
    return ", ".join(f"{count} x {what}" for what, count in sorted(seen.items()))


async def faults(folder: Path) -> list[str]:
    repository = toy.build(folder / "model_repository")
    rows = []
    for number, fault in enumerate(FAULTS):
        rows.append(await suffer(fault, repository, folder / f"fault{number}"))
        sys.stderr.write(rows[-1] + "\n")
    return rows


async def drain_of_triton(folder: Path, count: int) -> str:
    """`count` requests, eight at a time, while each of two servers in turn drains, ends and is started again."""
    repository = toy.build(folder / "model_repository")
    servers = [TritonServer(repository, folder / str(number)) for number in range(2)]
    try:
        for server in servers:
            server.start()
        async with gateway(*servers) as house:
            drains, stop = 0, asyncio.Event()

            async def roll() -> None:
                nonlocal drains
                for server in itertools.cycle(servers):
                    await asyncio.to_thread(server.stop)
                    await asyncio.to_thread(server.start)
                    await house.until_up(2)
                    drains += 1
                    if stop.is_set():
                        return

            rolling = asyncio.create_task(roll())
            asked = await ask_many(house, count)
            stop.set()
            await rolling
    finally:
        for server in servers:
            server.close()
    return f"| Triton's, one of two after the other | {len(asked)} | {drains} | {told(asked)} |"


async def ask_many(house: Gateway, count: int) -> list[Asked]:
    numbers = iter(range(count))

    async def one_after_another() -> list[Asked]:
        return [await house.ask(list(TASKS)[number % 3], seed=number, steps=10) for number in numbers]

    return [one for some in await asyncio.gather(*(one_after_another() for _ in range(REQUESTS))) for one in some]


async def drain_of_gateway(folder: Path, rounds: int) -> str:
    """SIGTERM to a gateway process with eight long requests in its hands, `rounds` times."""
    repository = toy.build(folder / "model_repository", width=128)
    seen: Counter[int] = Counter()
    with running(repository, folder / "triton") as server:
        settings = {"backend": "triton", "triton_url": server.url}
        for _ in range(rounds):
            with process.serving(repository, **settings) as served:
                url = f"{served.url}/depth?steps=100&processing_resolution=64"
                async with httpx.AsyncClient(timeout=60) as client:
                    asking = [asyncio.create_task(client.post(url, files=files("depth"))) for _ in range(REQUESTS)]
                    while served.counters()["saccade_pending_requests"] < REQUESTS:
                        await asyncio.sleep(0.01)
                    served.popen.send_signal(signal.SIGTERM)
                    seen.update(answer.status_code for answer in await asyncio.gather(*asking))
    told = ", ".join(f"{count} x {status}" for status, count in seen.items())
    return f"| a gateway's, with all of {REQUESTS} requests accepted | {seen.total()} | {rounds} | {told} |"


async def bench(repository: Path, edge: int, rounds: int, count: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = toy.build(folder / "toy")
        with running(small, folder / "t1") as server:
            costs = await overhead(small, server, 64, rounds)
        with running(repository, folder / "t2") as server:
            costs += await overhead(repository, server, edge, max(20, rounds // 10))
            close = await agreement(repository, server)
        sys.stderr.write("\n".join([*costs, *close, ""]))  # the rest takes minutes
        table = await faults(folder / "faults")
        drains = [await drain_of_triton(folder / "drain", count), await drain_of_gateway(folder / "gateway", 5)]
    return REPORT.format(
        machine=describe("onnxruntime", "tritonclient", "grpcio", "numpy"),
        load=os.getloadavg()[1],
        rounds=rounds,
        fewer=max(20, rounds // 10),
        edge=edge,
        requests=REQUESTS,
        costs="\n".join(costs),
        close="\n".join(close),
        faults="\n".join(table),
        drains="\n".join(drains),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Triton against embedded: cost, agreement, faults, drains")
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--edge", type=int, default=192, help="pixels")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000, help="of the drain under load")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    logging.disable(logging.ERROR)
    Installation.here().prepare()
    table = asyncio.run(bench(find_repository(args.repository), args.edge, args.rounds, args.requests))
    sys.stdout.write(table)
    if args.out:
        above = args.out.read_text().partition(MADE_BY)[0] if args.out.exists() else "# Triton\n\n"
        args.out.write_text(above + MADE_BY + table)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
