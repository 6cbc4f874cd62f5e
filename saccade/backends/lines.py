"""Rows that wait for a batch, in a line for each request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from saccade.backends import Ticket
from saccade.backends.pace import Kind

Tensors = Mapping[str, NDArray[Any]]


@dataclass(eq=False)
class Row:
    """One sample of one call, on its way through the lane."""

    kind: Kind
    feeds: Tensors
    ticket: Ticket
    result: asyncio.Future[Tensors]
    number: int
    pixels: int
    caller: object = None
    batch: list[Row] = field(default_factory=list)
    work: asyncio.Task[None] | None = None

    @cached_property
    def label(self) -> int | None:
        """Of an encoding: what it costs depends on it."""
        return int(self.feeds["task"][0]) if self.kind == "encode" else None

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Rows of one key may share a batch: the same graph at the same sizes."""
        return self.kind, *((name, value.shape) for name, value in self.feeds.items())


class Lines:
    """All rows that wait; the oldest of a ticket is the first of its line."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Row]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Row]:
        return (row for line in self._lines.values() for row in line)

    @property
    def tickets(self) -> list[Ticket]:
        """Those of which a row waits."""
        return [line[0].ticket for line in self._lines.values()]

    def add(self, row: Row) -> None:
        self._lines.setdefault(id(row.ticket), deque()).append(row)
        row.ticket.enqueue(row.kind, row.pixels, row.label)

    def take(self, row: Row) -> None:
        """Out of its line, to be run."""
        line = self._lines[id(row.ticket)]
        line.remove(row)
        if not line:
            del self._lines[id(row.ticket)]

    def withdraw(self, row: Row) -> None:
        """Out of its line, if it is still there: nobody wants it any more."""
        if row in self._lines.get(id(row.ticket), ()):
            self.take(row)
            row.ticket.drop(row.kind, row.pixels, row.label)

    def ready(self, steps_only: bool) -> list[Ticket]:
        """Those of which a row may run; they are told the number of their oldest row."""
        found = [ticket for ticket in self.tickets if self.first(ticket, None, steps_only)]
        for ticket in found:
            ticket.oldest_row = self._lines[id(ticket)][0].number
        return found

    def first(self, ticket: Ticket, head: Row | None, steps_only: bool) -> Row | None:
        """The oldest row of the ticket that somebody waits for and that may join `head`."""
        for row in self._lines.get(id(ticket), ()):
            may_run = not row.result.cancelled() and (row.kind == "denoise" or not steps_only)
            if may_run and (head is None or row.key == head.key):
                return row
        return None

    @property
    def steps_wait(self) -> bool:
        """Whether a step waits that somebody wants."""
        return any(row.kind == "denoise" and not row.result.cancelled() for row in self)
