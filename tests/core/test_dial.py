"""What the dial chooses: by hand-written curves, so that every choice can be checked by eye."""

from __future__ import annotations

import math
from typing import Any

import pytest

from saccade import dial
from saccade.card import Card
from saccade.dial import Forecast, Limits, Plan
from saccade.errors import InvalidInput
from saccade.pipeline import Options
from tests import toy

# AbsRel by (steps, members): less is better. Rows with one member get worse with steps, as the shipped model does.
CURVE = {(1, 1): 0.30, (4, 1): 0.34, (1, 2): 0.28, (4, 2): 0.27, (1, 5): 0.25, (4, 5): 0.22, (4, 10): 0.21}
IDLE = Forecast(wait_s=0, encode_s=0.010, step_s=0.010, decode_s=0.010)


def card(curve: dict[tuple[int, int], float] | None = None, **changes: Any) -> Card:
    points = [
        {"task": "depth", "steps": s, "ensemble_size": n, "metric": "abs_rel", "value": v, "pictures": 9, "set": "x"}
        for (s, n), v in (CURVE if curve is None else curve).items()
    ]
    return Card.model_validate(toy.describe("toy", 1) | {"quality": points} | changes)


def plan(forecast: Forecast | None = IDLE, limits: Limits = dial.NO_LIMITS, **options: Any) -> Plan:
    return dial.plan(Options(**options), card(), "depth", forecast, limits)


def test_qualities_are_points_of_the_curve() -> None:
    fast, balanced, best = (plan(None, quality=quality) for quality in dial.QUALITIES)
    assert (fast.steps, fast.ensemble_size) == (1, 1)
    assert (balanced.steps, balanced.ensemble_size) == (1, 5)  # 0.25, and half of the gain is at 0.255
    assert (best.steps, best.ensemble_size) == (4, 10)
    assert "abs_rel 0.25" in balanced.why


@pytest.mark.parametrize(
    ("budget_ms", "chosen"),
    # Milliseconds of each: 10 + members * (steps + 1) * 10; a plan may fill 85% of the budget.
    [(10, (1, 1)), (60, (1, 2)), (130, (1, 5)), (320, (4, 5)), (10_000, (4, 10))],
)
def test_a_budget_buys_the_best_that_fits(budget_ms: int, chosen: tuple[int, int]) -> None:
    found = plan(budget_ms=budget_ms)
    assert (found.steps, found.ensemble_size) == chosen
    assert found.predicted_ms == pytest.approx(10 + chosen[1] * (chosen[0] + 1) * 10)


def test_load_and_batches_change_what_fits() -> None:
    busy = Forecast(wait_s=0.25, encode_s=0.010, step_s=0.010, decode_s=0.010)
    assert plan(busy, budget_ms=320).ensemble_size == 1
    assert "after a wait of 250 ms" in plan(busy, budget_ms=400).why
    # Four rows run in the time of one: two members cost as much as four.
    packed = Forecast(wait_s=0, encode_s=0.010, step_s=0.010, decode_s=0.0, rows=4)
    assert packed.seconds(3, 2) == packed.seconds(3, 4) == pytest.approx(0.130)


def test_nothing_fits() -> None:
    found = plan(budget_ms=5)
    assert (found.steps, found.ensemble_size) == (1, 1)
    assert "nothing fits" in found.why


def test_what_is_given_is_kept() -> None:
    assert plan(budget_ms=10_000, steps=1).ensemble_size == 5
    assert plan(budget_ms=10_000, ensemble_size=2).steps == 4
    both = plan(budget_ms=1, steps=7, ensemble_size=3)
    assert (both.steps, both.ensemble_size) == (7, 3)
    assert plan(budget_ms=10_000, steps=9).ensemble_size == 1  # never measured with 9: the card's default
    assert plan(budget_ms=10_000, quality="balanced").ensemble_size == 5
    assert plan(budget_ms=40, quality="best").ensemble_size == 1
    assert plan(budget_ms=5, output_uncertainty=True).ensemble_size == 2


def test_limits_of_the_server_hold() -> None:
    found = plan(None, Limits(steps=2, members=4), quality="best")
    assert (found.steps, found.ensemble_size) == (1, 2)


def test_a_target_takes_the_cards_steps_and_as_many_members_as_were_measured() -> None:
    assert (plan(None, target_uncertainty=0.1).steps, plan(None, target_uncertainty=0.1).ensemble_size) == (2, 10)
    assert plan(None, target_uncertainty=0.1, ensemble_size=4).ensemble_size == 4
    assert dial.uncertainty_of(0.4, 4) == pytest.approx(0.2)


def test_without_a_curve_there_is_a_ladder() -> None:
    bare = card({})

    def chosen(**options: Any) -> tuple[int, int]:
        found = dial.plan(Options(**options), bare, "depth", IDLE)
        return found.steps, found.ensemble_size

    assert [chosen(quality=quality) for quality in dial.QUALITIES] == [(1, 1), (2, 1), (2, 10)]
    assert [chosen(budget_ms=ms) for ms in (30, 60, 100, 200, 400)] == [(1, 1), (2, 1), (2, 2), (2, 5), (2, 10)]


def test_the_curve_is_of_one_metric_and_one_set_of_pictures() -> None:
    point = {"task": "flow", "steps": 1, "ensemble_size": 1, "metric": "epe_px", "value": 2.0}
    mixed = [
        point | {"pictures": 3, "set": "few"},
        point | {"pictures": 9, "set": "many"},
        point | {"pictures": 9, "set": "many", "ensemble_size": 2, "value": 1.0},
        point | {"pictures": 9, "set": "many", "ensemble_size": 4, "metric": "fl_all", "value": 0.1},
    ]
    found = dial.curve(card(quality=mixed), "flow")
    assert [(p.steps, p.members, p.told) for p in found] == [(1, 1, "epe_px 2"), (1, 2, "epe_px 1")]
    assert dial.curve(card(quality=mixed), "depth") == []


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"quality": "best", "steps": 3}, "quality"),
        ({"quality": "best", "ensemble_size": 3}, "quality"),
        ({"quality": "worst"}, "quality"),
        ({"quality": "best", "target_uncertainty": 0.1}, "target_uncertainty"),
        ({"target_uncertainty": 0.1, "ensemble_size": 1}, "target_uncertainty"),
        ({"target_uncertainty": 0.0}, "target_uncertainty"),
        ({"target_uncertainty": math.nan}, "target_uncertainty"),
        ({"budget_ms": 0}, "budget_ms"),
        ({"budget_ms": 600_001}, "budget_ms"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Options(**options).resolve(card(), "depth")
    assert refused.value.param == param


def test_members_that_are_all_the_same_are_never_planned() -> None:
    noise = {"schedule": "cosine", "zero_terminal_snr": True, "prediction": "v_prediction", "start": "zeros"}
    alike = card(noise=noise)
    assert dial.plan(Options(budget_ms=9999), alike, "depth", IDLE).ensemble_size == 1
    with pytest.raises(InvalidInput) as refused:
        Options(target_uncertainty=0.1).resolve(alike, "depth")
    assert refused.value.param == "target_uncertainty"
