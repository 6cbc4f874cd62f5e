"""Requests of every kind at random times, for benches that put the real pipeline under load in this process."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from saccade.backends import Ticket
from saccade.backends.embedded import Embedded
from saccade.backends.order import Order
from saccade.backends.stepping import Stepping
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Answer, Inputs, Options, Pipeline, Resolved
from saccade.tasks import TaskName

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = {1: 0.30, 2: 0.25, 5: 0.20, 10: 0.13, 20: 0.08, 50: 0.04}
MEMBERS = {1: 0.60, 2: 0.20, 5: 0.13, 10: 0.07}
EDGES = {128: 0.4, 192: 0.3, 256: 0.3}
SHARES: dict[TaskName, float] = {"depth": 0.4, "flow": 0.3, "amodal": 0.3}
MANY_STEPS, MANY_MEMBERS = 20, 10
PROBES = ((1, 1), (MANY_STEPS, 1), (1, MANY_MEMBERS))
"""Steps and members of the requests that are timed: what one costs follows from what these do."""


@dataclass(frozen=True)
class Shape:
    """What is asked; how large the picture is, in pixels of its longer edge; the seed of the noise."""

    task: TaskName
    edge: int
    steps: int
    members: int
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.steps * self.members

    def options(self, pipeline: Pipeline) -> Resolved:
        wanted = Options(steps=self.steps, ensemble_size=self.members, seed=self.seed, processing_resolution=self.edge)
        return wanted.resolve(pipeline.card, self.task)


@dataclass(frozen=True)
class Request:
    """`at`: when it comes, in seconds. `alone_s`: the time that it takes when there is nobody else."""

    shape: Shape
    at: float
    alone_s: float


@cache
def picture(name: str, edge: int) -> np.ndarray:
    """An example at most `edge` px large; a mask where the name says so."""
    data = (EXAMPLES / name).read_bytes()
    seen = read_mask(data) if "mask" in name else read_picture(data)
    scale = edge / max(seen.shape[:2])
    size = (max(1, round(seen.shape[1] * scale)), max(1, round(seen.shape[0] * scale)))
    kind = Image.Resampling.NEAREST if seen.dtype == bool else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(seen).resize(size, kind))


def inputs(shape: Shape) -> Inputs:
    edge = shape.edge
    if shape.task == "depth":
        return Inputs("depth", picture("photo.jpg", edge))
    if shape.task == "flow":
        return Inputs("flow", picture("frame_1.png", edge), next_image=picture("frame_2.png", edge))
    return Inputs("amodal", picture("occluded.jpg", edge), mask=picture("occluded_mask.png", edge))


async def ask(pipeline: Pipeline, shape: Shape, ticket: Ticket | None = None) -> Answer:
    return await pipeline(inputs(shape), shape.options(pipeline), ticket)


class Costs:
    """Seconds of a request alone: a + b * steps * members + c * members, for each task and size; measured."""

    def __init__(self) -> None:
        self._of: dict[tuple[TaskName, int], tuple[float, float, float]] = {}

    def __call__(self, shape: Shape) -> float:
        start, step, member = self._of[shape.task, shape.edge]
        return start + step * shape.rows + member * shape.members

    async def measure(self, pipeline: Pipeline, rounds: int, tell: Callable[[str], None]) -> None:
        for task in SHARES:
            for edge in EDGES:
                seconds = [await self._seconds(pipeline, Shape(task, edge, *probe), rounds) for probe in PROBES]
                step = max(1e-5, (seconds[1] - seconds[0]) / (MANY_STEPS - 1))
                member = max(0.0, (seconds[2] - seconds[0]) / (MANY_MEMBERS - 1) - step)
                self._of[task, edge] = (max(1e-5, seconds[0] - step - member), step, member)
                tell(f"{task} at {edge} px: alone {seconds[0] * 1e3:.0f} ms, a step {step * 1e3:.1f} ms")

    async def _seconds(self, pipeline: Pipeline, shape: Shape, rounds: int) -> float:
        await ask(pipeline, shape)
        return statistics.median([await timed(ask(pipeline, shape)) for _ in range(rounds)])


async def timed(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def shapes(count: int, seed: int) -> list[Shape]:
    """The same for the same seed, on any machine."""
    random = np.random.default_rng(seed)

    def drawn(choices: dict[int, float]) -> list[int]:
        return [int(one) for one in random.choice(list(choices), count, p=list(choices.values()))]

    tasks = [list(SHARES)[int(i)] for i in random.choice(len(SHARES), count, p=list(SHARES.values()))]
    parts = zip(tasks, drawn(EDGES), drawn(STEPS), drawn(MEMBERS), strict=True)
    return [Shape(*part, seed=number) for number, part in enumerate(parts)]


async def capacity(pipeline: Pipeline, drawn: Sequence[Shape], costs: Costs) -> float:
    """Seconds of requests alone that are answered in a second when all of `drawn` are asked at once."""
    seconds = await timed(asyncio.gather(*(ask(pipeline, shape) for shape in drawn)))
    return sum(map(costs, drawn)) / seconds


def arrivals(drawn: Sequence[Shape], costs: Costs, rate: float, seed: int) -> list[Request]:
    """A Poisson process that brings `rate` seconds of requests alone in a second."""
    alone = [costs(shape) for shape in drawn]
    gaps = np.random.default_rng(seed).exponential(float(np.mean(alone)) / rate, len(drawn))
    parts = zip(drawn, np.cumsum(gaps), alone, strict=True)
    return [Request(shape, float(at), alone_s) for shape, at, alone_s in parts]


async def opened(backend: Embedded, batch_size: int | None, order: Order | None = None) -> Stepping:
    """A lane that has seen every size, so that it knows what its steps take."""
    lane = Stepping(backend, batch_size=batch_size, concurrency=backend.streams, order=order)
    await lane.start()
    pipeline = Pipeline(lane)
    for edge in EDGES:
        for task in SHARES:
            await ask(pipeline, Shape(task, edge, 3, 1))
    return lane


Answering = Callable[[Request], Awaitable[None]]


async def replay(requests: Iterable[Request], answering: Answering, done: Callable[[], None]) -> list[float]:
    """Seconds from each request's coming to its answer."""
    clock = asyncio.get_running_loop().time
    began = clock()

    async def one(request: Request) -> float:
        await asyncio.sleep(began + request.at - clock())
        await answering(request)
        done()
        return clock() - began - request.at

    return list(await asyncio.gather(*map(one, requests)))
