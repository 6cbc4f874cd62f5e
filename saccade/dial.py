"""How much to compute for an answer: from a model's measured quality, what work takes here and now, and what the caller
will spend, to steps and members. Nothing here waits or measures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from saccade.errors import InvalidInput
from saccade.tasks import TaskName

if TYPE_CHECKING:
    from saccade.card import Card, QualityPoint
    from saccade.pipeline import Options

Quality = Literal["fast", "balanced", "best"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)
METRICS: dict[str, int] = {"abs_rel": -1, "epe_px": -1, "iou": 1, "delta1": 1}
"""Those that are dialled by, the first that a card has of a task; 1 where more is better."""
LADDER = (1, 2, 5, 10)
"""Members that are tried of a model without a measured curve."""
MOST_MEMBERS = 10
BALANCED = 0.5
MARGIN = 0.85
"""Share of a budget that a plan may fill: what is cut off has been computed in vain."""
LONGEST_BUDGET_MS = 600_000


@dataclass(frozen=True)
class Limits:
    """The most that a server computes for one answer."""

    steps: int = 1_000_000
    members: int = 1_000_000


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Point:
    """One setting of the dial. `gain`: how good the answers were, more is better; `told`: the same for people."""

    steps: int
    members: int
    gain: float = 0.0
    told: str = ""

    @property
    def work(self) -> int:
        """Rows of the denoiser and the decoder."""
        return self.members * (self.steps + 1)


@dataclass(frozen=True)
class Forecast:
    """Seconds that an answer will take: what is ordered before it (`wait_s`), of each question its encoding, one row of
    a step, one decoding, merging a member, and what merging takes besides (`settle_s`); and reading and writing it all
    (`finish_s`). `rows` members are computed side by side; up to `lone_rows` share one batch, which takes
    `lone_step_s`. A decoding by itself takes `lone_decode_s`."""

    wait_s: float
    encode_s: float
    step_s: float
    decode_s: float
    merge_s: float = 0.0
    settle_s: float = 0.0
    finish_s: float = 0.0
    rows: int = 1
    lone_rows: int = 0
    lone_step_s: float = 0.0
    lone_decode_s: float = 0.0
    questions: int = 1

    def seconds(self, steps: int, members: int) -> float:
        round_s = -(-members // self.rows) * self.rows * self.step_s if members > self.lone_rows else self.lone_step_s
        work_s = self.encode_s + steps * round_s + max(members * self.decode_s, self.lone_decode_s)
        return self.wait_s + self.questions * (work_s + members * self.merge_s + self.settle_s) + self.finish_s

    def reserve_s(self, members: int) -> float:
        """Of one question, from its last step to its merged answer: a batch that runs on, decodings, merging."""
        return self.rows * (self.step_s + self.decode_s) + members * self.merge_s + self.settle_s


@dataclass(frozen=True)
class Plan:
    """What was chosen and `why`; and, once it is answered, what came of it.

    `complete`: the time did not cut it off. `members` were merged, each after `steps_taken` of `steps` at least.
    `uncertainty`: of the merged answer, where a target was set (see `uncertainty_of`).
    """

    steps: int
    ensemble_size: int
    why: str
    budget_ms: int | None = None
    predicted_ms: float | None = None
    target_uncertainty: float | None = None
    complete: bool = True
    members: int = 0
    steps_taken: int = 0
    uncertainty: float | None = None


def dialled(options: Options) -> bool:
    """Whether the caller leaves something to the dial."""
    return any(value is not None for value in (options.budget_ms, options.quality, options.target_uncertainty))


def check(options: Options) -> None:
    """Raise InvalidInput for what contradicts itself."""
    budget, target = options.budget_ms, options.target_uncertainty
    if budget is not None and not 1 <= budget <= LONGEST_BUDGET_MS:
        raise InvalidInput(f"budget_ms must be 1 to {LONGEST_BUDGET_MS}", param="budget_ms")
    if target is not None and not (math.isfinite(target) and target > 0):
        raise InvalidInput("target_uncertainty must be more than 0", param="target_uncertainty")
    if options.quality is not None and options.quality not in QUALITIES:
        raise InvalidInput(f"quality must be one of {', '.join(QUALITIES)}", param="quality")
    if options.quality is not None and (options.steps is not None or options.ensemble_size is not None):
        raise InvalidInput("quality chooses steps and ensemble_size: leave them out, or quality", param="quality")
    if options.quality is not None and target is not None:
        told = "quality and target_uncertainty both choose the members: leave one out"
        raise InvalidInput(told, param="target_uncertainty")
    if target is not None and options.ensemble_size is not None and options.ensemble_size < 2:
        told = "target_uncertainty needs members to differ: ask for ensemble_size >= 2, or leave it out"
        raise InvalidInput(told, param="target_uncertainty")


def unhurried(options: Options, card: Card, task: TaskName, limits: Limits = NO_LIMITS) -> Point:
    """Steps and members without a budget; with one the least that may come of it. Raises InvalidInput as `check`."""
    check(options)
    points = candidates(options, card, task, limits)
    if options.budget_ms is not None:
        return min(points, key=lambda point: point.work)
    return points[-1]


def plan(options: Options, card: Card, task: TaskName, forecast: Forecast | None, limits: Limits = NO_LIMITS) -> Plan:
    """What to do about options that are `dialled`; with a budget it takes a forecast. Raises InvalidInput."""
    check(options)
    budget, target = options.budget_ms, options.target_uncertainty
    points = candidates(options, card, task, limits)
    if budget is None or forecast is None:
        return Plan(points[-1].steps, points[-1].members, _unhurried_why(options, points[-1]), None, None, target)
    chosen, why = _within(points, forecast, budget, options)
    predicted_ms = round(forecast.seconds(chosen.steps, chosen.members) * 1e3, 1)
    return Plan(chosen.steps, chosen.members, why, budget, predicted_ms, target)


def candidates(options: Options, card: Card, task: TaskName, limits: Limits = NO_LIMITS) -> list[Point]:
    """The settings to choose from; the last is what is taken without a hurry."""
    if card.noise.start == "zeros":  # its members are all the same
        limits = replace(limits, members=1)
    defaults = card.tasks[task].defaults
    steps, members = options.steps, options.ensemble_size
    measured = curve(card, task, limits)
    if options.target_uncertainty is not None:
        most = members or min(limits.members, max((p.members for p in measured), default=MOST_MEMBERS))
        if most < 2:
            raise InvalidInput("here are no members that differ to reach a target with", param="target_uncertainty")
        return [Point(steps or defaults.steps, most)]
    if (options.quality is None and options.budget_ms is None) or _asked(options):
        return [Point(steps or defaults.steps, members or defaults.ensemble_size)]
    points = measured or _ladder(card, task, limits)
    least = 2 if options.output_uncertainty else 1
    free = [p for p in points if steps in (None, p.steps) and members in (None, p.members) and p.members >= least]
    if not free:
        return [Point(steps or defaults.steps, members or max(least, defaults.ensemble_size))]
    top = _of_quality(options.quality or "best", free, card, task, bool(measured))
    return [*(p for p in free if p != top and p.work <= top.work), top]


def curve(card: Card, task: TaskName, limits: Limits = NO_LIMITS) -> list[Point]:
    """The measured points of the task, the least work first; none where fewer than two were measured."""
    of_task = [q for q in card.quality if q.task == task]
    metric = next((name for name in METRICS if any(q.metric == name for q in of_task)), None)
    if metric is None:
        return []
    found = _largest_set([q for q in of_task if q.metric == metric])
    points = [
        Point(q.steps, q.ensemble_size, METRICS[metric] * q.value, f"{metric} {q.value:g}")
        for q in found
        if q.steps <= limits.steps and q.ensemble_size <= limits.members
    ]
    return sorted(points, key=lambda point: (point.work, point.steps)) if len(found) > 1 else []


def uncertainty_of(spread: float, members: int) -> float:
    """Of the merged answer, from the mean spread of its members, which does not shrink with their number."""
    return spread / math.sqrt(members)


def _largest_set(points: list[QualityPoint]) -> list[QualityPoint]:
    """Points measured on the same pictures: on the most, of equals on those named first."""
    pictures = {point.set: point.pictures for point in reversed(points)}
    chosen = max(reversed(pictures), key=lambda name: pictures[name])
    return [point for point in points if point.set == chosen]


def _ladder(card: Card, task: TaskName, limits: Limits) -> list[Point]:
    """Where nothing was measured: the card's steps first, then members. The gain is the rung."""
    steps = min(card.tasks[task].defaults.steps, limits.steps)
    rungs = dict.fromkeys([(1, 1), *((steps, members) for members in LADDER if members <= limits.members)])
    return [Point(steps, members, gain) for gain, (steps, members) in enumerate(rungs)]


def _of_quality(quality: Quality, points: list[Point], card: Card, task: TaskName, measured: bool) -> Point:
    """`fast`: the least work; `best`: the most gain; `balanced`: the least work for half of what best gains over fast,
    or, unmeasured, what is nearest to the card's defaults and no more."""
    fast, best = min(points, key=lambda p: p.work), _best(points)
    if quality == "fast":
        return fast
    if quality == "best":
        return best
    if not measured:
        defaults = card.tasks[task].defaults
        most = Point(defaults.steps, defaults.ensemble_size).work
        return max((p for p in points if p.work <= most), key=lambda p: p.work, default=fast)
    enough = fast.gain + BALANCED * (best.gain - fast.gain)
    return min((p for p in points if p.gain >= enough), key=lambda p: p.work)


def _best(points: Iterable[Point]) -> Point:
    return max(points, key=lambda p: (p.gain, -p.work))


def _asked(options: Options) -> bool:
    return options.steps is not None and options.ensemble_size is not None


def _within(points: list[Point], forecast: Forecast, budget_ms: int, options: Options) -> tuple[Point, str]:
    def seconds(point: Point) -> float:
        return forecast.seconds(point.steps, point.members)

    if len(points) == 1:
        chosen = options.quality is not None or options.target_uncertainty is not None
        why = _unhurried_why(options, points[0]) if chosen else "as asked"
        return points[0], f"{why}, for {budget_ms} ms at most"
    fitting = [p for p in points if seconds(p) * 1e3 <= MARGIN * budget_ms]
    if not fitting:
        least = min(points, key=seconds)
        return least, f"nothing fits into {budget_ms} ms now: the least there is, as far as the time goes"
    best = _best(fitting)
    told = f", {best.told}" if best.told else ""
    wait = f" after a wait of {forecast.wait_s * 1e3:.0f} ms" if forecast.wait_s > 0 else ""
    return best, f"the best of {len(fitting)} settings that fit into {budget_ms} ms{wait}{told}"


def _unhurried_why(options: Options, point: Point) -> str:
    if options.quality is None:
        return f"up to {point.members} members until the uncertainty is at most {options.target_uncertainty:g}"
    return f"quality {options.quality}: " + (point.told or "no curve was measured")
