"""From load and experience to a plan: what waits, what was seen to take long, and who may spend how much."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from saccade.anytime import Spend
from saccade.backends import Ticket
from saccade.backends.pace import Pace
from saccade.card import Card
from saccade.dial import Forecast, Limits, Plan
from saccade.pipeline import Options, Resolved
from saccade.planner import Learnt, Planner, Shape
from tests.core.test_dial import card

PIXELS = 64 * 64
SMALL = Shape(PIXELS, PIXELS)


def paced() -> Pace:
    """Ten milliseconds each."""
    pace = Pace()
    for kind in ("encode", "denoise", "decode"):
        pace.saw(kind, PIXELS, 0.010)  # type: ignore[arg-type]
    return pace


@dataclass
class Lane:
    """Work of `busy_s` comes before everybody."""

    busy_s: float = 0.0
    pace: Pace = field(default_factory=paced)

    @property
    def backlog_s(self) -> float:
        return self.busy_s

    def before_s(self, ticket: Ticket) -> float:
        assert ticket.deadline is not None
        return self.busy_s


def spend(planner: Planner, lane: object, shapes: list[Shape], of: Card | None = None, *, ago_s: float = 0.0,
          longest_s: float = float("inf"), **options: Any) -> tuple[Resolved, Spend | None, float]:  # fmt: skip
    """The plan, and when it was asked for."""

    async def within() -> tuple[Resolved, Spend | None, float]:
        wanted, known = Options(**options), of or card()
        now = asyncio.get_running_loop().time()
        resolved = wanted.resolve(known, "depth", planner.limits)
        made = planner.spend(
            lane, known, "depth", wanted, resolved, shapes, arrived=now - ago_s, longest_s=longest_s, written_as="x"
        )
        return *made, now

    return asyncio.run(within())


def members(*given: Any, **options: Any) -> int:
    return spend(*given, **options)[0].ensemble_size


def test_what_needs_no_plan_gets_none() -> None:
    resolved, spent, _ = spend(Planner(), Lane(), [SMALL], steps=3)
    assert (resolved.steps, spent) == (3, None)


def test_load_and_time_gone_by_leave_less() -> None:
    planner = Planner()
    assert members(planner, Lane(), [SMALL], budget_ms=2000) == 10
    assert members(planner, Lane(busy_s=1.6), [SMALL], budget_ms=2000) == 2
    assert members(planner, Lane(), [SMALL], budget_ms=2000, ago_s=1.65) == 1
    assert members(planner, Lane(), [SMALL] * 40, budget_ms=2000) == 1


def test_the_deadline_is_the_budget_after_the_coming_or_the_servers_patience() -> None:
    _, spent, now = spend(Planner(), Lane(), [SMALL], budget_ms=5000, ago_s=1.0)
    assert spent is not None
    assert spent.deadline is not None
    assert 3.9 < spent.deadline - now < 4.0  # less what carrying and writing take
    _, spent, now = spend(Planner(), Lane(), [SMALL], budget_ms=5000, longest_s=2.0)
    assert spent is not None
    assert spent.deadline is not None
    assert spent.deadline - now < 2.0


def test_who_is_alone_is_forecast_with_the_whole_machine() -> None:
    pace = Pace(batch_size=1, concurrency=2)
    for kind in ("encode", "denoise", "decode"):
        pace.saw(kind, PIXELS, 0.010)  # type: ignore[arg-type]
        pace.saw(kind, PIXELS, 0.006, alone=True)  # type: ignore[arg-type]

    def forecast(busy_s: float) -> Forecast:
        known = card()
        return Planner().forecast(Lane(busy_s, pace), known, "depth", Options().resolve(known, "depth"), [SMALL], 60.0)

    def step_s(of: Forecast, members: int) -> float:
        return of.seconds(6, members) - of.seconds(5, members)

    idle, busy = forecast(0.0), forecast(1.0)
    assert [step_s(idle, members) for members in (1, 2, 3)] == pytest.approx([0.006, 0.010, 0.020])
    assert [step_s(busy, members) for members in (1, 2, 3)] == pytest.approx([0.010, 0.010, 0.020])
    assert (idle.encode_s, busy.encode_s) == (0.006, 0.010)
    one, two = (idle.seconds(5, members) - members * idle.merge_s for members in (1, 2))
    assert two - one == pytest.approx(5 * 0.004 + 0.004)  # decoding: 6 ms of one by itself, 10 of two side by side


def test_slow_writing_is_learnt() -> None:
    planner = Planner()
    before = members(planner, Lane(), [SMALL], budget_ms=700)
    for _ in range(8):
        planner.saw("write x", PIXELS, 0.4)
    assert members(planner, Lane(), [SMALL], budget_ms=700) < before


def test_what_was_decoded_before_the_plan_is_not_read_again() -> None:
    async def read_s(decoded: bool) -> float:
        planner, known = Planner(), card()
        resolved = Options().resolve(known, "depth")
        large = Shape(PIXELS, 10**6)
        return planner.forecast(Lane(), known, "depth", resolved, [large] * 20, 60.0, decoded).finish_s

    assert asyncio.run(read_s(False)) > 1
    assert asyncio.run(read_s(True)) == 0


@pytest.mark.parametrize(("batch_size", "side_by_side"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_flows_two_runs_fill_batches_as_they_can(batch_size: int, side_by_side: int) -> None:
    """Where a batch cannot hold a member's two runs more than so often, a step of them takes a whole batch, or two."""
    known = card()
    flow = known.tasks["flow"].model_copy(update={"passes": [1]})
    known = known.model_copy(update={"tasks": {**known.tasks, "flow": flow}})
    pace = Pace(batch_size)
    pace.saw("denoise", PIXELS, 0.010)
    resolved = Options().resolve(known, "flow")
    made = Planner().forecast(Lane(pace=pace), known, "flow", resolved, [SMALL], 60.0)
    assert made.rows == side_by_side
    assert made.step_s * made.rows == pytest.approx(0.010 if batch_size > 1 else 0.020)


def test_flows_that_steady_a_depth_take_what_flows_take() -> None:
    def flows_s(encoding_s: float) -> float:
        known, pace = card(), paced()
        pace.saw("encode", PIXELS, 0.005, label=known.tasks["depth"].label)
        pace.saw("encode", PIXELS, encoding_s, label=known.tasks["flow"].label)
        resolved = Options().resolve(known, "depth")
        return Planner()._flows_s(Lane(pace=pace), known, resolved, [SMALL] * 3, 60.0)

    assert flows_s(0.105) - flows_s(0.005) == pytest.approx(2 * 0.1)


def test_a_single_slow_one_teaches_little() -> None:
    learnt = Learnt()
    for _ in range(8):
        learnt.saw(1.0, 0.2)
    usual = learnt.seconds(1.0)
    learnt.saw(1.0, 9.0)
    assert learnt.seconds(1.0) == pytest.approx(usual)
    assert usual == pytest.approx(0.2)


def test_what_was_cut_off_too_late_is_cut_off_earlier() -> None:
    planner = Planner()

    def deadline() -> float:
        _, spent, now = spend(planner, Lane(), [SMALL], budget_ms=5000)
        assert spent is not None
        assert spent.deadline is not None
        return spent.deadline - now

    at_first = deadline()
    late = Plan(5, 5, "a test", complete=False, members=3, steps_taken=5)
    for _ in range(15):  # each 50 ms too late, but for what is kept free by then
        planner.cut(Spend(late, slack_s=planner.slack_s), late, 0.050 - planner.slack_s)
    assert deadline() == pytest.approx(at_first - 0.050, abs=0.005)
    waited = Plan(5, 5, "a test", complete=False, members=1, steps_taken=1)
    for _ in range(15):
        planner.cut(Spend(waited), waited, 9.0)
        planner.cut(Spend(late), Plan(5, 5, "a test", members=5, steps_taken=5), 9.0)
    assert deadline() == pytest.approx(at_first - 0.050, abs=0.005)
    for _ in range(15):  # hard times are over
        planner.cut(Spend(late), Plan(5, 5, "a test", members=5, steps_taken=5), -0.2)
    assert deadline() == pytest.approx(at_first, abs=0.005)


def test_a_backend_without_a_lane_is_guessed_at() -> None:
    assert members(Planner(), object(), [SMALL], budget_ms=600_000) == 10
    assert members(Planner(Limits(members=3)), object(), [SMALL], budget_ms=600_000) == 2
