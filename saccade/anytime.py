"""Answers that may be cut short: members in order, each decoded as soon as it is refined, so that something is finished
whenever the time is up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from saccade.backends import Array, Conditioning, Labels
from saccade.dial import Plan, uncertainty_of

if TYPE_CHECKING:
    from saccade.pipeline import Answer, Resolved

SKETCH_PX = 64
SLACK = 1.5
"""A sketch whose uncertainty is within this factor of the target is looked at in full."""


@dataclass(frozen=True)
class Spend:
    """How far an answer may go: `plan`; and until when, `deadline` in seconds of the event loop's clock, of which the
    last `reserve_s` are for what comes after the last step. `slack_s`: kept free besides, before the deadline."""

    plan: Plan
    deadline: float | None = None
    reserve_s: float = 0.0
    slack_s: float = 0.0

    def share(self, now: float, questions: int) -> Spend:
        """Of this, what the first of so many questions may take that are still to be answered one after another."""
        if self.deadline is None or questions < 2:
            return self
        return replace(self, deadline=now + max(0.0, self.deadline - now) / questions)


class Run(Protocol):
    """What a pipeline's run does for one request."""

    @property
    def options(self) -> Resolved: ...
    @property
    def labels(self) -> Labels: ...

    async def refine(self, member: int, conditioning: Conditioning, sight: Sight | None = None) -> Array:
        """One member's estimate; earlier, if its sight says `enough`."""
        ...

    async def decode(self, z: Array) -> Array: ...
    def estimate(self, z: Array, output: Array, t: Labels) -> Array: ...
    def uncertainty(self, pictures: Array, longest: int | None = None) -> float: ...
    def merge(self, pictures: Array, members: int) -> Answer: ...
    def ahead(self, denoise: int, decode: int) -> None: ...
    def spent(self, denoise_s: float, decode_s: float) -> None: ...


@dataclass
class Sight:
    """What one member has come to: of `asked` steps it has `taken` so many, the last gave the output for (z, t), from
    which its estimate follows."""

    asked: int = 0
    taken: int = 0
    enough: bool = False
    decoding: bool = False
    seen: tuple[Array, Array, Labels] | None = None

    def see(self, taken: int, z: Array, output: Array, t: Labels) -> None:
        self.taken, self.seen = taken, (z, output, t)


@dataclass
class Anytime:
    """One request's members, `together` at a time.

    When the time is up: the members that are finished, or have been refined and are being decoded, are the answer; if
    there are none, what those under way take for the clean latent; if none has taken a step, one takes one.
    """

    run: Run
    conditioning: Conditioning
    spend: Spend
    together: int = 1
    pictures: dict[int, Array] = field(default_factory=dict)
    _sights: dict[int, Sight] = field(default_factory=dict)
    _working: dict[asyncio.Task[None], int] = field(default_factory=dict)
    _planned: dict[str, int] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=lambda: {"denoise": 0.0, "decode": 0.0})
    _cut: bool = False
    _looked: int = 1
    _uncertainty: float | None = None

    async def collect(self) -> None:
        """Until there is an answer. Raises what the backend does; leaving early withdraws all of it."""
        waiting = deque(range(self.run.options.ensemble_size))
        runs, steps = len(self.run.labels), self.run.options.steps
        self._planned = {"denoise": len(waiting) * steps * runs, "decode": len(waiting) * runs}
        with self._alarm() as rang:
            try:
                await self._collect(waiting, rang)
            finally:
                self._call_off(self._working)
                self._take_back(0, 0)

    def conclude(self) -> tuple[Answer, Plan]:
        """The answer, and the plan with what came of it."""
        members = sorted(self.pictures)
        joined = np.concatenate([self.pictures[member] for member in members])
        plan, count = self.spend.plan, len(members)
        taken = min(self._sights[member].taken for member in members)
        if plan.target_uncertainty is not None and self._uncertainty is None and count > 1:
            self._uncertainty = uncertainty_of(self.run.uncertainty(joined), count)
        reached = self._uncertainty is not None and self._uncertainty <= (plan.target_uncertainty or 0)
        whole = taken == self.run.options.steps and (reached or count == self.run.options.ensemble_size)
        done = replace(plan, complete=whole, members=count, steps_taken=taken, uncertainty=self._uncertainty)
        self.run.spent(self._seconds["denoise"], self._seconds["decode"])
        return self.run.merge(joined, count), done

    async def _collect(self, waiting: deque[int], rang: asyncio.Future[None]) -> None:
        while waiting or self._working:
            if rang.done() and not self._cut:
                self._cut = True
                self._stop(waiting)
            while waiting and len(self._working) < self.together:
                self._start(waiting.popleft())
            if not self._working:
                return
            await asyncio.wait([*self._working, *([] if self._cut else [rang])], return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self._working if task.done()]:
                if self._working.pop(task, None) is None:
                    continue
                task.result()
                if not self._cut and await self._reached():
                    waiting.clear()
                    self._call_off(self._working)

    @contextmanager
    def _alarm(self) -> Iterator[asyncio.Future[None]]:
        """Done when the last step ought to end."""
        loop = asyncio.get_running_loop()
        rang: asyncio.Future[None] = loop.create_future()
        deadline = self.spend.deadline
        if deadline is None:
            yield rang
            return
        at = deadline - self.spend.reserve_s
        if at <= loop.time():
            rang.set_result(None)
        handle = loop.call_at(at, lambda: None if rang.done() else rang.set_result(None))
        try:
            yield rang
        finally:
            handle.cancel()

    def _start(self, member: int, estimate: Array | None = None) -> None:
        sight = self._sights.setdefault(member, Sight())
        sight.enough = self._cut
        work = self._member(member, sight) if estimate is None else self._decode(member, sight, estimate)
        self._working[asyncio.get_running_loop().create_task(work)] = member

    async def _member(self, member: int, sight: Sight) -> None:
        with self._timed("denoise"):
            z = await self.run.refine(member, self.conditioning, sight)
        await self._decode(member, sight, z)

    async def _decode(self, member: int, sight: Sight, z: Array) -> None:
        sight.decoding = True
        with self._timed("decode"):
            self.pictures[member] = await self.run.decode(z)

    def _stop(self, waiting: deque[int]) -> None:
        """The time is up: keep what is all but finished, else what those under way have, else one step of one."""
        finishing = {task for task, member in self._working.items() if self._sights[member].decoding}
        if self.pictures or finishing:
            waiting.clear()
            self._call_off(self._working.keys() - finishing)
            return self._take_back(0, 0)
        seen = {member: self._sights[member].seen for member in self._working.values()}
        estimates = {member: self.run.estimate(*sight) for member, sight in seen.items() if sight is not None}
        if estimates:
            waiting.clear()
            self._call_off(self._working)
            self._take_back(0, sum(map(len, estimates.values())))
            for member, estimate in estimates.items():
                self._start(member, estimate)
            return
        runs = len(self.run.labels)
        waiting.clear()
        if not self._working:
            waiting.append(0)
            return self._take_back(runs, runs)
        first = min(self._working, key=lambda task: self._working[task])
        sight = self._sights[self._working[first]]
        sight.enough = True
        self._call_off(self._working.keys() - {first})
        self._take_back(0 if sight.asked else runs, runs)

    def _call_off(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        for task in list(tasks):
            task.cancel()
            task.add_done_callback(_unheard)
            self._working.pop(task, None)

    def _take_back(self, denoise: int, decode: int) -> None:
        """Rows that have not been asked for will not be, but for so many."""
        runs, sights = len(self.run.labels), self._sights.values()
        asked = {"denoise": sum(s.asked for s in sights) * runs, "decode": sum(s.decoding for s in sights) * runs}
        keep = {"denoise": asked["denoise"] + denoise, "decode": asked["decode"] + decode}
        self.run.ahead(**{kind: min(0, keep[kind] - self._planned[kind]) for kind in keep})
        self._planned = {kind: min(keep[kind], self._planned[kind]) for kind in keep}

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        now = asyncio.get_running_loop().time
        began = now()
        try:
            yield
        finally:
            self._seconds[kind] += now() - began

    async def _reached(self) -> bool:
        """Whether the members 0, 1, ... that are there without a gap are sure enough; the others are then left out."""
        target = self.spend.plan.target_uncertainty
        if target is None:
            return False
        known = next(member for member in range(len(self._sights) + 1) if member not in self.pictures)
        for members in range(max(2, self._looked + 1), known + 1):
            self._looked = members
            joined = np.concatenate([self.pictures[member] for member in range(members)])
            self._uncertainty = await asyncio.to_thread(self._measured, joined, members, target)
            if self._uncertainty is not None:
                self.pictures = {member: self.pictures[member] for member in range(members)}
                return True
        return False

    def _measured(self, pictures: Array, members: int, target: float) -> float | None:
        """The uncertainty, if it is low enough. A sketch goes first: merging all pixels may cost more than a member."""
        if uncertainty_of(self.run.uncertainty(pictures, SKETCH_PX), members) > SLACK * target:
            return None
        found = uncertainty_of(self.run.uncertainty(pictures), members)
        return found if found <= target else None


def _unheard(task: asyncio.Task[None]) -> None:
    """What a member that was called off fails with is nobody's business."""
    if not task.cancelled():
        task.exception()
