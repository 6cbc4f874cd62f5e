"""Who may come in: a bounded queue that counts work, not requests.

The unit is one denoising step of one member on 256 x 256 px. Encoding, decoding and the pictures' own pixels count in
the same unit, so that many large pictures with few steps fill the queue too (they fill memory).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from saccade.backends import Ticket
from saccade.backends.stepping import Stepping
from saccade.card import Card
from saccade.fit import Fit
from saccade.pipeline import Resolved
from saccade.tasks import TaskName

UNIT_PIXELS = 256 * 256
ENCODE_STEPS = 4
DECODE_STEPS = 1
UNITS_PER_MEGAPIXEL = 4.0
PIXEL_BYTES = 56
MEMBER_PIXEL_BYTES = 128
"""Memory that a request was measured to take at most: for each pixel of its pictures, and of each member's answer."""
Size = tuple[int, int]


Reason = Literal["full", "deadline"]
MOST_WAIT_S = 600.0


class Overloaded(Exception):
    """`reason`: the queue is full, or what is served before a request would make it miss its deadline."""

    def __init__(self, retry_after_s: float, reason: Reason = "full") -> None:
        told = {"full": "the queue is full", "deadline": "the deadline cannot be met"}
        super().__init__(told[reason])
        self.retry_after_s, self.reason = retry_after_s, reason


def work(card: Card, task: TaskName, options: Resolved, sizes: Sequence[Size], previews: int = 0) -> float:
    """Units that a request with pictures of `sizes` (H, W) takes; at most, where a mask's crop is not yet known."""
    height, width = padded(card, task, options, sizes[0])
    per_step = height * width / UNIT_PIXELS
    steps = ENCODE_STEPS + options.ensemble_size * (options.steps + DECODE_STEPS)
    steps += min(previews, options.steps) * DECODE_STEPS
    return per_step * steps + UNITS_PER_MEGAPIXEL * sum(h * w for h, w in sizes) / 1e6


def footprint(card: Card, task: TaskName, options: Resolved, rows: Sequence[Sequence[Size]]) -> int:
    """Bytes that a request takes at its height; `rows` has the sizes (H, W) of each question's pictures."""
    total = 0
    for sizes in rows:
        height, width = padded(card, task, options, sizes[0])
        total += MEMBER_PIXEL_BYTES * options.ensemble_size * height * width
        total += PIXEL_BYTES * sum(h * w for h, w in sizes)
    return total


def padded(card: Card, task: TaskName, options: Resolved, size: Size) -> Size:
    """The size (H, W) that the model will be given."""
    edge = options.processing_resolution
    seen = (edge, edge) if edge and task == "amodal" else size
    return Fit.plan(seen, edge, card.latent.multiple).padded


class Rate:
    """Units finished per second while there was work, recent work counting most; starts from a guess."""

    def __init__(self, guess: float = 20.0, memory_s: float = 30.0) -> None:
        self.units, self.seconds, self.memory_s = guess, 1.0, memory_s

    def add(self, units: float, seconds: float) -> None:
        keep = 0.5 ** (seconds / self.memory_s)
        self.units = self.units * keep + units
        self.seconds = self.seconds * keep + seconds

    @property
    def per_second(self) -> float:
        return max(self.units / self.seconds, 1e-3)


class Admission:
    """`pending` units of `requests` requests, of `limit` units at most."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self.pending, self.requests = 0.0, 0
        self.rate = Rate()
        self._busy_since = 0.0

    @contextmanager
    def admit(
        self, cost: float, *, lane: Stepping | None = None, ticket: Ticket | None = None, least_s: float | None = None
    ) -> Iterator[None]:
        """Hold `cost` units while the block runs, and the place of `ticket` in `lane`.

        Raises Overloaded if they do not fit, or if the ticket has a deadline that it would miss for what is served
        before it, although it takes but `least_s` itself (left out: all that is ahead of it). Alone a request always
        fits.
        """
        if self.requests and self.pending + cost > self.limit:
            raise Overloaded(self.wait_s(cost, lane))
        placed: AbstractContextManager[None] = nullcontext()
        if lane is not None and ticket is not None:
            if late_s := lane.late_s(ticket, ticket.remaining_s(lane.pace) if least_s is None else least_s):
                raise Overloaded(_bounded(late_s), "deadline")
            placed = lane.place(ticket)
        self._enter(cost)
        finished = False
        try:
            with placed:
                yield
            finished = True
        finally:
            self._leave(cost, finished)

    def wait_s(self, cost: float, lane: Stepping | None = None) -> float:
        """Estimated seconds until `cost` fits, 1 to 600: from the lane's backlog, or else from the rate so far."""
        surplus = self.pending + min(cost, self.limit) - self.limit
        if lane is not None and lane.backlog_s and self.pending:
            return _bounded(lane.backlog_s * surplus / self.pending)
        return _bounded(surplus / self.rate.per_second)

    def _enter(self, cost: float) -> None:
        if not self.requests:
            self._busy_since = self.clock()
        self.requests += 1
        self.pending += cost

    def _leave(self, cost: float, finished: bool) -> None:
        now = self.clock()
        self.rate.add(cost if finished else 0.0, now - self._busy_since)
        self._busy_since = now
        self.requests -= 1
        self.pending = self.pending - cost if self.requests else 0.0


def _bounded(seconds: float) -> float:
    return min(MOST_WAIT_S, max(1.0, seconds))
