"""Continuous batching at the level of the denoising step: packs whatever steps wait into one batch of any backend."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.card import Card
from saccade.errors import BackendUnavailable, ModelError

Kind = Literal["encode", "denoise", "decode"]
Tensors = Mapping[str, NDArray[Any]]
Observer = Callable[[str, int, float], None]

LARGEST_BATCH = 8
WORTHWHILE = 0.15
MEASURING_S = 0.04
WARM_UP_PX = 512


class Tracer(Protocol):
    """Marks batches in a trace."""

    def here(self) -> object:
        """Where the caller is in its trace; asked for every call."""
        ...

    def batch(self, kind: Kind, callers: Sequence[object]) -> AbstractContextManager[None]:
        """Surrounds a batch; `callers` has what `here` said for each of its rows."""
        ...


@dataclass(eq=False)
class _Row:
    """One sample of one call, on its way through the lane."""

    kind: Kind
    feeds: Tensors
    ticket: Ticket
    result: asyncio.Future[Tensors]
    caller: object = None
    batch: list[_Row] = field(default_factory=list)
    work: asyncio.Task[None] | None = None

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Rows of one key may share a batch: the same graph at the same sizes."""
        return self.kind, *((name, value.shape) for name, value in self.feeds.items())


class Stepping:
    """A lane in front of `backend`, with the same protocol.

    Calls are cut into rows. A batch is made when a slot is free: its first row is the oldest of the ticket whose turn
    it is, the others are rows of the same graph and sizes, one from each ticket in turn, until `batch_size`. A ticket
    that was served goes to the end, so a request with twenty members gets as much as a request with one.

    Every denoising batch has exactly `batch_size` rows, filled up with copies of its first, so that the same
    arithmetic runs however many share it. Pictures and latents are encoded and decoded one at a time.

    `batch_size` None is measured by `start` (1 until then). `concurrency` batches are in flight at once.
    `observer` hears of every batch that succeeded: its kind, rows (without copies) and seconds. `finished` counts the
    batches that the backend has come back from, well or not.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        batch_size: int | None = None,
        concurrency: int = 1,
        observer: Observer | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        if min(1 if batch_size is None else batch_size, concurrency) < 1:
            raise ValueError("batch_size and concurrency must be at least 1")
        self._backend = backend
        self._measure = batch_size is None
        self._batch_size = batch_size or 1
        self._free = concurrency
        self._observer = observer
        self._tracer = tracer
        self.finished = 0
        self._lines: OrderedDict[int, deque[_Row]] = OrderedDict()
        self._batches: set[asyncio.Task[None]] = set()
        self._running: Counter[Kind] = Counter()
        self._closed = False

    @property
    def card(self) -> Card:
        return self._backend.card

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def waiting(self) -> int:
        """Rows that wait for a batch."""
        return sum(map(len, self._lines.values()))

    @property
    def running(self) -> int:
        """Rows in the batches that run."""
        return self._running.total()

    @property
    def running_steps(self) -> int:
        """Of those, denoising steps."""
        return self._running["denoise"]

    @property
    def waiting_tickets(self) -> int:
        """Requests of which a row waits."""
        return len(self._lines)

    @property
    def busy(self) -> bool:
        """Whether a batch runs."""
        return bool(self._batches)

    async def start(self) -> None:
        """Run every graph once, so that the first caller does not pay for it; measure the knee if it was not given."""
        conditioning, latent = await self._warm_up()
        if self._measure:
            self._batch_size = await self._knee(latent, conditioning)
        else:
            await self._seconds_per_row(latent, conditioning, self._batch_size, 0)

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        return await self._submit("encode", {"image": image, "prompt": prompt, "task": task}, ticket)

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        feeds: dict[str, NDArray[Any]] = {"latent": latent, "timestep": timestep, "task": task, **conditioning}
        return (await self._submit("denoise", feeds, ticket))["output"]

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return (await self._submit("decode", {"latent": latent}, ticket))["output"]

    async def aclose(self) -> None:
        """Refuse what waits and what comes, let running batches end, close the backend. Cancelled, it gives the batches
        up and closes the backend all the same."""
        self._closed = True
        for row in [row for line in self._lines.values() for row in line]:
            self._withdraw(row)
            if not row.result.done():
                row.result.set_exception(_closing())
        try:
            if self._batches:
                await asyncio.wait(self._batches)
        finally:
            for batch in self._batches:
                batch.cancel()
            self._observer = None  # it may hold this lane in turn: no graph is to wait for the garbage collector
            await self._backend.aclose()

    async def _submit(self, kind: Kind, feeds: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        """Enqueue a call's rows, await them all. Leaving early withdraws those that have not started."""
        if self._closed:
            raise _closing()
        loop = asyncio.get_running_loop()
        count = len(next(iter(feeds.values())))
        cut = [{name: value[i : i + 1] for name, value in feeds.items()} for i in range(count)]
        caller = None if self._tracer is None else self._tracer.here()
        rows = [_Row(kind, one, ticket, loop.create_future(), caller) for one in cut]
        for row in rows:
            self._lines.setdefault(id(ticket), deque()).append(row)
            ticket.enqueue()
        loop.call_soon(self._pump)  # after the others that are ready now, so that they share the batch
        try:
            results = [await row.result for row in rows]
        finally:
            for row in rows:
                self._withdraw(row)
                row.result.cancel()  # a failure that is not the first one needs no log, and gets none
            for row in rows:
                if row.work is not None and all(other.result.done() for other in row.batch):
                    row.work.cancel()  # nobody waits for it any more
        return {name: _join([result[name] for result in results]) for name in results[0]}

    def _withdraw(self, row: _Row) -> None:
        """Take a row out of its line, if it is still there."""
        line = self._lines.get(id(row.ticket), ())
        if row in line:
            self._leave_line(row)
            row.ticket.drop()

    def _leave_line(self, row: _Row) -> None:
        line = self._lines[id(row.ticket)]
        line.remove(row)
        if not line:
            del self._lines[id(row.ticket)]

    def _pump(self) -> None:
        """Start batches while there are rows and slots."""
        while self._free and (batch := self._take()):
            self._free -= 1
            self._running[batch[0].kind] += len(batch)
            for row in batch:
                row.ticket.start()
            task = asyncio.get_running_loop().create_task(self._work(batch))
            for row in batch:
                row.batch, row.work = batch, task
            self._batches.add(task)
            task.add_done_callback(partial(self._ended, batch))

    def _ended(self, batch: list[_Row], task: asyncio.Task[None]) -> None:
        """A callback and no `finally`: a task that is cancelled before its first step runs none."""
        self._batches.discard(task)
        self._fail(batch, BackendUnavailable("the batch was called off"))
        for row in batch:
            row.ticket.finish()
            row.batch, row.work = [], None
        self._running[batch[0].kind] -= len(batch)
        self._free += 1
        self._pump()

    def _take(self) -> list[_Row]:
        """The next batch's rows, in turn."""
        batch: list[_Row] = []
        while row := self._next(batch[0] if batch else None):
            batch.append(row)
            line = id(row.ticket)
            self._leave_line(row)
            if line in self._lines:
                self._lines.move_to_end(line)
            if row.kind != "denoise" or len(batch) == self._batch_size:
                break
        return batch

    def _next(self, first: _Row | None) -> _Row | None:
        """The oldest row of the first line that has one which may join `first`."""
        for line in self._lines.values():
            for row in line:
                if not row.result.cancelled() and (first is None or row.key == first.key):
                    return row
        return None

    async def _work(self, batch: list[_Row]) -> None:
        began = time.perf_counter()
        try:
            with self._traced(batch):
                results = await self._call(batch[0].kind, self._fill(batch))
        except Exception as error:
            self.finished += 1
            if isinstance(error, ModelError) and len(batch) > 1:
                await self._one_by_one(batch)
            else:
                self._fail(batch, error)
        else:
            self.finished += 1
            for i, row in enumerate(batch):
                if not row.result.done():
                    row.result.set_result({name: value[i : i + 1] for name, value in results.items()})
            if self._observer is not None:
                self._observer(batch[0].kind, len(batch), time.perf_counter() - began)

    def _traced(self, batch: list[_Row]) -> AbstractContextManager[None]:
        if self._tracer is None:
            return nullcontext()
        return self._tracer.batch(batch[0].kind, [row.caller for row in batch])

    async def _one_by_one(self, batch: list[_Row]) -> None:
        """A batch that the model cannot run, again in batches of one row: one that spoils it spoils its own alone."""
        for row in batch:
            if not row.result.done():
                await self._work([row])

    def _fail(self, batch: list[_Row], error: Exception) -> None:
        for row in batch:
            if not row.result.done():
                row.result.set_exception(error)

    def _fill(self, batch: list[_Row]) -> Tensors:
        """The rows as one batch, of `batch_size` rows for the denoiser."""
        missing = self._batch_size - len(batch) if batch[0].kind == "denoise" else 0
        rows = [*batch, *[batch[0]] * missing]
        return {name: _join([row.feeds[name] for row in rows]) for name in batch[0].feeds}

    async def _call(self, kind: Kind, feeds: Tensors) -> Tensors:
        ticket = Ticket()  # the backend's own waiting is ours, not the callers'
        match kind:
            case "encode":
                return await self._backend.encode(feeds["image"], feeds["prompt"], feeds["task"], ticket)
            case "denoise":
                conditioning = {name: feeds[name] for name in self.card.conditioning}
                latent, timestep, task = feeds["latent"], feeds["timestep"], feeds["task"]
                return {"output": await self._backend.denoise(latent, timestep, task, conditioning, ticket)}
            case "decode":
                return {"output": await self._backend.decode(feeds["latent"], ticket)}

    async def _warm_up(self) -> tuple[Conditioning, Array]:
        """Encode and decode noise at the largest default size; what a denoising step at that size takes."""
        latent, tasks = self.card.latent, self.card.tasks.values()
        wanted = max(task.defaults.processing_resolution or WARM_UP_PX for task in tasks)
        edge = -(-wanted // latent.multiple) * latent.multiple
        random = np.random.default_rng(0)
        picture = random.uniform(-1, 1, (1, 3, edge, edge)).astype(np.float32)
        cells = edge // latent.stride
        noise = random.standard_normal((1, latent.channels, cells, cells), np.float32)
        conditioning = await self._backend.encode(picture, picture, self._label(), Ticket())
        await self._backend.decode(noise, Ticket())
        return conditioning, noise

    async def _knee(self, latent: Array, conditioning: Conditioning) -> int:
        """The batch size past which doubling makes a row less than 15% cheaper."""
        size, cost = 1, await self._seconds_per_row(latent, conditioning, 1, MEASURING_S)
        while size < LARGEST_BATCH:
            try:
                doubled = await self._seconds_per_row(latent, conditioning, size * 2, MEASURING_S)
            except ModelError:  # `size` rows have just run: so many are too many for it
                break
            if doubled > cost * (1 - WORTHWHILE):
                break
            size, cost = size * 2, doubled
        return size

    async def _seconds_per_row(self, latent: Array, conditioning: Conditioning, size: int, measuring_s: float) -> float:
        """Of the fastest step, after one to warm up, tried for `measuring_s` seconds."""
        timestep = np.full(size, self.card.noise.timesteps - 1, np.int64)
        seen = {name: np.repeat(value, size, 0) for name, value in conditioning.items()}
        rows = np.repeat(latent, size, 0)
        best, until = float("inf"), float("inf")
        while time.perf_counter() < until:
            began = time.perf_counter()
            await self._backend.denoise(rows, timestep, np.repeat(self._label(), size), seen, Ticket())
            now = time.perf_counter()
            best = min(best, now - began) if until < float("inf") else best
            until = min(until, now + measuring_s)
        return best / size

    def _label(self) -> Labels:
        return np.array([next(iter(self.card.tasks.values())).label], np.int64)


def _join(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _closing() -> BackendUnavailable:
    return BackendUnavailable("the backend is closing")
