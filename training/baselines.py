"""What needs no model: the trivial and classical answers that the evaluation protocol sets beside a model's.

Every function gives a prediction in the same form as a model's: depth [H, W] float32 of any scale and shift, flow
[H, W, 2] float32 in pixels, mask [H, W] bool. Those that look at the truth say so; they are bounds, not methods.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Depth = NDArray[np.float32]
Flow = NDArray[np.float32]
Mask = NDArray[np.bool_]
Picture = NDArray[np.uint8]

_DIS_PRESETS = {"fast": cv2.DISOPTICAL_FLOW_PRESET_FAST, "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM}


def constant_depth(size: tuple[int, int]) -> Depth:
    """[H, W], the same everywhere: the protocol's fit makes it the mean of the true depth."""
    return np.zeros(size, np.float32)


def median_depth(truth: Depth, valid: Mask) -> Depth:
    """[H, W], the median of the true depth: to be scored as it stands, without a fit. Sterner than the mean in AbsRel,
    which weighs near things more. Looks at the truth."""
    return np.full(truth.shape, np.median(truth[valid]), np.float32)


def vertical_ramp(size: tuple[int, int]) -> Depth:
    """[H, W], 0 in the bottom row and 1 in the top one: the ground recedes upwards."""
    height, width = size
    return np.repeat(np.linspace(1, 0, height, dtype=np.float32)[:, None], width, axis=1)


def zero_flow(size: tuple[int, int]) -> Flow:
    """[H, W, 2]: nothing moves."""
    return np.zeros((*size, 2), np.float32)


def median_flow(truth: Flow, valid: Mask) -> Flow:
    """[H, W, 2]: everything moves by the median u and the median v of the true flow, picture by picture: the best that
    one motion for the whole picture can do, nearly. Looks at the truth."""
    return np.broadcast_to(np.median(truth[valid], axis=0).astype(np.float32), truth.shape).copy()


def farneback_flow(image: Picture, next_image: Picture) -> Flow:
    """RGB frames [H, W, 3] -> [H, W, 2]; polynomial expansion with the parameters of OpenCV's own example (Farneback,
    Two-Frame Motion Estimation Based on Polynomial Expansion, 2003)."""
    frames = _gray(image), _gray(next_image)
    flow = cv2.calcOpticalFlowFarneback(*frames, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
    return np.asarray(flow, np.float32)


def dis_flow(image: Picture, next_image: Picture, preset: Literal["fast", "medium"] = "medium") -> Flow:
    """RGB frames [H, W, 3] -> [H, W, 2]; Kroeger et al., Fast Optical Flow using Dense Inverse Search, 2016. `fast` is
    what OpenCV gives who asks for nothing; `medium` is its best."""
    method = cv2.DISOpticalFlow.create(_DIS_PRESETS[preset])
    return np.asarray(method.calc(_gray(image), _gray(next_image), None), np.float32)  # type: ignore[call-overload]


def visible_mask(visible: Mask) -> Mask:
    """[H, W]: nothing is hidden."""
    return visible


def convex_hull(visible: Mask) -> Mask:
    """[H, W]: every pixel in the convex hull of the visible ones' centres; an empty mask stays empty."""
    hull = np.zeros(visible.shape, np.uint8)
    points = np.argwhere(visible)[:, ::-1].astype(np.int32)
    if len(points):
        cv2.fillConvexPoly(hull, cv2.convexHull(points), 1)
    return hull.astype(bool)


def _gray(rgb: Picture) -> Picture:
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)
