"""Whose turn it is: orders of requests that wait for a batch. Pure objects: the clock's time and the pace are told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import accumulate, count

from saccade.backends.pace import Pace
from saccade.backends.ticket import Ticket

STRETCH = 3.0
PATIENCE = 32


class Order(ABC):
    """Decides which request goes next. All times are in seconds of one clock. What an order need not hear of does
    nothing."""

    in_turn = False
    """Whether every ticket of a `turn` gives one row, and then they begin again; else each gives what it has."""

    def idle(self) -> None:  # noqa: B027
        """Nobody is there: what is remembered of those that were is settled."""

    def came(self, ticket: Ticket, now: float, pace: Pace) -> None:  # noqa: B027
        """Once for every ticket, before anything else of it is asked."""

    @abstractmethod
    def rank(self, tickets: Sequence[Ticket], now: float, pace: Pace) -> list[Ticket]:
        """The order they would be served in. Changes nothing."""

    def turn(self, tickets: Sequence[Ticket], now: float, pace: Pace) -> list[Ticket]:
        """For every batch that is made: its first row is the first ticket's, and the others follow as long as their
        rows may join."""
        return self.rank(tickets, now, pace)

    def took(self, ticket: Ticket) -> None:  # noqa: B027
        """For every row that is taken."""

    def left(self, ticket: Ticket, now: float, pace: Pace) -> None:  # noqa: B027
        """A ticket is given back, done or not."""


class FirstCome(Order):
    """The request first whose row has waited longest."""

    def rank(self, tickets: Sequence[Ticket], now: float, pace: Pace) -> list[Ticket]:
        return sorted(tickets, key=lambda ticket: ticket.oldest_row)


class RoundRobin(Order):
    """One row each, in turn: a request of twenty members gets as much as a request of one."""

    in_turn = True

    def __init__(self) -> None:
        self._numbers = count()

    def came(self, ticket: Ticket, now: float, pace: Pace) -> None:
        ticket.turn = next(self._numbers)

    def rank(self, tickets: Sequence[Ticket], now: float, pace: Pace) -> list[Ticket]:
        return sorted(tickets, key=lambda ticket: ticket.turn)

    def took(self, ticket: Ticket) -> None:
        ticket.turn = next(self._numbers)


class _Soft(Order):
    """Gives a request without a deadline a soft one, by weighted fair queueing.

    A client's request starts, as far as the order is concerned, where the client's last one finished by its share of
    the machine, which is its weight among those of all clients that are not done by theirs: start = max(now, finish),
    finish = start + work / share. It is wanted by then, but not before `stretch` times what it takes alone. What is
    called off is taken back from the client's finish and from those of its requests that came after. Requests of nobody
    start now.
    """

    def __init__(self, stretch: float = STRETCH) -> None:
        self.stretch = stretch
        self._busy: dict[str, tuple[float, float]] = {}
        self._charged: dict[str, list[Ticket]] = {}

    def idle(self) -> None:
        """An idle machine owes nobody anything, whatever was charged for work that was then called off."""
        self._busy.clear()
        self._charged.clear()

    def came(self, ticket: Ticket, now: float, pace: Pace) -> None:
        work, alone = ticket.left_s(now, pace)
        ticket.starts, finish = now, now
        if ticket.client is not None:
            self._busy = {client: busy for client, busy in self._busy.items() if busy[0] > now}
            ticket.starts, _ = self._busy.get(ticket.client, (now, 0.0))
            others = sum(weight for client, (_, weight) in self._busy.items() if client != ticket.client)
            ticket.charged_s, ticket.share = work, 1 / (1 + others / ticket.weight)
            finish = ticket.starts + work / ticket.share
            ticket.ends = finish
            self._busy[ticket.client] = finish, ticket.weight
            before = [known for known in self._charged.get(ticket.client, ()) if known.ends > now]
            self._charged = {client: known for client, known in self._charged.items() if client in self._busy}
            self._charged[ticket.client] = [*before, ticket]
        ticket.soft = max(finish, ticket.starts + self.stretch * alone)

    def left(self, ticket: Ticket, now: float, pace: Pace) -> None:
        if ticket.client in self._busy:
            finish, weight = self._busy[ticket.client]
            called_off_s = max(0.0, ticket.charged_s - ticket.ran_s(pace)) / ticket.share
            still_charged_s = max(0.0, ticket.ends - max(now, ticket.starts))
            refund_s = min(called_off_s, still_charged_s)
            self._busy[ticket.client] = finish - refund_s, weight
            self._advance(ticket, refund_s, now)

    def _advance(self, gone: Ticket, by_s: float, now: float) -> None:
        """Those of its client that came after start so much earlier, but not before now."""
        charged = self._charged.get(gone.client or "", [])
        at = next((at for at, known in enumerate(charged) if known is gone), len(charged))
        for later in charged[at + 1 :]:
            earlier_s = min(by_s, max(0.0, later.starts - now))
            later.starts -= earlier_s
            later.ends -= earlier_s
            if later.soft is not None:
                later.soft -= earlier_s
        del charged[at : at + 1]


class ByDeadline(_Soft):
    """The earliest deadline first, met or not."""

    def rank(self, tickets: Sequence[Ticket], now: float, pace: Pace) -> list[Ticket]:
        return sorted(tickets, key=lambda ticket: (ticket.due, _age(ticket)))


class Dial(_Soft):
    """Those that can still be in time, by deadline; then the others, by what is left of them, least first, counted from
    when they start by their client's share.

    Who can be in time is found by Moore and Hodgson's rule: in the order of their deadlines each is given its work;
    where one would be late, the largest so far is given up. So as many as possible are in time. One that is late goes
    before them as long as it has less left than the first of them and makes none of them late.

    Nothing starves: of `patience` batches in a row one at least is headed by the oldest of those whose deadline, said
    or soft, is past. From its deadline on a request therefore waits for at most `patience` times the work of those that
    came before it, whatever comes after it.
    """

    def __init__(self, stretch: float = STRETCH, patience: int = PATIENCE) -> None:
        super().__init__(stretch)
        self.patience = patience
        self._passed = 0

    def rank(self, tickets: Sequence[Ticket], now: float, pace: Pace) -> list[Ticket]:
        left = {id(ticket): ticket.left_s(now, pace) for ticket in tickets}
        by_deadline = sorted(tickets, key=lambda ticket: (ticket.due, _age(ticket)))
        kept = _most_in_time(by_deadline, left, now)
        in_time = [ticket for ticket in by_deadline if id(ticket) in kept]
        late = [ticket for ticket in by_deadline if id(ticket) not in kept]
        late.sort(key=lambda ticket: (left[id(ticket)][1] + _owed(ticket, now), _age(ticket)))
        first = _harmless(in_time, late, left, now)
        return late[:first] + in_time + late[first:]

    def turn(self, tickets: Sequence[Ticket], now: float, pace: Pace) -> list[Ticket]:
        ranked = self.rank(tickets, now, pace)
        oldest = min((ticket for ticket in ranked if ticket.due < now), key=_age, default=ranked[0])
        if self._passed >= self.patience - 1 and ranked[0] is not oldest:
            ranked.remove(oldest)
            ranked.insert(0, oldest)
        self._passed = 0 if ranked[0] is oldest else self._passed + 1
        return ranked


Left = dict[int, tuple[float, float]]
"""Of each ticket, by its id: seconds of the machine, and seconds until its end if it had that to itself."""


def _most_in_time(by_deadline: Sequence[Ticket], left: Left, now: float) -> set[int]:
    """The ids of those that will be in time, as many as possible (Moore 1968)."""
    kept: list[tuple[float, float, int]] = []
    total = 0.0
    for ticket in by_deadline:
        work, alone = left[id(ticket)]
        if now + alone > ticket.due:
            continue
        heappush(kept, (-work, -ticket.due, id(ticket)))
        total += work
        if now + total > ticket.due:
            total += heappop(kept)[0]
    return {identity for _, _, identity in kept}


def _harmless(in_time: Sequence[Ticket], late: Sequence[Ticket], left: Left, now: float) -> int:
    """How many of `late` have less left than the first in time, and may go before all of them."""
    if not in_time:
        return 0
    ends = accumulate(left[id(ticket)][0] for ticket in in_time)
    slack = min(ticket.due - now - end for ticket, end in zip(in_time, ends, strict=True))
    head_s = left[id(in_time[0])][1]
    for number, ticket in enumerate(late):
        work, alone = left[id(ticket)]
        slack -= work
        if slack < 0 or alone >= head_s:
            return number
    return len(late)


def _owed(ticket: Ticket, now: float) -> float:
    """Seconds until it starts by its client's share; one that is content with what there is needs a step alone."""
    return 0.0 if ticket.elastic else max(0.0, ticket.starts - now)


def _age(ticket: Ticket) -> float:
    """Small for the old; one that has not come yet is the youngest."""
    return float("inf") if ticket.arrived is None else ticket.arrived
