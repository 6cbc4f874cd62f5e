"""Batches made in a thread while the step before them is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from training.loop.config import LoopConfig
from training.loop.objective import Objective
from training.loop.world import World

DEPTH = 2


def parts_of(config: LoopConfig, world: World) -> tuple[range, int]:
    """The parts of every step that this process computes, and how many there are."""
    return range(world.rank * config.accumulate, (world.rank + 1) * config.accumulate), world.size * config.accumulate


def ahead(objective: Objective, config: LoopConfig, world: World, begin: int, end: int) -> Iterator[tuple[int, Any]]:
    """Parts and batches of the steps from `begin` to before `end`, in order; `DEPTH` of them are made ahead."""
    mine, parts = parts_of(config, world)
    places = ((step, part) for step in range(begin, end) for part in mine)
    coming: deque[tuple[int, Future[Any]]] = deque()
    with ThreadPoolExecutor(1, "batches") as thread:
        try:
            for step, part in places:
                coming.append((part, thread.submit(objective.batch, step, part, parts)))
                if len(coming) > DEPTH:
                    part, batch = coming.popleft()
                    yield part, batch.result()
            while coming:
                part, batch = coming.popleft()
                yield part, batch.result()
        finally:
            for _, batch in coming:
                batch.cancel()
