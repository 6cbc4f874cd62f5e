"""Power laws are found where there are some, and a sweep becomes a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import curve_fit

from training import scaling
from training.scaling import PowerLaw

N = np.array([1, 2, 4, 8, 16])


@given(st.floats(0, 2), st.floats(0.05, 3), st.floats(0.2, 2.5))
def test_a_law_is_found_again(floor: float, gain: float, exponent: float) -> None:
    error = floor + gain * N**-exponent
    law = PowerLaw.fit(list(N), list(error))
    assert law.residual < 2e-3 * gain
    assert law.exponent == pytest.approx(exponent, rel=0.1)
    np.testing.assert_allclose(law(N), error, atol=5e-3 * gain)


def test_through_noise_it_fits_as_scipy_does() -> None:
    error = 0.2 + 0.1 * N**-0.8 + np.random.default_rng(0).normal(0, 0.002, 5)
    theirs, _ = curve_fit(lambda n, f, g, x: f + g * n**-x, N.astype(float), error, p0=(0.2, 0.1, 1))
    law = PowerLaw.fit(list(N), list(error))
    left = float(np.sqrt(np.mean((theirs[0] + theirs[1] * N ** -theirs[2] - error) ** 2)))
    assert law.residual <= left * 1.001
    np.testing.assert_allclose((law.floor, law.gain, law.exponent), theirs, rtol=0.03)


def test_an_error_that_rises_has_a_negative_gain_and_a_falling_one_no_negative_floor() -> None:
    assert PowerLaw.fit([1, 2, 4, 8], [0.2, 0.25, 0.27, 0.28]).gain < 0
    assert PowerLaw.fit([1, 2, 4, 8], [1.0, 0.4, 0.05, 0.0]).floor == 0


def test_two_points_are_no_law() -> None:
    with pytest.raises(ValueError, match="three numbers, and there are 2 points"):
        PowerLaw.fit([1, 2], [0.3, 0.2])
    with pytest.raises(ValueError, match="two numbers, and there are 1 points"):
        PowerLaw.fit([1], [0.3], floor=False)


def test_the_papers_law_of_compute_is_found_again() -> None:
    """L(C) = 0.23 C^-0.0098, over budgets whose powers would swamp a least squares in plain units."""
    compute = [1e17, 1e18, 1e19, 3e20]
    law = PowerLaw.fit(compute, [0.23 * c**-0.0098 for c in compute], scaling.COMPUTE_EXPONENTS, floor=False)
    assert (law.gain, law.exponent, law.floor) == (pytest.approx(0.23, rel=1e-3), pytest.approx(0.0098, rel=1e-3), 0)
    steep = PowerLaw.fit([1e12, 1e13, 1e14], [1e6 * c**-0.5 for c in (1e12, 1e13, 1e14)], scaling.COMPUTE_EXPONENTS)
    assert (steep.exponent, steep.floor) == (pytest.approx(0.5, rel=1e-3), pytest.approx(0, abs=1e-3))


def test_without_a_floor_it_is_the_straight_line_through_the_logarithms() -> None:
    n, error = np.array([1.0, 10, 100, 1000]), np.array([0.9, 0.55, 0.31, 0.2])
    law = PowerLaw.fit(list(n), list(error), scaling.COMPUTE_EXPONENTS, floor=False)
    slope, height = np.polyfit(np.log(n), np.log(error), 1)
    assert law.exponent == pytest.approx(-slope, rel=0.05)
    assert law.gain == pytest.approx(np.exp(height), rel=0.05)


def test_chance_moves_an_exponent_about_as_far_as_the_best_estimate_would_be_moved() -> None:
    """A slope through logarithms has deviation s / sqrt(sum (x - mean)^2) under noise s, 90% are 3.29 of them wide, and
    no unbiased estimate is surer; a fit by plain squares is a little less sure."""
    n = [1.0, 10, 100, 1000]
    error = [x**-0.2 for x in n]
    low, high = scaling.exponent_range(n, error, 0.01, exponents=scaling.COMPUTE_EXPONENTS, floor=False)
    wide = 3.29 * 0.01 / np.sqrt(np.square(np.log(n) - np.mean(np.log(n))).sum())
    assert low < 0.2 < high
    assert 0.9 < (high - low) / wide < 1.6


@pytest.fixture
def sweep() -> dict[str, Any]:
    def point(task: str, metric: str, steps: int, members: int, value: float) -> dict[str, Any]:
        mean = {"task": task, "group": "all", "metric": metric, "value": value}
        return {"steps": steps, "ensemble_size": members, "mean": mean}

    grid = [(s, m) for s in (1, 2, 4) for m in (1, 2, 4, 8)]
    points = [point("depth", "abs_rel", s, m, 0.2 + 0.1 / m) for s, m in grid]
    points += [point("flow", "epe_px", s, m, 3 + 1 / (s * m)) for s, m in grid]
    points += [point("amodal", "iou", s, m, 0.9 - 0.1 / m) for s, m in grid]
    points += [point("depth", "delta1", s, m, 0.0) for s, m in grid]
    return {"model": "toy", "digest": "ab" * 32, "data": "val", "points": points}


def test_a_sweep_becomes_a_table_and_a_plot(sweep: dict[str, Any], tmp_path: Path) -> None:
    table = scaling.laws_table(sweep)
    assert len(table.splitlines()) == 2 + 3 * (3 + 4)
    assert "| depth, AbsRel | members 1 to 8, 2 steps | 0.300 -> 0.213 | 0.200 | +0.100 | 1.00 |" in table
    assert "| amodal, 1 - IoU | members 1 to 8, 1 steps | 0.200 -> 0.112 | 0.100 |" in table
    with Image.open(scaling.plot(sweep, tmp_path / "laws.png")) as picture:
        assert picture.width > 500
