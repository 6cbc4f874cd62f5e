"""Clients that leave at any moment, and answers amid a crowd: what `bench.replay --leavers` and `--crowd` show."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import numpy as np

from bench.traffic import EDGES, SHARES, Shape, ask, shapes, timed
from saccade.backends import Ticket
from saccade.backends.embedded import Embedded
from saccade.backends.pace import Kind
from saccade.backends.stepping import Stepping
from saccade.pipeline import Answer, Pipeline
from server.admission import Admission

WHO: ContextVar[int] = ContextVar("who")
TYPICAL = Shape("depth", 192, 5, 2)
PATIENCE = 2.0
"""How long clients stay in the mean, in times that a typical request takes alone."""
CROWD = 12


class Counting:
    """Knows of every client how many batches with a row of theirs began after they had left, and how many ran then."""

    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.running: Counter[int] = Counter()
        self.running_when_left: dict[int, int] = {}
        self.began_after: Counter[int] = Counter()

    def here(self) -> object:
        return WHO.get(-1)

    @contextmanager
    def batch(self, kind: Kind, callers: Sequence[object]) -> Iterator[None]:
        who = {caller for caller in callers if isinstance(caller, int)}
        self.began_after.update(who & self.gone)
        self.running.update(who)
        try:
            yield
        finally:
            self.running.subtract(who)

    def leave(self, who: int) -> None:
        self.gone.add(who)
        self.running_when_left[who] = self.running[who]


async def leavers(backend: Embedded, count: int, seed: int) -> int:
    """0 if nothing leaks and nobody who left had more than the batches that were running, one of a stream; else 1."""
    counting, admission = Counting(), Admission(float("inf"))
    lane = Stepping(backend, batch_size=4, concurrency=backend.streams, tracer=counting)
    await lane.start()
    pipeline, random = Pipeline(lane), np.random.default_rng(seed)
    answered = 0

    async def client(who: int, shape: Shape) -> None:
        nonlocal answered
        WHO.set(who)
        ticket = Ticket()
        with admission.admit(1.0, lane=lane, ticket=ticket):
            await ask(pipeline, shape, ticket)
        answered += 1

    async def leaver(who: int, shape: Shape, comes_s: float, stays_s: float) -> None:
        await asyncio.sleep(comes_s)
        task = asyncio.create_task(client(who, shape))
        await asyncio.wait({task}, timeout=stays_s)
        if not task.done():
            counting.leave(who)
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    await ask(pipeline, TYPICAL)
    typical_s = await timed(ask(pipeline, TYPICAL))
    comes = np.sort(random.uniform(0, count * typical_s, count))
    stays = random.exponential(PATIENCE * typical_s, count)
    drawn = shapes(count, seed)
    say(f"{count} clients, about {comes[-1]:.0f} s")
    clients = zip(range(count), drawn, comes, stays, strict=True)
    await asyncio.gather(*(leaver(who, shape, at, for_s) for who, shape, at, for_s in clients))
    while lane.busy:
        await asyncio.sleep(0.01)
    running, began = counting.running_when_left, counting.began_after
    most = max((running[who] + began[who] for who in counting.gone), default=0)
    leaked = [lane.waiting, lane.running, lane.backlog_s, admission.requests, admission.pending]
    say(f"{answered} answered, {len(counting.gone)} left before; of those")
    say(f"{sum(running.values())} had a batch running when they left; {sum(began.values())} batches began afterwards")
    say(f"most batches of one client that ended after it left: {most}; streams: {backend.streams}")
    say(f"left over: rows waiting, running, seconds of backlog, requests, units: {leaked}")
    await lane.aclose()
    return int(any(leaked) or most > backend.streams)


async def crowd(backend: Embedded, count: int, seed: int) -> int:
    """0 if every answer has the same bytes alone and amid others; else 1."""
    lane = Stepping(backend, batch_size=4, concurrency=backend.streams)
    await lane.start()
    pipeline, random = Pipeline(lane), np.random.default_rng(seed)
    asked = [
        Shape(
            list(SHARES)[i % len(SHARES)], list(EDGES)[i // 3 % len(EDGES)], int(random.choice([1, 2, 5])), 1 + i % 4, i
        )
        for i in range(count)
    ]
    alone = [content(await ask(pipeline, shape)) for shape in asked]
    others = shapes(CROWD * count, seed + 1)
    differ = 0
    for start, (shape, bytes_alone) in enumerate(zip(asked, alone, strict=True)):
        around = [asyncio.create_task(ask(pipeline, one)) for one in others[start * CROWD : (start + 1) * CROWD]]
        await asyncio.sleep(float(random.uniform(0, 0.05)))
        differ += content(await ask(pipeline, shape)) != bytes_alone
        for one in around:
            one.cancel()
        await asyncio.gather(*around, return_exceptions=True)
    say(f"{count} requests amid {CROWD} others each, batches of {lane.batch_size}: {differ} differ from those alone")
    await lane.aclose()
    return int(differ > 0)


def content(answer: Answer) -> list[bytes]:
    maps = (answer.prediction, answer.uncertainty, answer.completed)
    return [np.ascontiguousarray(one).tobytes() for one in maps if one is not None]


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
