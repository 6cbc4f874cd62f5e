from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jaccard

from saccade import metrics
from saccade.errors import InvalidInput


def scene(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A prediction in no units, a true depth in metres, and where it is known."""
    rng = np.random.default_rng(seed)
    return rng.random(shape, np.float32), rng.uniform(1, 9, shape).astype(np.float32), rng.random(shape) < 0.7


@given(st.integers(0, 10_000))
def test_align_depth_is_least_squares_over_the_valid_pixels(seed: int) -> None:
    prediction, truth, valid = scene(seed, 6, 7)
    rows = np.stack([prediction[valid], np.ones(valid.sum())], 1).astype(np.float64)
    (scale, shift), *_ = np.linalg.lstsq(rows, truth[valid].astype(np.float64), rcond=None)
    aligned = metrics.align_depth(prediction, truth, valid)
    assert aligned.dtype == np.float64
    np.testing.assert_allclose(aligned, np.maximum(scale * prediction + shift, 1e-3), rtol=1e-9)


@given(scale=st.floats(0.01, 100) | st.floats(-100, -0.01), shift=st.floats(-100, 100))
def test_align_depth_undoes_any_scale_and_shift(scale: float, shift: float) -> None:
    _, truth, valid = scene(3, 5, 6)
    np.testing.assert_allclose(metrics.align_depth(scale * truth.astype(float) + shift, truth, valid), truth, rtol=1e-8)


def test_align_depth_ignores_what_is_not_valid() -> None:
    prediction, truth, valid = scene(0, 5, 6)
    expected = metrics.align_depth(prediction, truth, valid)
    truth[~valid], prediction[~valid] = np.nan, 1e6
    np.testing.assert_array_equal(metrics.align_depth(prediction, truth, valid)[valid], expected[valid])


def test_align_depth_clips_at_a_millimetre() -> None:
    truth = np.array([[1.0, 1.0, 5.0, 9.0]])
    valid = np.array([[True, True, True, False]])
    aligned = metrics.align_depth(np.array([[0.0, 0.0, 1.0, -1.0]]), truth, valid)
    np.testing.assert_allclose(aligned, [[1, 1, 5, 1e-3]])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_prediction_becomes_the_mean(value: float) -> None:
    _, truth, valid = scene(1, 5, 6)
    aligned = metrics.align_depth(np.full((5, 6), value, np.float32), truth, valid)
    np.testing.assert_allclose(aligned, truth[valid].astype(float).mean())


def test_depth_measures_worked_by_hand() -> None:
    depth, truth = np.array([[1.0, 2.0], [4.0, 7.0]]), np.array([[2.0, 2.0], [5.0, 1.0]])
    valid = np.array([[True, True], [True, False]])
    assert metrics.abs_rel(depth, truth, valid) == pytest.approx((0.5 + 0 + 0.2) / 3)
    # 5 / 4 is 1.25 itself, which is not below it.
    assert metrics.delta1(depth, truth, valid) == pytest.approx(1 / 3)
    depth[1, 0] = 4.01
    assert metrics.delta1(depth, truth, valid) == pytest.approx(2 / 3)


@pytest.mark.parametrize("wrong", [0.0, -1.0, -100.0, np.nan])
def test_a_depth_that_cannot_be_is_never_right(wrong: float) -> None:
    assert metrics.delta1(np.array([[wrong]]), np.array([[1.0]]), np.array([[True]])) == 0


def test_epe_worked_by_hand() -> None:
    flow, truth = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    truth[0, 0], truth[0, 1], truth[1, 1] = (3, 4), (0, 1), (500, 500)
    valid = np.array([[True, True], [True, False]])
    assert metrics.epe(flow, truth, valid) == pytest.approx((5 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("error_px", "motion_px", "outlier"),
    [(2.9, 0.0, 0), (3.0, 0.0, 0), (3.1, 0.0, 1), (3.1, 61.0, 1), (3.1, 63.0, 0), (9.0, 179.0, 1), (9.0, 181.0, 0)],
)
def test_a_flow_is_an_outlier_above_three_pixels_and_five_percent(
    error_px: float, motion_px: float, outlier: int
) -> None:
    truth = np.array([[[0.0, motion_px]]])
    flow = truth + np.array([error_px, 0.0])
    assert metrics.fl_all(flow, truth, np.array([[True]])) == outlier


def test_fl_all_is_a_share_of_valid_pixels_and_counts_nan() -> None:
    truth = np.zeros((1, 5, 2))
    flow = truth.copy()
    flow[0, 0], flow[0, 1], flow[0, 4] = (9, 0), (np.nan, 0), (9, 9)
    assert metrics.fl_all(flow, truth, np.array([[True, True, True, True, False]])) == pytest.approx(0.5)


@given(st.integers(0, 10_000))
def test_iou_is_jaccards(seed: int) -> None:
    a, b = np.random.default_rng(seed).random((2, 5, 6)) < 0.4
    expected = 1 - jaccard(a.ravel(), b.ravel())
    assert metrics.iou(a, b) == pytest.approx(expected)


def test_iou_at_its_ends() -> None:
    empty, full = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert metrics.iou(full, full) == 1
    assert metrics.iou(empty, full) == 0
    assert metrics.iou(empty, empty) == 1


def test_sums_are_kept_in_float64() -> None:
    """float32 cannot tell a kilometre from one and a tenth of a micrometre."""
    truth = np.full((400, 400), 1000.0, np.float64)
    depth = truth + 1e-7
    assert metrics.abs_rel(depth, truth, np.ones_like(truth, bool)) == pytest.approx(1e-10, rel=1e-3)


PIXELS = np.ones((2, 3))
ALL = np.ones((2, 3), bool)


@pytest.mark.parametrize("measure", [metrics.align_depth, metrics.abs_rel, metrics.delta1])
@pytest.mark.parametrize(
    ("prediction", "truth", "valid", "param"),
    [
        (PIXELS, PIXELS, ~ALL, "valid"),
        (PIXELS[:1], PIXELS, ALL, "prediction"),
        (PIXELS, PIXELS, ALL[:1], "prediction"),
        (PIXELS, 0 * PIXELS, ALL, "truth"),
        (PIXELS, -PIXELS, ALL, "truth"),
        (PIXELS, np.nan * PIXELS, ALL, "truth"),
        (PIXELS, np.inf * PIXELS, ALL, "truth"),
    ],
)
def test_impossible_depths_are_refused(
    measure: object, prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray, param: str
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        measure(prediction, truth, valid)  # type: ignore[operator]
    assert refusal.value.param == param


@pytest.mark.parametrize("measure", [metrics.epe, metrics.fl_all])
def test_impossible_flows_are_refused(measure: object) -> None:
    flow = np.zeros((2, 3, 2))
    for prediction, truth, valid in ((flow[:1], flow, ALL), (flow, flow * np.nan, ALL), (flow, flow, ~ALL)):
        with pytest.raises(InvalidInput):
            measure(prediction, truth, valid)  # type: ignore[operator]


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(InvalidInput):
        metrics.iou(ALL, ALL[:1])
