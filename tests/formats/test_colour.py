from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from matplotlib import colormaps

from saccade.formats import colorize_depth, colorize_flow, colorize_mask
from saccade.formats.colour import FLOW_WHEEL


def test_depth_is_matplotlibs_spectral() -> None:
    depth = np.linspace(0, 1, 10_001, dtype=np.float32)[None]
    theirs = np.rint(colormaps["Spectral"](depth)[..., :3] * 255)
    assert np.abs(colorize_depth(depth) - theirs).max() <= 2


def test_near_is_red_and_far_is_violet() -> None:
    near, far = colorize_depth(np.array([[0.0, 1.0]]))[0].astype(int)
    assert near[0] > near[2]
    assert far[2] > far[0]


def test_depth_clips_and_blackens_the_unknown() -> None:
    shown = colorize_depth(np.array([[-1, 0, 1, 2, np.nan, np.inf]], np.float32))[0]
    np.testing.assert_array_equal(shown[0], shown[1])
    np.testing.assert_array_equal(shown[2], shown[3])
    assert not shown[4:].any()


def test_the_wheel_has_its_published_segments() -> None:
    assert FLOW_WHEEL.shape == (55, 3)
    corners = {0: (1, 0, 0), 15: (1, 1, 0), 21: (0, 1, 0), 25: (0, 1, 1), 36: (0, 0, 1), 49: (1, 0, 1)}
    for place, colour in corners.items():
        np.testing.assert_allclose(FLOW_WHEEL[place], colour, atol=1e-6)
    hues = [colorsys.rgb_to_hsv(*colour)[0] for colour in FLOW_WHEEL.tolist()]
    assert hues == sorted(hues)
    assert [wheel_colour(place) for place in range(55)] == [tuple(c) for c in np.rint(FLOW_WHEEL * 255).tolist()]


def wheel_colour(place: int) -> tuple[int, int, int]:
    """The wheel told another way: which two of the six corners a place lies between, one channel moving."""
    for start, (length, high, moving, rising) in zip(
        (0, 15, 21, 25, 36, 49),
        ((15, 0, 1, True), (6, 1, 0, False), (4, 1, 2, True), (11, 2, 1, False), (13, 2, 0, True), (6, 0, 2, False)),
        strict=True,
    ):
        if start <= place < start + length:
            level = math.floor(255 * (place - start) / length)
            colour = [0, 0, 0]
            colour[high] = 255
            colour[moving] = level if rising else 255 - level
            return colour[0], colour[1], colour[2]
    raise IndexError(place)


def slow_colour(u: float, v: float, largest: float) -> list[float]:
    u, v = u / largest, v / largest
    radius = math.hypot(u, v)
    place = (math.atan2(-v, -u) / math.pi + 1) / 2 * 54
    before = math.floor(place)
    colour = []
    for low, high in zip(wheel_colour(before), wheel_colour((before + 1) % 55), strict=True):
        level = low / 255 + (place - before) * (high - low) / 255
        colour.append(255 * (1 - radius * (1 - level) if radius <= 1 else 0.75 * level))
    return colour


@pytest.mark.parametrize("largest", [None, 5.0])
def test_flow_is_the_middlebury_wheel(largest: float | None) -> None:
    flow = np.random.default_rng(0).normal(0, 4, (20, 30, 2))
    scale = largest or float(np.hypot(*np.moveaxis(flow, -1, 0)).max())
    shown = colorize_flow(flow, largest)
    slow = np.array([[slow_colour(u, v, scale) for u, v in row] for row in flow])
    assert shown.dtype == np.uint8
    assert np.abs(shown - np.floor(slow)).max() <= 1


def test_directions_have_their_known_colours() -> None:
    right, left, down, up, still = colorize_flow(
        np.array([[[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]]], np.float32), 1.0
    )[0].astype(int)
    assert right[0] >= 250
    assert right[1:].max() <= 60
    assert left[0] <= 5
    assert left[1:].min() >= 150
    assert down[:2].min() >= 200
    assert down[2] <= 5
    assert up[2] == 255
    assert up[1] == 0
    assert 60 <= up[0] <= 120
    assert still.tolist() == [255, 255, 255]


def test_unknown_flow_is_black_and_sets_no_scale() -> None:
    flow = np.ones((2, 3, 2), np.float32)
    expected = colorize_flow(flow)[0, 0]
    flow[0, 1] = np.nan
    flow[1, 2] = 1e10
    shown = colorize_flow(flow)
    assert not shown[0, 1].any()
    assert not shown[1, 2].any()
    np.testing.assert_array_equal(shown[0, 0], expected)


def test_no_motion_is_white() -> None:
    assert (colorize_flow(np.zeros((4, 5, 2))) == 255).all()
    assert colorize_flow(np.zeros((0, 5, 2))).shape == (0, 5, 3)


def test_mask_overlay() -> None:
    image = np.full((9, 9, 3), 100, np.uint8)
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    shown = colorize_mask(image, mask, colour=(200, 0, 0), opacity=0.5)
    assert shown[4, 4].tolist() == [150, 50, 50]
    assert shown[2, 4].tolist() == [200, 0, 0]
    assert (shown[~mask] == 100).all()
    assert (image == 100).all()


def test_a_mask_is_laid_over_every_layout_of_a_picture() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.random.default_rng(1).random((20, 30)) > 0.5
    expected = colorize_mask(image, mask)
    reversed_twice = np.ascontiguousarray(image[..., ::-1])[..., ::-1]
    for same in (reversed_twice, np.asfortranarray(image), np.dstack([image, image])[..., :3]):
        np.testing.assert_array_equal(colorize_mask(same, mask), expected)
    np.testing.assert_array_equal(colorize_mask(image, np.zeros_like(mask)), image)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="depth"):
        colorize_depth(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="flow"):
        colorize_flow(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="max_magnitude"):
        colorize_flow(np.zeros((2, 2, 2)), 0.0)
    with pytest.raises(ValueError, match="mask"):
        colorize_mask(np.zeros((2, 2, 3), np.uint8), np.zeros((3, 2), bool))
