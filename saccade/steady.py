"""A steady scale between the frames of a clip: each frame's depth is fitted to the one before it, along the flow.

Depth of one picture is known up to a scale and a shift, and each picture picks its own: played one after the other,
the answers flicker. Here frame t takes the scale and the shift that bring it onto frame t - 1 where both see the same
points. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saccade.fit import resize

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Picture = NDArray[np.uint8]

# Points that look alike in both frames, in levels of 0..255; a flow that is wrong lands on other colours.
ALIKE = 24.0
# Under this share of alike points the clip has been cut, or nothing of the last frame is left: a new scale begins.
LEAST_SHARED = 0.3
_ROUNDS, _INLIER = 5, 2.5
_MIN_SPREAD = 1e-4


@dataclass(frozen=True)
class Affine:
    """d -> scale * d + shift."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, depth: Array) -> Array:
        return np.float32(self.scale) * depth + np.float32(self.shift)

    def then(self, last: Affine) -> Affine:
        return Affine(last.scale * self.scale, last.scale * self.shift + last.shift)


@dataclass(frozen=True)
class Steadied:
    """`maps`: N depths [H, W] in 0 .. 1 over each shot. `fits`: what was done to each. `shots`: the first frame of each
    stretch with one scale."""

    maps: list[Array]
    fits: list[Affine]
    shots: list[int]


def steady(depths: Sequence[Array], pictures: Sequence[Picture], flows: Sequence[Array]) -> Steadied:
    """Depths [H, W] and pictures [H, W, 3] of N frames, and N - 1 flows [h, w, 2] from each frame *back* to the one
    before it, in pixels of the flow's own size."""
    fits, shots = [Affine()], [0]
    for index, flow in enumerate(flows, 1):
        link = between(depths[index - 1 : index + 1], pictures[index - 1 : index + 1], flow)
        if link is None:
            shots.append(index)
        fits.append(Affine() if link is None else link.then(fits[-1]))
    fits = _stretched(depths, fits, shots)
    return Steadied([fit(depth) for fit, depth in zip(fits, depths, strict=True)], fits, shots)


def between(depths: Sequence[Array], pictures: Sequence[Picture], flow: Array) -> Affine | None:
    """What brings the second depth onto the first, of two frames and the flow [h, w, 2] from the second back to the
    first; None where they share too little."""
    size = (flow.shape[0], flow.shape[1])
    before, now = (resize(depth, size) for depth in depths)
    there, seen = warp(before, flow)
    seen &= alike(pictures, flow)
    return fit(now[seen], there[seen]) if seen.mean() >= LEAST_SHARED else None


def warp(plane: Array, flow: Array) -> tuple[Array, Mask]:
    """plane [h, w] at x + flow(x), bilinear: ([h, w], where that is inside)."""
    height, width = plane.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left, top = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    dx, dy = x - left, y - top
    upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
    lower = plane[bottom, left] * (1 - dx) + plane[bottom, right] * dx
    return (upper * (1 - dy) + lower * dy).astype(np.float32), inside


def alike(pictures: Sequence[Picture], flow: Array) -> Mask:
    """[h, w]: where the flow leads from the second picture to like colours in the first, but for exposure."""
    size = (flow.shape[0], flow.shape[1])
    total = np.zeros(size, np.float32)
    for channel in range(3):
        first, second = (resize(picture[..., channel].astype(np.float32), size) for picture in pictures)
        there, _ = warp(first, flow)
        difference = second - there
        total += np.abs(difference - np.median(difference))
    return np.asarray(total < 3 * ALIKE)


def fit(now: Array, before: Array) -> Affine:
    """The line that brings `now` [n] onto `before` [n], with what does not follow it left out.

    The scale is the ratio of the two spreads, not a regression's: that one, dividing by a noisy variable, shrinks a
    little every time, and over a clip the little multiply.
    """
    x, y = now.astype(np.float64), before.astype(np.float64)
    found = _by(np.median(x), np.median(y), _mad(x), _mad(y))
    for _ in range(_ROUNDS):
        error = np.abs(y - found.scale * x - found.shift)
        kept = error <= max(_INLIER * 1.4826 * float(np.median(error)), _MIN_SPREAD)
        found = _by(x[kept].mean(), y[kept].mean(), x[kept].std(), y[kept].std())
    return found


def _by(x: np.floating, y: np.floating, spread_x: np.floating, spread_y: np.floating) -> Affine:
    scale = float(spread_y / spread_x) if min(spread_x, spread_y) > _MIN_SPREAD else 1.0
    return Affine(scale, float(y - scale * x))


def _mad(values: NDArray[np.float64]) -> np.floating:
    return np.median(np.abs(values - np.median(values)))


def _stretched(depths: Sequence[Array], fits: Sequence[Affine], shots: Sequence[int]) -> list[Affine]:
    """The same fits, each shot as a whole brought to 0 .. 1."""
    stretched: list[Affine] = []
    for first, end in zip(shots, [*shots[1:], len(depths)], strict=True):
        ends = [(fits[i].scale * float(depths[i].min()) + fits[i].shift,
                 fits[i].scale * float(depths[i].max()) + fits[i].shift) for i in range(first, end)]  # fmt: skip
        near, far = min(low for low, _ in ends), max(high for _, high in ends)
        span = far - near if far > near else 1.0
        stretched += [fit.then(Affine(1 / span, -near / span)) for fit in fits[first:end]]
    return stretched
