"""Known depths to metres: against brute force and SciPy, with gross errors among the points, and every refusal."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from saccade import metres
from saccade.errors import MetresUndetermined
from saccade.metres import Metres

SIZE = (30, 40)
SEEDS = st.integers(0, 10_000)


def scattered(seed: int, n: int, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Predictions in 0 .. 1 that fill it, and metres along 2 + 6 p."""
    rng = np.random.default_rng(seed)
    predicted = rng.permutation(np.linspace(0, 1, n))
    return predicted, 2 + 6 * predicted + rng.normal(0, noise, n)


@settings(deadline=None)
@given(SEEDS, st.integers(2, 60), st.floats(0.1, 50), st.floats(-5, 50))
def test_points_without_error_give_their_line(seed: int, n: int, scale: float, shift: float) -> None:
    predicted, _ = scattered(seed, n)
    found = metres.fit(predicted, scale * predicted + shift)
    np.testing.assert_allclose((found.scale, found.shift), (scale, shift), rtol=1e-6, atol=1e-6)
    assert (found.inliers, found.points) == (n, n)
    assert found.residual_m < 1e-6


@settings(deadline=None)
@given(SEEDS, st.integers(6, 200))
def test_a_minority_of_gross_errors_changes_nothing(seed: int, n: int) -> None:
    predicted, known = scattered(seed, n, noise=0)
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(n)[: max(1, n // 3)]
    known[wrong] = rng.uniform(20, 1000, len(wrong))
    found = metres.fit(predicted, known)
    np.testing.assert_allclose((found.scale, found.shift), (6, 2), rtol=1e-6)
    assert found.inliers == n - len(wrong)


@settings(deadline=None)
@given(SEEDS, st.integers(4, 14))
def test_the_start_is_the_least_median_of_all_pairs(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, known = np.sort(rng.random(n)), rng.uniform(1, 9, n)
    predicted[-1] = predicted[0] + 1

    def cost(scale: float, shift: float) -> float:
        return float(np.sort(np.abs(known - scale * predicted - shift))[(n + 3) // 2 - 1])

    def line(a: int, b: int) -> tuple[float, float]:
        scale = (known[b] - known[a]) / (predicted[b] - predicted[a])
        return scale, known[a] - scale * predicted[a]

    apart = [(a, b) for a, b in combinations(range(n), 2) if predicted[b] - predicted[a] >= metres.MIN_SPAN / 2]
    assert cost(*metres._least_median(predicted, known)) == pytest.approx(min(cost(*line(a, b)) for a, b in apart))


@settings(deadline=None)
@given(SEEDS)
def test_the_end_is_the_minimum_of_tukeys_loss(seed: int) -> None:
    predicted, known = scattered(seed, 40, noise=0.2)
    known[:8] += 5
    start, sigma = (6.0, 2.0), 0.2
    scale, shift, _ = metres._biweight(predicted, known, *start, sigma)

    def loss(line: np.ndarray) -> float:
        share = np.clip(np.abs(known - line[0] * predicted - line[1]) / (4.685 * sigma), 0, 1)
        return float(np.sum(1 - (1 - share**2) ** 3))

    found = optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    np.testing.assert_allclose((scale, shift), found.x, atol=1e-4)


@settings(deadline=None)
@given(SEEDS, st.floats(0.01, 1000))
def test_units_and_order_do_not_matter(seed: int, unit: float) -> None:
    predicted, known = scattered(seed, 30)
    known[:5] *= 4
    order = np.random.default_rng(seed).permutation(30)
    one, other = metres.fit(predicted, known), metres.fit(predicted[order], unit * known[order])
    np.testing.assert_allclose((other.scale, other.shift), (unit * one.scale, unit * one.shift), rtol=1e-6)
    assert other.inliers == one.inliers


def ramp() -> np.ndarray:
    """[30, 40], 0 at the left and 1 at the right."""
    return np.tile(np.linspace(0, 1, SIZE[1], dtype=np.float32), (SIZE[0], 1))


def test_points_take_the_pixel_they_are_nearest_to() -> None:
    points = [(0, 0, 1.0), (39, 29, 5.0), (19.6, 3, 1 + 4 * 20 / 39)]
    found = metres.fit_points(ramp(), points, SIZE)
    assert found == Metres(pytest.approx(4, abs=1e-5), pytest.approx(1, abs=1e-5), pytest.approx(0, abs=1e-5), 3, 3)
    half = ramp()[::2, ::2]
    assert metres.fit_points(half, points, SIZE).scale == pytest.approx(4, rel=0.1)


def test_metres_of_a_map_are_never_below_zero() -> None:
    found = metres.to_metres(ramp(), Metres(4.0, -1.0, 0.0, 2, 2))
    assert (found.dtype, float(found.min()), float(found.max())) == (np.float32, 0.0, 3.0)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([(0, 0, 1.0)], "1 given"),
        ([(0, 0, 1.0), (40, 0, 2.0)], r"point 1 at \(40, 0\) is outside"),
        ([(0, -1, 1.0), (4, 0, 2.0)], "outside"),
        ([(0, 0, 0.0), (4, 0, 2.0)], "over 0"),
        ([(0, 0, 1.0), (4, 0, float("inf"))], "over 0"),
        ([(5, 0, 1.0), (5, 9, 2.0), (5, 20, 3.0)], "one predicted depth"),
        ([(0, 0, 5.0), (39, 0, 2.0)], "far is predicted near"),
        ([(0, 0, 3.0), (39, 0, 3.0)], "far is predicted near"),
        ([(0, 0, 2.0), (1, 0, 9.0), (38, 0, 1.0), (39, 0, 12.0), (20, 0, 4.0)], "scatter"),
    ],
)
def test_what_determines_nothing_is_refused_with_the_reason(
    points: list[tuple[float, float, float]], reason: str
) -> None:
    with pytest.raises(MetresUndetermined, match=reason) as refusal:
        metres.fit_points(ramp(), points, SIZE)
    assert refusal.value.param == "known_depths"


def test_points_that_agree_at_one_depth_only_are_refused() -> None:
    predicted = np.append(np.linspace(0.5, 0.515, 9), 0.9)
    with pytest.raises(MetresUndetermined, match="only 9 agree, and they lie at one"):
        metres.fit(predicted, np.append(2 + 100 * predicted[:9], 2.0))
