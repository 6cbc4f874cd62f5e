from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from diffusers import MarigoldDepthPipeline
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from saccade import ensemble
from saccade.errors import InvalidInput

HEIGHT, WIDTH = 48, 64


def truth() -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / HEIGHT
    scene = 0.6 * y + 0.2 * np.sin(5 * x) + 0.3 * ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05)
    return (scene - scene.min()) / np.ptp(scene)


def members(n: int, noise: float, seed: int, *, affine: bool = False, clip: bool = False) -> np.ndarray:
    """Looks at one scene that differ by pixel noise and by a blocky, low-frequency error; [n, 48, 64] float32."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.standard_normal((n, 6, 8)), np.ones((8, 8)))
    maps = truth() + noise * (blocks + 0.5 * rng.standard_normal((n, HEIGHT, WIDTH)))
    if affine:
        maps = maps * rng.uniform(0.3, 1.5, (n, 1, 1)) + rng.uniform(-0.3, 0.3, (n, 1, 1))
    return (maps.clip(0, 1) if clip else maps).astype(np.float32)


def cost(maps: np.ndarray, scales: np.ndarray, shifts: np.ndarray, strength: float = 0.02) -> float:
    """The definition, pixel by pixel, in float64."""
    aligned = scales[:, None, None] * maps.astype(np.float64) + shifts[:, None, None]
    n = len(aligned)
    pairs = sum(np.sqrt(np.mean((aligned[i] - aligned[j]) ** 2)) for i in range(n) for j in range(i + 1, n))
    merged = torch.from_numpy(aligned).median(0).values
    return float(pairs + strength * (merged.min().abs() + (1 - merged.max()).abs()))


def diffusers(maps: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray, float]:
    """Its map and uncertainty, and the cost of the alignment it found."""
    found, minimize = [], scipy.optimize.minimize

    def spy(*args: object, **options: object) -> object:
        found.append(minimize(*args, **options))
        return found[-1]

    monkeypatch.setattr(scipy.optimize, "minimize", spy)
    merged, spread = MarigoldDepthPipeline.ensemble_depth(torch.from_numpy(maps)[:, None], output_uncertainty=True)
    monkeypatch.undo()
    return merged[0, 0].numpy(), spread[0, 0].numpy(), cost(maps, *np.split(found[0].x, 2))


@pytest.mark.parametrize(("n", "seed"), [*((n, seed) for n in (2, 3, 5) for seed in range(4)), (10, 0)])
@pytest.mark.parametrize(("noise", "bound"), [(0.003, 1e-2), (0.01, 2e-2)])
def test_agreeing_members_merge_as_in_diffusers(
    n: int, noise: float, bound: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At noise 0.01 two of the thirteen part by more than 1e-2, both where our cost is the lower one."""
    maps = members(n, noise, seed, clip=True)
    expected, spread, their_cost = diffusers(maps, monkeypatch)
    merged, uncertainty = ensemble.aligned_median(maps)
    assert np.abs(merged - expected).max() <= bound
    # Two members 0.003 apart sit in the cost's corners, which ours rounds off.
    assert cost(maps, *ensemble.align(maps)) <= their_cost + (5e-6 if n == 2 else 1e-6)
    if n % 2:
        assert np.abs(uncertainty - spread).max() <= bound


@pytest.mark.parametrize(("n", "noise"), [(3, 0.03), (3, 0.2), (5, 0.1), (10, 0.03)])
@pytest.mark.parametrize(("affine", "clip"), [(False, True), (True, False), (True, True)])
def test_no_worse_than_diffusers_where_members_disagree(
    n: int, noise: float, affine: bool, clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its map is not comparable here: a change of 1e-7 in the input moves it by up to 0.3 (float32 differences)."""
    maps = members(n, noise, 5, affine=affine, clip=clip)
    _, _, their_cost = diffusers(maps, monkeypatch)
    assert cost(maps, *ensemble.align(maps)) <= their_cost + 1e-6


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("noise", [0.003, 0.03, 0.2])
@pytest.mark.parametrize(("affine", "clip"), [(False, False), (False, True), (True, False), (True, True)])
def test_rounding_errors_do_not_move_the_answer(n: int, noise: float, affine: bool, clip: bool) -> None:
    maps = members(n, noise, 1, affine=affine, clip=clip)
    nudge = np.random.default_rng(0).choice([-1e-7, 1e-7], maps.shape)
    before, after = ensemble.aligned_median(maps), ensemble.aligned_median((maps + nudge).astype(np.float32))
    assert np.abs(after[0] - before[0]).max() <= 1e-5
    assert np.abs(after[1] - before[1]).max() <= 1e-5


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("low", [0.0, -0.4, 0.3])
def test_gradient_is_that_of_finite_differences(n: int, low: float) -> None:
    fit = ensemble._Fit.of(members(n, 0.1, n, affine=True), 0.02)
    rng = np.random.default_rng(0)
    at = fit.start() * rng.uniform(0.8, 1.2, 2 * n) + low
    value, gradient = fit.cost(at)
    for i in range(2 * n):
        step = np.eye(2 * n)[i] * 1e-6
        slope = (fit.cost(at + step)[0] - fit.cost(at - step)[0]) / 2e-6
        assert gradient[i] == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert value > 0


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("strength", [0.0, 0.02, 3.0])
def test_cost_is_the_definition_but_for_the_rounded_corners(n: int, strength: float) -> None:
    maps = members(n, 0.1, n, affine=True)
    fit = ensemble._Fit.of(maps, strength)
    at = fit.start() * np.random.default_rng(1).uniform(0.8, 1.2, 2 * n) + 0.1
    assert fit.cost(at)[0] == pytest.approx(cost(maps, *np.split(at, 2), strength), rel=1e-5)


def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
    return float(scipy.optimize.rosen(x)), scipy.optimize.rosen_der(x)


def test_bfgs_finds_a_minimum() -> None:
    found = ensemble._bfgs(rosenbrock, np.array([-1.2, 1.0, 0.7]), np.full(3, -np.inf), 200, 1e-8)
    np.testing.assert_allclose(found, 1, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3, 6])
@pytest.mark.parametrize("n", [2, 5])
def test_bfgs_walks_as_scipys(n: int, iterations: int) -> None:
    fit = ensemble._Fit.of(members(n, 0.03, 4, affine=True), 0.02)
    ours = ensemble._bfgs(fit.cost, fit.start(), np.full(2 * n, -np.inf), iterations, 1e-3)
    expected = scipy.optimize.minimize(
        fit.cost, fit.start(), jac=True, method="BFGS", tol=1e-3, options={"maxiter": iterations}
    )
    assert expected.nit == iterations
    np.testing.assert_allclose(ours, expected.x, rtol=1e-9, atol=1e-9)


def test_bfgs_stops_at_the_floor_and_at_the_tolerance() -> None:
    start, floor = np.array([3.0, 2.0]), np.array([1.5, -np.inf])

    def bowl(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float(x @ x), 2 * x

    assert ensemble._bfgs(bowl, start, floor, 50, 1e-9)[0] == 1.5
    np.testing.assert_array_equal(ensemble._bfgs(bowl, start, floor, 50, 10.0), start)
    np.testing.assert_array_equal(ensemble._bfgs(bowl, start, floor, 0, 1e-9), start)


def test_a_straight_slope_breaks_nothing() -> None:
    slope = np.array([1.0, -2.0])
    found = ensemble._bfgs(lambda x: (float(slope @ x), slope), np.zeros(2), np.full(2, -np.inf), 3, 1e-9)
    assert np.isfinite(found).all()
    assert slope @ found < 0


@given(scale=st.floats(0.2, 5), shift=st.floats(-3, 3))
def test_alignment_undoes_scale_and_shift(scale: float, shift: float) -> None:
    scene = truth().astype(np.float32)
    maps = np.stack([scene, np.float32(scale) * scene + np.float32(shift), 0.5 * scene + 0.25])
    merged, uncertainty = ensemble.aligned_median(maps)
    np.testing.assert_allclose(merged, scene, atol=1e-4)
    assert uncertainty.max() < 1e-4


def test_alignment_beats_the_plain_median_on_members_of_different_scales() -> None:
    maps = members(9, 0.03, 2, affine=True)

    def error(merged: np.ndarray) -> float:
        rows = np.stack([merged.ravel(), np.ones(merged.size)], 1)
        return float(np.linalg.lstsq(rows, truth().ravel(), rcond=None)[1][0])

    assert error(ensemble.reduce(maps, "aligned_median")[0]) < 0.8 * error(ensemble.reduce(maps, "median")[0])


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("max_iter", [2, 50])
def test_no_member_is_flattened_or_mirrored(n: int, max_iter: int) -> None:
    """Members that share nothing: the cost alone would shrink all of them to a constant."""
    maps = np.random.default_rng(n).random((n, 24, 24), np.float32)
    scales, _ = ensemble.align(maps, max_iter=max_iter)
    assert np.all(scales * np.ptp(maps, axis=(1, 2)) >= 0.5 - 1e-9)


def test_order_of_members_does_not_matter() -> None:
    maps = members(5, 0.05, 3, affine=True)
    merged, uncertainty = ensemble.aligned_median(maps)
    other, other_uncertainty = ensemble.aligned_median(maps[[3, 1, 4, 0, 2]])
    np.testing.assert_allclose(other, merged, atol=1e-5)
    np.testing.assert_allclose(other_uncertainty, uncertainty, atol=1e-5)


def test_a_large_map_is_fitted_small_and_merged_whole() -> None:
    maps = members(3, 0.03, 0, affine=True)
    large = maps.repeat(4, axis=1).repeat(4, axis=2)
    expected, _ = ensemble.aligned_median(maps)
    merged, uncertainty = ensemble.aligned_median(large, max_res=WIDTH)
    assert merged.shape == uncertainty.shape == (4 * HEIGHT, 4 * WIDTH)
    np.testing.assert_allclose(merged[1::4, 2::4], expected, atol=1e-5)


@pytest.mark.parametrize(("shape", "max_res"), [((300, 200), 100), ((97, 311), 64), ((3, 500), 50)])
def test_shrinking_takes_torchs_nearest_exact_pixels(shape: tuple[int, int], max_res: int) -> None:
    maps = np.random.default_rng(0).random((2, *shape), np.float32)
    size = [max(1, edge * max_res // max(shape)) for edge in shape]
    expected = torch.nn.functional.interpolate(torch.from_numpy(maps)[None], size, mode="nearest-exact")[0]
    np.testing.assert_array_equal(ensemble._shrink(maps, max_res), expected.numpy())


def test_uncertainty_is_the_mad_on_the_scale_of_the_map() -> None:
    maps = members(5, 0.05, 3, affine=True)
    scales, shifts = ensemble.align(maps)
    aligned = scales[:, None, None] * maps + shifts[:, None, None]
    middle = np.median(aligned, axis=0)
    merged, uncertainty = ensemble.aligned_median(maps)
    np.testing.assert_allclose(merged, (middle - middle.min()) / np.ptp(middle), atol=1e-6)
    np.testing.assert_allclose(uncertainty, np.median(abs(aligned - middle), axis=0) / np.ptp(middle), atol=1e-6)


def test_two_members_are_uncertain_where_they_differ() -> None:
    maps = np.stack([truth(), truth()]).astype(np.float32)
    maps[1, 20:30, 20:30] += 0.05
    _, uncertainty = ensemble.aligned_median(maps)
    assert uncertainty[20:30, 20:30].min() > 3 * uncertainty[35:, :10].max()


@pytest.mark.parametrize("count", [*range(1, 12), 20, 64, 65, 90])
def test_the_median_of_any_number_of_members_is_numpys(count: int) -> None:
    maps = np.random.default_rng(count).integers(0, 12, (count, 40, 30)).astype(np.float32)
    maps[:, 20:] += np.random.default_rng(count).standard_normal((count, 20, 30)).astype(np.float32)
    merged, uncertainty = ensemble.reduce(maps, "median")
    middle = np.median(maps, axis=0)
    np.testing.assert_array_equal(merged, middle)
    np.testing.assert_array_equal(uncertainty, np.median(abs(maps - middle), axis=0))


def test_mean_and_median_of_depth_worked_by_hand() -> None:
    maps = np.array([1.0, 2.0, 6.0], np.float32).reshape(3, 1, 1)
    for reduction, expected, spread in (("mean", 3.0, np.sqrt(14 / 3)), ("median", 2.0, 1.0)):
        merged, uncertainty = ensemble.reduce(maps, reduction)  # type: ignore[arg-type]
        assert merged.item() == pytest.approx(expected)
        assert uncertainty.item() == pytest.approx(spread)


def test_the_median_of_two_lies_between_them() -> None:
    merged, uncertainty = ensemble.reduce(np.array([1.0, 2.0]).reshape(2, 1, 1), "median")
    assert (merged.item(), uncertainty.item()) == (1.5, 0.5)


def test_uncertainty_of_flow_is_a_length_in_pixels() -> None:
    maps = np.zeros((3, 2, 2, 2), np.float32)
    maps[:, 0, 1] = [[-3, 4], [0, 0], [3, -4]]
    for reduction, length in (("median", 5.0), ("mean", 5 * np.sqrt(2 / 3))):
        flow, uncertainty = ensemble.reduce(maps, reduction)  # type: ignore[arg-type]
        np.testing.assert_array_equal(flow, np.zeros((2, 2, 2)))
        np.testing.assert_allclose(uncertainty, [[0, length], [0, 0]], rtol=1e-6)


@given(
    maps=arrays(np.float32, st.tuples(st.integers(1, 4), st.just(3), st.just(4)), elements=st.floats(0, 1, width=32)),
    reduction=st.sampled_from(["mean", "median", "aligned_median"]),
)
def test_every_reduction_stays_finite_and_in_range(maps: np.ndarray, reduction: ensemble.Reduction) -> None:
    """Constant, identical, tied and single members among them."""
    merged, uncertainty = ensemble.reduce(maps, reduction)
    assert merged.dtype == uncertainty.dtype == np.float32
    assert merged.shape == uncertainty.shape == (3, 4)
    assert np.isfinite(uncertainty).all()
    assert uncertainty.min() >= 0
    assert merged.min() >= 0
    assert merged.max() <= 1 + 1e-6


@pytest.mark.parametrize("reduction", ["mean", "median", "aligned_median"])
@pytest.mark.parametrize("n", [1, 4, 5])
def test_the_map_is_the_same_without_its_uncertainty(n: int, reduction: ensemble.Reduction) -> None:
    maps = members(n, 0.05, 0)
    np.testing.assert_array_equal(ensemble.merge(maps, reduction), ensemble.reduce(maps, reduction)[0])


@pytest.mark.parametrize("reduction", ["mean", "median", "aligned_median"])
def test_one_member_is_its_own_answer(reduction: ensemble.Reduction) -> None:
    maps = members(1, 0.05, 0) * np.float32(3)
    merged, uncertainty = ensemble.reduce(maps, reduction)
    np.testing.assert_array_equal(merged, maps[0])
    assert not uncertainty.any()


@pytest.mark.parametrize("reduction", ["mean", "median", "aligned_median"])
def test_identical_members_are_certain(reduction: ensemble.Reduction) -> None:
    maps = np.repeat(truth().astype(np.float32)[None], 4, axis=0)
    merged, uncertainty = ensemble.reduce(maps, reduction)
    np.testing.assert_allclose(merged, maps[0], atol=1e-6)
    assert uncertainty.max() < 1e-6


def test_constant_members_make_a_flat_map() -> None:
    merged, uncertainty = ensemble.aligned_median(np.array([0.2, 0.5, 0.5]).reshape(3, 1, 1) * np.ones((3, 4, 5)))
    assert np.ptp(merged) == 0
    assert uncertainty.max() < 1e-3


@pytest.mark.parametrize("reduction", ["mean", "median", "aligned_median"])
def test_members_are_left_as_they_were(reduction: ensemble.Reduction) -> None:
    maps = members(3, 0.05, 0)
    for array in (maps, maps.astype(np.float64)):
        before = array.copy()
        ensemble.reduce(array, reduction)
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    ("shape", "reduction", "param"),
    [
        ((3, 4, 5, 2), "aligned_median", "reduction"),
        ((3, 4, 5), "mode", "reduction"),
        ((4, 5), "mean", "maps"),
        ((0, 4, 5), "median", "maps"),
        ((2, 3, 4, 5, 6), "median", "maps"),
    ],
)
def test_impossible_reductions_are_refused(shape: tuple[int, ...], reduction: ensemble.Reduction, param: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        ensemble.reduce(np.zeros(shape), reduction)
    assert refusal.value.param == param
    if len(shape) != 3:
        with pytest.raises(InvalidInput):
            ensemble.align(np.zeros(shape))
