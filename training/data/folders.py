"""Datasets on disk as a source of batches: order, faults, crops and codes around a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from saccade.errors import InvalidInput
from saccade.tasks import AmodalCoding, DepthCoding
from training.data.batch import TASKS, Batch, Sample, check_request, collate
from training.data.coded import closed, code_amodal, code_depth, code_flow, spread
from training.data.faults import Faults
from training.data.order import Order
from training.data.raw import Raw, RawAmodal, RawDepth, RawFlow, Reader
from training.data.together import Together

TRIES = 4  # crops of a picture before one is taken that knows less than it should


class Folders:
    """Real datasets of one or several tasks; row n of a task is the n-th sample of its reader's own order.

    Every epoch of a reader sees each of its samples once. Several readers of one task are gone through as if they were
    one; `training.data.mix` weighs them instead. `broken_share`: see `training.data.faults`. `threads` that read and
    decode change nothing but the speed.
    """

    def __init__(
        self,
        readers: Sequence[Reader] | Reader,
        seed: int = 0,
        broken_share: float = 0.01,
        depth_coding: DepthCoding | None = None,
        amodal_coding: AmodalCoding | None = None,
        threads: int = 1,
    ) -> None:
        readers = [readers] if not isinstance(readers, Sequence) else readers
        if not readers:
            raise InvalidInput("there is no dataset to read from")
        self.seed = seed
        self.depth_coding, self.amodal_coding = depth_coding or DepthCoding(), amodal_coding or AmodalCoding()
        self.readers: Mapping[str, list[Reader]] = {
            task: chosen for task in TASKS if (chosen := [reader for reader in readers if reader.task == task])
        }
        if not self.readers:
            raise InvalidInput(f"these datasets have none of the tasks {', '.join(TASKS)}")
        self._together = Together(threads)
        self.faults = {
            id(reader): Faults(type(reader).__name__, len(reader), broken_share)
            for chosen in self.readers.values()
            for reader in chosen
        }
        self._orders = {
            task: Order(sum(len(reader) for reader in chosen), seed) for task, chosen in self.readers.items()
        }

    def __len__(self) -> int:
        return sum(order.length for order in self._orders.values())

    def batch(self, step: int, task: str, count: int, size: tuple[int, int], first: int | None = None) -> Batch:
        """See `training.data.batch.Source`."""
        check_request(task, count, size)
        if task not in self._orders:
            raise InvalidInput(f"no dataset here has {task}; they have {', '.join(self._orders)}", param="task")
        first = step * count if first is None else first
        places = self._orders[task].at(first, count)
        numbered = enumerate(places, first)
        return collate(self._together.map(lambda at: self._row(task, at[0], int(at[1]), size), numbered))

    def report(self) -> list[str]:
        """One line for each dataset of which something was skipped."""
        return [f"{fault.dataset}: {fault.summary()}" for fault in self.faults.values() if fault.reasons]

    def _row(self, task: str, number: int, place: int, size: tuple[int, int]) -> Sample:
        for reader in self.readers[task]:
            if place < len(reader):
                break
            place -= len(reader)
        raw = self.faults[id(reader)].read(place, lambda at: _usable(reader.read(at)), reader.name)
        rng = np.random.default_rng([self.seed, number, TASKS.index(task)])
        return self._coded(_dense(raw, reader.gap_px), rng, size)

    def _coded(self, raw: Raw, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
        if isinstance(raw, RawFlow):
            return code_flow(raw, rng, size)
        if isinstance(raw, RawAmodal):
            return code_amodal(raw, rng, size, self.amodal_coding)
        for _ in range(TRIES):
            if (row := code_depth(raw, rng, size, self.depth_coding)) is not None:
                return row
        row = code_depth(raw, rng, size, self.depth_coding, whole=True)
        assert row is not None
        return row


def _usable(raw: Raw) -> Raw:
    """Raise InvalidInput where nothing could be learned."""
    if isinstance(raw, RawAmodal):
        if not (raw.visible > 127).any():
            raise InvalidInput("nothing of the object is visible")
        if not (raw.whole > 127).any():
            raise InvalidInput("the whole object is empty")
    elif not raw.known.any():
        raise InvalidInput(f"not one pixel's {'flow' if isinstance(raw, RawFlow) else 'depth'} is known")
    return raw


def _dense(raw: Raw, gap_px: float) -> Raw:
    """Truth that was measured at points, spread up to `gap_px` around them."""
    if isinstance(raw, RawAmodal) or gap_px <= 0:
        return raw
    known = closed(raw.known, gap_px)
    if isinstance(raw, RawDepth):
        return replace(raw, depth=spread(raw.depth, raw.known), known=known)
    return replace(raw, flow=spread(raw.flow, raw.known), known=known)
