"""One request's place in the house: whose it is, until when it is wanted, and what of it is still to be done."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from saccade.backends.pace import Kind, Pace

Like = tuple[Kind, int, int | None]
"""What rows of one cost share: their kind, their pixels, and of encodings the label."""

ELASTIC = 1 / 3
LAST = 2**62


@dataclass(frozen=True)
class Plan:
    """Rows of one question: `encode` pictures, `denoise` steps of all members, `decode` members; `pixels` of the
    picture that the model is given; `label` of the task, of the encodings."""

    pixels: int
    encode: int = 0
    denoise: int = 0
    decode: int = 0
    label: int | None = None


@dataclass
class Ticket:
    """One request's place in the house.

    `deadline`: when its answer is wanted, in seconds of the event loop's clock; None: as soon as possible. `client`:
    who shares among their requests what a client gets; None: nobody. A client of twice the `weight` gets twice as much.
    `elastic`: at its deadline it is content with what there is by then. `alone`: nothing else runs or waits, so that
    what it asks for now may have the whole machine. The order of the lane keeps `soft`, the
    deadline that it goes by where there is none, `starts`, `ends`, `charged_s`, `share`, `arrived`, `turn` and
    `oldest_row`.

    `expect` and `plan` say what is ahead; rows that ran or were withdrawn are taken from it, and rows that come
    unplanned are added. `remaining_s` is then known at any time.

    A backend that queues calls `enqueue`, then `start` and `finish`, or `drop` when the caller has left, of encodings
    with the label that was planned. `queue_s` grows only while something of the request waits and nothing of it runs.
    """

    deadline: float | None = None
    client: str | None = None
    weight: float = 1.0
    elastic: bool = False
    alone: bool = False
    soft: float | None = None
    starts: float = 0.0
    ends: float = 0.0
    charged_s: float = 0.0
    share: float = 1.0
    queue_s: float = 0.0
    waiting: int = 0
    running: int = 0
    at_once: int = 0
    arrived: float | None = None
    turn: int = LAST
    oldest_row: int = LAST
    _ahead: dict[Like, int] = field(default_factory=dict)
    _expected: deque[Plan] = field(default_factory=deque)
    _submitted: Counter[Like] = field(default_factory=Counter)
    _ran: Counter[Like] = field(default_factory=Counter)
    _since: float = field(default_factory=time.perf_counter)
    _costs: tuple[Pace, int, float, float] | None = None

    def expect(self, plan: Plan) -> None:
        """A question that will come: counted from now on, and replaced by the first `plan` that begins one."""
        self._expected.append(plan)
        self._add(plan, 1)

    def plan(
        self, *, pixels: int, encode: int = 0, denoise: int = 0, decode: int = 0, label: int | None = None
    ) -> None:
        """Rows that are ahead of this request now. What begins with an encoding takes the place of a question that was
        expected. Negative numbers take back what will not be done after all."""
        made = Plan(pixels, encode, denoise, decode, label)
        if self._expected and encode > 0:
            self._add(self._expected.popleft(), -1)
        self._add(made, 1)

    @property
    def due(self) -> float:
        """The deadline that the order goes by."""
        if self.deadline is not None:
            return self.deadline
        return float("inf") if self.soft is None else self.soft

    @property
    def ahead(self) -> Iterator[tuple[Kind, int, int]]:
        """Kind, pixels and number of the rows that are still to be done."""
        return ((kind, pixels, rows) for (kind, pixels, _), rows in self._ahead.items())

    def remaining_s(self, pace: Pace) -> float:
        """Seconds until everything is done if there were nobody else."""
        return self._cost(pace)[1]

    def work_s(self, pace: Pace) -> float:
        """Seconds of the machine that everything takes which is still to be done."""
        return self._cost(pace)[0]

    def _cost(self, pace: Pace) -> tuple[float, float]:
        """Both; every ticket is asked for every batch that is made, and few have changed since."""
        if self._costs is None or self._costs[0] is not pace or self._costs[1] != pace.version:
            ahead = [(*like, rows) for like, rows in self._ahead.items()]
            work = sum(rows * pace.row_s(kind, pixels, label) for kind, pixels, label, rows in ahead)
            alone = sum(pace.rows_s(kind, pixels, rows, self.at_once, label) for kind, pixels, label, rows in ahead)
            self._costs = pace, pace.version, work, alone
        return self._costs[2:]

    def ran_s(self, pace: Pace) -> float:
        """Seconds of the machine that the rows which ran have taken."""
        return sum(rows * pace.row_s(*like) for like, rows in self._ran.items())

    def left_s(self, now: float, pace: Pace) -> tuple[float, float]:
        """`work_s` and `remaining_s`, as far as an order need count on them: what is elastic takes no more than
        `ELASTIC` of the time until its deadline, but always the least that it can be answered with."""
        work, alone = self._cost(pace)
        if not self.elastic or self.deadline is None:
            return work, alone
        most = max(ELASTIC * (self.deadline - now), self._least_s(pace))
        return min(work, most), min(alone, most)

    def _least_s(self, pace: Pace) -> float:
        """A row of every kind and label that is ahead, for each question."""
        questions = max(1, len(self._expected))
        return sum(min(rows, questions) * pace.row_s(*like) for like, rows in self._ahead.items())

    def _add(self, plan: Plan, sign: int) -> None:
        self._costs = None
        self.at_once = max(0, self.at_once + sign * plan.decode)
        self._count(("encode", plan.pixels, plan.label), sign * plan.encode)
        self._count(("denoise", plan.pixels, None), sign * plan.denoise)
        self._count(("decode", plan.pixels, None), sign * plan.decode)

    def _count(self, like: Like, change: int) -> None:
        self._costs = None
        left = self._ahead.pop(like, 0) + change
        if left > 0:
            self._ahead[like] = left

    def _tick(self) -> None:
        now = time.perf_counter()
        if self.waiting and not self.running:
            self.queue_s += now - self._since
        self._since = now

    def enqueue(self, kind: Kind, pixels: int, label: int | None = None) -> None:
        like = kind, pixels, label
        self._tick()
        self.waiting += 1
        self._submitted[like] += 1
        unplanned = self._submitted[like] - self._ahead.get(like, 0)
        self._count(like, max(0, unplanned))

    def start(self) -> None:
        self._tick()
        self.waiting -= 1
        self.running += 1

    def finish(self, kind: Kind, pixels: int, label: int | None = None) -> None:
        like = kind, pixels, label
        self._tick()
        self.running -= 1
        self._ran[like] += 1
        self._ended(like)

    def drop(self, kind: Kind, pixels: int, label: int | None = None) -> None:
        self._tick()
        self.waiting -= 1
        self._ended((kind, pixels, label))

    def _ended(self, like: Like) -> None:
        self._submitted[like] -= 1
        self._count(like, -1)
