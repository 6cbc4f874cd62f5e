"""A steady scale: warping against OpenCV, fits that do not drift, cuts that begin anew."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import steady
from saccade.steady import Affine

SIZE = (40, 50)
STEP_PX = 2


def panorama(seed: int = 0, width: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """A wide picture [H, width, 3] uint8 and its depth [H, width], both smooth."""
    rng = np.random.default_rng(seed)
    picture = cv2.resize(rng.integers(0, 256, (6, 16, 3), np.uint8), (width, SIZE[0]), interpolation=cv2.INTER_CUBIC)
    depth = cv2.resize(rng.random((5, 12), np.float32), (width, SIZE[0]), interpolation=cv2.INTER_CUBIC)
    return picture, depth


def pan(count: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Pictures, true depths, and flows back: the camera goes right, so that what is now at x was at x + step before."""
    picture, depth = panorama(seed)
    starts = range(0, STEP_PX * count, STEP_PX)
    back = np.zeros((*SIZE, 2), np.float32)
    back[..., 0] = STEP_PX
    return (
        [picture[:, s : s + SIZE[1]] for s in starts],
        [depth[:, s : s + SIZE[1]] for s in starts],
        [back] * (count - 1),
    )


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_warping_is_opencvs_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plane, flow = rng.random(SIZE, np.float32), rng.normal(0, 6, (*SIZE, 2)).astype(np.float32)
    found, inside = steady.warp(plane, flow)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float32)
    expected = cv2.remap(plane, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR)
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.03)  # OpenCV rounds positions to 1/32 px
    assert inside.mean() > 0.3


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 3), st.floats(-2, 2))
def test_the_fit_finds_scale_and_shift_among_what_does_not_follow(seed: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    now = rng.random(2000).astype(np.float32)
    before = (scale * now + shift).astype(np.float32)
    before[:400] = rng.uniform(shift - 3, shift + 3, 400)
    found = steady.fit(now, before)
    assert found.scale == pytest.approx(scale, rel=0.02)
    assert found.shift == pytest.approx(shift, abs=0.02 * scale)


def test_noise_does_not_shrink_the_scale() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(20_000)
    noisy = [(truth + rng.normal(0, 0.1, truth.size)).astype(np.float32) for _ in range(11)]
    total = Affine()
    for before, now in pairwise(noisy):
        total = steady.fit(now, before).then(total)
    assert total.scale == pytest.approx(1, abs=0.03)  # least squares would have left 0.9 ** 10


def test_frames_with_scales_of_their_own_come_together() -> None:
    pictures, depths, flows = pan(12)
    rng = np.random.default_rng(1)
    unsteady = [(rng.uniform(0.4, 2) * depth + rng.uniform(-1, 1)).astype(np.float32) for depth in depths]
    found = steady.steady(unsteady, pictures, flows)
    assert found.shots == [0]
    together, truth = np.stack(found.maps), np.stack(depths)
    assert (together.min(), together.max()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    scaled = (truth - truth.min()) / np.ptp(truth)
    np.testing.assert_allclose(together, scaled, atol=0.01)


def test_a_smaller_flow_of_a_larger_picture_will_do() -> None:
    pictures, depths, flows = pan(3)
    halves = [flow[::2, ::2] / 2 for flow in flows]
    found = steady.steady([depths[0], 2 * depths[1] + 1, depths[2] / 3], pictures, halves)
    scaled = np.stack(depths)
    scaled = (scaled - scaled.min()) / np.ptp(scaled)
    np.testing.assert_allclose(np.stack(found.maps), scaled, atol=0.04)


def test_a_cut_begins_a_new_scale() -> None:
    pictures, depths, flows = pan(3)
    others, new_depths, _ = pan(2, seed=9)
    found = steady.steady(
        [*depths, *(5 * d + 7 for d in new_depths)], [*pictures, *others], [*flows, flows[0], flows[0]]
    )
    assert found.shots == [0, 3]
    for shot in (np.stack(found.maps[:3]), np.stack(found.maps[3:])):
        assert (shot.min(), shot.max()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


def test_flat_depths_stay_finite() -> None:
    pictures, _, flows = pan(3)
    flat = [np.full(SIZE, level, np.float32) for level in (0.2, 0.7, 0.7)]
    assert np.isfinite(np.stack(steady.steady(flat, pictures, flows).maps)).all()
