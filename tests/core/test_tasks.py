from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.tasks import TASKS, AmodalCoding, DepthCoding, FlowCoding, rgb_to_ycbcr, ycbcr_to_rgb


def test_depth_quantiles_become_minus_one_and_one() -> None:
    depth = np.random.default_rng(0).uniform(2, 9, (40, 50)).astype(np.float32)
    coded = DepthCoding().encode(depth)
    near, far = np.quantile(depth, [0.02, 0.98])
    np.testing.assert_allclose(coded, ((depth - near) / (far - near) * 2 - 1), atol=1e-5)
    np.testing.assert_allclose(DepthCoding().decode(coded), (depth - near) / (far - near), atol=1e-5)


def test_depth_is_scaled_by_what_is_known_and_clipped() -> None:
    depth = np.tile(np.linspace(1, 2, 50, dtype=np.float32), (40, 1))
    known = np.ones(depth.shape, bool)
    depth[0], known[0] = 1e6, False
    coded = DepthCoding().encode(depth, known)
    assert coded[0].max() == 1.25
    np.testing.assert_allclose(coded[1:], DepthCoding().encode(depth[1:]))


@given(st.floats(0.02, 5), st.floats(-0.1, 1.1))
def test_depth_survives_its_logarithmic_code(knee: float, way: float) -> None:
    """Quantiles stay -1 and 1, order stays, and decoding gives the way from near to far back."""
    depth = np.append(np.linspace(2, 10, 1001, dtype=np.float32), np.float32(2 + 8 * way))[None]
    near, far = np.quantile(depth, [0.02, 0.98])
    coding = DepthCoding(knee=knee)
    coded = coding.encode(depth)
    assert (np.diff(coded[0, :-1]) >= 0).all()
    kept = np.abs(coded) < 1.25
    np.testing.assert_allclose(coding.decode(coded)[kept], ((depth - near) / (far - near))[kept], atol=1e-4)
    np.testing.assert_allclose(coding.encode(depth), coding.encode(3 * depth + 7), atol=1e-4)


def test_a_knee_keeps_near_things_apart_and_a_wide_one_is_linear() -> None:
    road = np.geomspace(4, 120, 500, dtype=np.float32)[None]
    near = road < 12
    linear, folded = DepthCoding().encode(road), DepthCoding(knee=0.1).encode(road)
    assert np.ptp(folded[near]) > 2 * np.ptp(linear[near])
    np.testing.assert_allclose(DepthCoding(knee=1e4).encode(road), linear, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-3, 1e6])
def test_a_constant_depth_is_finite(value: float) -> None:
    assert np.isfinite(DepthCoding().encode(np.full((4, 5), value, np.float32))).all()


@given(u=st.floats(-200, 200), v=st.floats(-200, 200), longer_edge_px=st.integers(200, 2000))
def test_flow_survives_its_code(u: float, v: float, longer_edge_px: int) -> None:
    flow = np.array([u, v], np.float32).reshape(2, 1, 1)
    coding = FlowCoding()
    np.testing.assert_allclose(
        coding.decode(coding.encode(flow, longer_edge_px), longer_edge_px), flow, rtol=1e-4, atol=1e-4
    )


def test_the_reach_of_flow_is_coded_as_one_and_more_is_clipped() -> None:
    flow = np.array([64, -64, 0, 1e5], np.float32).reshape(2, 2, 1)
    assert FlowCoding(reach=0.25).encode(flow, 256).ravel().tolist() == pytest.approx([1, -1, 0, 1.5])


def test_the_object_lies_on_white() -> None:
    whole = np.eye(6, dtype=bool)
    rgb = np.random.default_rng(0).uniform(-1, 1, (3, 6, 6)).astype(np.float32)
    planes = AmodalCoding().encode(whole, rgb)
    np.testing.assert_array_equal(planes[0], np.where(whole, 1, -1))
    np.testing.assert_array_equal(AmodalCoding().decode_probability(planes[0]), whole)
    shown = AmodalCoding().decode_rgb(planes[1:])
    np.testing.assert_allclose(shown[:, whole], rgb[:, whole], atol=1e-6)
    np.testing.assert_allclose(shown[:, ~whole], 1, atol=1e-6)


@given(st.integers(0, 1000))
def test_colours_survive_ycbcr(seed: int) -> None:
    rgb = np.random.default_rng(seed).uniform(-1, 1, (3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(ycbcr_to_rgb(rgb_to_ycbcr(rgb)), rgb, atol=1e-5)
    np.testing.assert_allclose(rgb_to_ycbcr(np.ones((3, 1), np.float32)).ravel(), [1, 0, 0], atol=1e-6)


def test_the_aligned_median_is_depths_alone() -> None:
    assert [task for task, facts in TASKS.items() if "aligned_median" in facts.reductions] == ["depth"]
