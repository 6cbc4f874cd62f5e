"""Continuous batching at the level of the denoising step: packs whatever steps wait into one batch of any backend."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.backends.knee import WarmUp
from saccade.backends.lines import Lines, Row, Tensors
from saccade.backends.order import Dial, Order
from saccade.backends.pace import Kind, Pace
from saccade.card import Card
from saccade.errors import BackendUnavailable, ModelError

Observer = Callable[[str, int, float], None]


class Tracer(Protocol):
    """Marks batches in a trace."""

    def here(self) -> object:
        """Where the caller is in its trace; asked for every call."""
        ...

    def batch(self, kind: Kind, callers: Sequence[object]) -> AbstractContextManager[None]:
        """Surrounds a batch; `callers` has what `here` said for each of its rows."""
        ...


class Stepping:
    """A lane in front of `backend`, with the same protocol.

    Calls are cut into rows. A batch is made when a slot is free: its first row is the oldest of the ticket whose turn
    it is by `order`, the others are rows of the same graph and sizes, of the tickets that follow, until `batch_size`.
    Where several batches run at once, the last free slot is kept for a step while steps wait and none runs: pictures
    that are encoded and decoded never stall the denoiser.

    Every denoising batch has exactly `batch_size` rows, filled up with copies of its first, so that the same
    arithmetic runs however many share it. Pictures and latents are encoded and decoded one at a time.

    `batch_size` None is measured by `start` (1 until then). `concurrency` batches are in flight at once; one that has
    no company, running or waiting, is `alone` to the backend if `start` has seen that its bytes are the same then.
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
        order: Order | None = None,
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
        self.pace = Pace(self._batch_size, concurrency)
        self.order: Order = Dial() if order is None else order
        self._numbers = count()
        self._lines = Lines()
        self._placed: dict[int, Ticket] = {}
        self._concurrency = concurrency
        self._batches: set[asyncio.Task[None]] = set()
        self._running: Counter[Kind] = Counter()
        self._batches_of: Counter[Kind] = Counter()
        self._begun = 0
        self._tells_alone = False
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
        return len(self._lines)

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
        return len(self._lines.tickets)

    @property
    def busy(self) -> bool:
        """Whether a batch runs."""
        return bool(self._batches)

    @property
    def backlog_s(self) -> float:
        """Seconds of the machine that everything takes which is in place or waits."""
        return sum(ticket.work_s(self.pace) for ticket in self._known())

    def before_s(self, ticket: Ticket) -> float:
        """Of that, seconds that would be served before `ticket`, which need not be in place: what the order puts before
        it, and what has an earlier deadline and can meet it, even if the order would rather give that up."""
        now, others = self._now(), [known for known in self._known() if known is not ticket]
        ranked = self.order.rank([*others, ticket], now, self.pace)
        at, before_s = ranked.index(ticket), 0.0
        for place, other in enumerate(ranked):
            work, alone = other.left_s(now, self.pace)
            promised = other.deadline is not None and now + alone <= other.deadline <= ticket.due
            if place < at or (place > at and promised):
                before_s += work
        return before_s

    def late_s(self, ticket: Ticket, least_s: float) -> float:
        """Seconds by which `ticket` would miss its deadline for what is served before it, if it takes `least_s`."""
        if ticket.deadline is None or not (before_s := self.before_s(ticket)):
            return 0.0
        return max(0.0, self._now() + before_s + least_s - ticket.deadline)

    @contextmanager
    def place(self, ticket: Ticket) -> Iterator[None]:
        """What is ahead of `ticket` is part of the backlog while the block runs."""
        if any(ticket.ahead):
            self._come(ticket)
        self._placed[id(ticket)] = ticket
        try:
            yield
        finally:
            del self._placed[id(ticket)]
            self.order.left(ticket, self._now(), self.pace)

    async def start(self) -> None:
        """Run every graph once, so that the first caller does not pay for it; measure the knee if it was not given."""
        warm_up = WarmUp(self._backend, self.pace)
        self._batch_size = await warm_up.run(None if self._measure else self._batch_size)
        self._tells_alone = warm_up.alike

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
        for row in list(self._lines):
            self._lines.withdraw(row)
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
        pixels = self._pixels(kind, feeds)
        rows = [Row(kind, one, ticket, loop.create_future(), next(self._numbers), pixels, caller) for one in cut]
        for row in rows:
            self._lines.add(row)
        loop.call_soon(self._pump)  # after the others that are ready now, so that they share the batch
        try:
            results = [await row.result for row in rows]
        finally:
            for row in rows:
                self._lines.withdraw(row)
                row.result.cancel()  # a failure that is not the first one needs no log, and gets none
            for row in rows:
                if row.work is not None and all(other.result.done() for other in row.batch):
                    row.work.cancel()  # nobody waits for it any more
        return {name: _join([result[name] for result in results]) for name in results[0]}

    def _pump(self) -> None:
        """Start batches while there are rows and slots."""
        while self._free and (batch := self._take()):
            alone = self._concurrency > 1 and not self._batches and not self._lines
            self._begun += 1
            self._free -= 1
            self._running[batch[0].kind] += len(batch)
            self._batches_of[batch[0].kind] += 1
            for row in batch:
                row.ticket.start()
            task = asyncio.get_running_loop().create_task(self._work(batch, self._begun if alone else None))
            for row in batch:
                row.batch, row.work = batch, task
            self._batches.add(task)
            task.add_done_callback(partial(self._ended, batch))

    def _ended(self, batch: list[Row], task: asyncio.Task[None]) -> None:
        """A callback and no `finally`: a task that is cancelled before its first step runs none."""
        self._batches.discard(task)
        self._fail(batch, BackendUnavailable("the batch was called off"))
        for row in batch:
            row.ticket.finish(row.kind, row.pixels, row.label)
            row.batch, row.work = [], None
        self._running[batch[0].kind] -= len(batch)
        self._batches_of[batch[0].kind] -= 1
        self._free += 1
        self._pump()

    def _take(self) -> list[Row]:
        """The next batch's rows, in order."""
        steps_only = self._keeps_the_last_slot()
        ready = self._lines.ready(steps_only)
        if not ready:
            return []
        now = self._now()
        for ticket in ready:
            self._come(ticket)
        # A turn that is for steps alone passes nobody over: those with something else wait for a slot of their own.
        decide = self.order.rank if steps_only else self.order.turn
        turn = deque(decide(ready, now, self.pace))
        batch: list[Row] = []
        while turn:
            ticket = turn.popleft()
            row = self._lines.first(ticket, batch[0] if batch else None, steps_only)
            if row is None:
                continue
            batch.append(row)
            self._lines.take(row)
            self.order.took(ticket)
            if row.kind != "denoise" or len(batch) == self._batch_size:
                break
            if self.order.in_turn:
                turn.append(ticket)
            else:
                turn.appendleft(ticket)
        return batch

    def _keeps_the_last_slot(self) -> bool:
        """Whether the only free slot of several is for a step: one waits and none runs."""
        if self._concurrency == 1 or self._free > 1 or self._batches_of["denoise"]:
            return False
        return self._lines.steps_wait

    def _come(self, ticket: Ticket) -> None:
        """Told to the order once, when something of it is known to be ahead."""
        if ticket.arrived is None:
            if not any(known is not ticket for known in self._known()):
                self.order.idle()
            ticket.arrived = self._now()
            self.order.came(ticket, ticket.arrived, self.pace)

    def _known(self) -> list[Ticket]:
        """Tickets in place, and others of which a row waits."""
        waiting = {id(ticket): ticket for ticket in self._lines.tickets}
        return list((self._placed | waiting).values())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _pixels(self, kind: Kind, feeds: Tensors) -> int:
        """Of the picture that the model is given."""
        shape = feeds["image" if kind == "encode" else "latent"].shape
        return int(shape[-2] * shape[-1]) * (1 if kind == "encode" else self.card.latent.stride**2)

    async def _work(self, batch: list[Row], alone_at: int | None = None) -> None:
        """`alone_at`: how many batches had begun, this one included, if it had no company then."""
        began, alone = self._now(), alone_at is not None
        try:
            with self._traced(batch):
                results = await self._call(batch[0].kind, self._fill(batch), alone)
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
            seconds = self._now() - began
            if not alone or self._begun == alone_at:  # with company from the middle on it is neither
                self.pace.saw(batch[0].kind, batch[0].pixels, seconds, alone, batch[0].label)
            if self._observer is not None:
                self._observer(batch[0].kind, len(batch), seconds)

    def _traced(self, batch: list[Row]) -> AbstractContextManager[None]:
        if self._tracer is None:
            return nullcontext()
        return self._tracer.batch(batch[0].kind, [row.caller for row in batch])

    async def _one_by_one(self, batch: list[Row]) -> None:
        """A batch that the model cannot run, again in batches of one row: one that spoils it spoils its own alone."""
        for row in batch:
            if not row.result.done():
                await self._work([row])

    def _fail(self, batch: list[Row], error: Exception) -> None:
        for row in batch:
            if not row.result.done():
                row.result.set_exception(error)

    def _fill(self, batch: list[Row]) -> Tensors:
        """The rows as one batch, of `batch_size` rows for the denoiser."""
        missing = self._batch_size - len(batch) if batch[0].kind == "denoise" else 0
        rows = [*batch, *[batch[0]] * missing]
        return {name: _join([row.feeds[name] for row in rows]) for name in batch[0].feeds}

    async def _call(self, kind: Kind, feeds: Tensors, alone: bool) -> Tensors:
        ticket = Ticket(alone=alone and self._tells_alone)  # the backend's own waiting is ours, not the callers'
        match kind:
            case "encode":
                return await self._backend.encode(feeds["image"], feeds["prompt"], feeds["task"], ticket)
            case "denoise":
                conditioning = {name: feeds[name] for name in self.card.conditioning}
                latent, timestep, task = feeds["latent"], feeds["timestep"], feeds["task"]
                return {"output": await self._backend.denoise(latent, timestep, task, conditioning, ticket)}
            case "decode":
                return {"output": await self._backend.decode(feeds["latent"], ticket)}


def _join(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _closing() -> BackendUnavailable:
    return BackendUnavailable("the backend is closing")
