"""From a budget to a plan, here and now: forecasts from the lane's pace, from what waits in it, and from what reading,
merging and writing were seen to take."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from saccade import backends, dial, sequence
from saccade.anytime import Spend
from saccade.backends import Ticket
from saccade.backends.pace import Pace
from saccade.card import Card
from saccade.dial import Forecast, Limits, Plan
from saccade.pipeline import Answer, Options, Resolved
from saccade.tasks import TaskName

SECONDS_PER_MEGAPIXEL = 0.1
"""Of anything that nobody has seen yet."""
KEPT = 15
LEAST_MEGAPIXELS = 0.05
"""Stands for what takes its time however small a picture is."""
MOST_SLACK_S = 0.5
CARRIED_S = 0.004
"""Between threads, and over the wire."""


@runtime_checkable
class Lane(Protocol):
    """A backend that packs steps into batches, and knows how long they take and what comes before whom."""

    @property
    def pace(self) -> Pace: ...

    @property
    def backlog_s(self) -> float: ...

    def before_s(self, ticket: Ticket) -> float: ...


@dataclass(frozen=True)
class Shape:
    """Of one question: pixels of the picture that the model is given, and of the picture that came."""

    model_px: int
    source_px: int


class Learnt:
    """Seconds per megapixel: most of the last ones took no longer. The first of them is a guess."""

    def __init__(self) -> None:
        self._rates = deque([SECONDS_PER_MEGAPIXEL], maxlen=KEPT)
        self.rate = SECONDS_PER_MEGAPIXEL

    def saw(self, megapixels: float, seconds: float) -> None:
        self._rates.append(seconds / (megapixels + LEAST_MEGAPIXELS))
        ordered = sorted(self._rates)
        self.rate = ordered[(3 * len(ordered) - 1) // 4]

    def seconds(self, megapixels: float) -> float:
        return self.rate * (megapixels + LEAST_MEGAPIXELS)


@dataclass
class Planner:
    """Plans requests, and learns from their answers. `limits`: the most that may be chosen."""

    limits: Limits = dial.NO_LIMITS
    _late: deque[float] = field(default_factory=lambda: deque([0.0], maxlen=KEPT))
    _learnt: defaultdict[str, Learnt] = field(default_factory=lambda: defaultdict(Learnt))

    def spend(
        self,
        lane: object,
        card: Card,
        task: TaskName,
        options: Options,
        resolved: Resolved,
        shapes: Sequence[Shape],
        *,
        arrived: float,
        longest_s: float = float("inf"),
        written_as: str = "",
        steadily: bool = False,
        decoded: bool = False,
    ) -> tuple[Resolved, Spend | None]:
        """What is to be computed of a request that came at `arrived` (event loop's seconds), and how far; None: all of
        it, come what may.

        It asks as many questions as it has shapes, and `steadily` the flow between each two as well. `longest_s`: the
        most that any request may take. `written_as`: the file that the answer becomes. `decoded`: its pictures need not
        be read any more. Raises InvalidInput.
        """
        if not dial.dialled(options):
            return resolved, None
        slack_s = self.slack_s
        write_s = self.seconds(f"write {written_as}", sum(shape.source_px for shape in shapes)) if written_as else 0.0
        reserve_s = write_s + CARRIED_S + slack_s
        deadline, forecast = None, None
        if options.budget_ms is not None:
            deadline = arrived + min(options.budget_ms / 1e3, longest_s)
            forecast = self.forecast(lane, card, task, resolved, shapes, deadline, decoded)
            gone_s = asyncio.get_running_loop().time() - arrived
            flows_s = self._flows_s(lane, card, resolved, shapes, deadline) if steadily else 0.0
            forecast = replace(forecast, finish_s=forecast.finish_s + gone_s + reserve_s + flows_s)
        plan = dial.plan(options, card, task, forecast, self.limits)
        chosen = replace(resolved, steps=plan.steps, ensemble_size=plan.ensemble_size)
        chosen.check(card, task)
        if deadline is None or forecast is None:
            return chosen, Spend(plan)
        return chosen, Spend(plan, deadline - reserve_s, forecast.reserve_s(plan.ensemble_size), slack_s)

    def ticket(
        self,
        card: Card,
        task: TaskName,
        resolved: Resolved,
        spend: Spend | None,
        shapes: Sequence[Shape],
        client: str | None = None,
        weight: float = 1.0,
    ) -> Ticket:
        """The place in the lane of a request, with all that it will ask."""
        deadline = None if spend is None else spend.deadline
        made = Ticket(deadline, client, weight, elastic=deadline is not None)
        label, runs = card.tasks[task].label, len(card.tasks[task].labels)
        steps, members = resolved.steps, resolved.ensemble_size
        for shape in shapes:
            made.expect(backends.Plan(shape.model_px, 1, members * steps * runs, members * runs, label))
        return made

    def forecast(
        self,
        lane: object,
        card: Card,
        task: TaskName,
        resolved: Resolved,
        shapes: Sequence[Shape],
        deadline: float,
        decoded: bool = False,
    ) -> Forecast:
        """Of all questions: the largest one's figures, as often as there are shapes."""
        largest = max(shapes, key=lambda shape: shape.model_px)
        pixels, count, label = largest.model_px, len(shapes), card.tasks[task].label
        pace, wait_s, alone = Pace(), 0.0, True
        if isinstance(lane, Lane):
            pace, wait_s, alone = lane.pace, self._wait_s(lane, pixels, label, deadline), not lane.backlog_s
        runs, at_once = len(card.tasks[task].labels), pace.batch_size * pace.concurrency
        merging, rows = _merging(resolved), max(1, at_once // runs)
        read_s = 0.0 if decoded else self.seconds(f"read {task}", sum(shape.source_px for shape in shapes))
        return Forecast(
            wait_s=wait_s,
            encode_s=pace.batch_s("encode", pixels, label, alone=alone),
            step_s=pace.batch_s("denoise", pixels) * math.ceil(rows * runs / at_once) / rows,
            decode_s=pace.batch_s("decode", pixels) * runs / pace.concurrency,
            merge_s=self._learnt[merging].rate * pixels / 1e6,
            settle_s=self.seconds(merging, largest.source_px),
            finish_s=read_s,
            rows=rows,
            lone_rows=pace.batch_size // runs,
            lone_step_s=pace.batch_s("denoise", pixels, alone=alone),
            lone_decode_s=pace.batch_s("decode", pixels, alone=alone),
            questions=count,
        )

    def _flows_s(self, lane: object, card: Card, resolved: Resolved, shapes: Sequence[Shape], deadline: float) -> float:
        """What the flows between the pictures take that steady their depths."""
        how = sequence.guide(card, resolved)
        forecast = self.forecast(lane, card, "flow", how, shapes, deadline, decoded=True)
        return replace(forecast, wait_s=0.0, questions=forecast.questions - 1).seconds(how.steps, 1)

    def learn(self, answer: Answer, shape: Shape) -> None:
        """From an answer's phases."""
        if (seconds := answer.timings_ms.get("ensemble", 0.0) / 1e3) > 0:
            # What `forecast` asks for: a share of each member and one of the picture.
            pixels = answer.options.ensemble_size * shape.model_px + shape.source_px
            self.saw(_merging(answer.options), pixels, seconds)

    def cut(self, spend: Spend, done: Plan, late_s: float) -> None:
        """An answer with a budget came so late after it, or (below 0) so early. Those that were cut off say how much
        slack there should be; others that are in time say that none was needed, so that hard times are forgotten."""
        if not done.complete and (done.members, done.steps_taken) != (1, 1):  # those wait for their one step
            self._late.append(min(MOST_SLACK_S, max(0.0, late_s + spend.slack_s)))
        elif late_s <= 0:
            self._late.append(0.0)

    @property
    def slack_s(self) -> float:
        """What to keep free besides, so that most of those that were cut off lately would have been in time."""
        return sorted(self._late)[(3 * len(self._late) - 1) // 4]

    def saw(self, kind: str, pixels: int, seconds: float) -> None:
        self._learnt[kind].saw(pixels / 1e6, seconds)

    def seconds(self, kind: str, pixels: int) -> float:
        return self._learnt[kind].seconds(pixels / 1e6)

    def _wait_s(self, lane: Lane, pixels: int, label: int, deadline: float) -> float:
        probe = Ticket(deadline=deadline)
        probe.plan(pixels=pixels, encode=1, denoise=1, decode=1, label=label)
        return lane.before_s(probe)


def _merging(options: Resolved) -> str:
    return f"merge {options.reduction}"
