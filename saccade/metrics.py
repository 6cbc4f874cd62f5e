"""How far an answer is from the truth: each task's measures, and the alignment its benchmarks use. float64 inside."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput

Map = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Float64 = NDArray[np.float64]

MIN_DEPTH = 1e-3
DELTA = 1.25
OUTLIER_PX, OUTLIER_SHARE = 3.0, 0.05


def align_depth(prediction: Map, truth: Map, valid: Mask) -> Float64:
    """An affine-invariant depth brought onto the truth, [H, W] -> [H, W] float64 in the truth's units, at least 1e-3.

    Scale and shift minimise the squared error over the valid pixels; a constant prediction becomes the truth's mean.
    Raises InvalidInput for shapes that differ, no valid pixel, or a valid truth that is not positive and finite.
    """
    p, g = _depths(prediction, truth, valid)
    centred = p - p.mean()
    variance = centred @ centred
    scale = centred @ g / variance if np.ptp(p) > 0 and variance > 0 else 0.0
    aligned: Float64 = scale * (prediction.astype(np.float64) - p.mean()) + g.mean()
    return np.maximum(aligned, MIN_DEPTH)


def abs_rel(depth: Map, truth: Map, valid: Mask) -> float:
    """Mean of |d - g| / g over valid pixels. d, g: [H, W] in one unit. Raises InvalidInput as `align_depth` does."""
    d, g = _depths(depth, truth, valid)
    return float(np.mean(np.abs(d - g) / g))


def delta1(depth: Map, truth: Map, valid: Mask) -> float:
    """Share of valid pixels with max(d / g, g / d) < 1.25, in 0 .. 1. Raises InvalidInput as `align_depth` does."""
    d, g = _depths(depth, truth, valid)
    # Without a quotient a depth of 0 or below counts as wrong.
    return float(np.mean((d < DELTA * g) & (g < DELTA * d)))


def epe(flow: Map, truth: Map, valid: Mask) -> float:
    """Mean end-point error in pixels over valid pixels. flow, truth: [H, W, 2] px. Raises InvalidInput for shapes that
    differ, no valid pixel, or a valid truth that is not finite."""
    error, _ = _errors_px(flow, truth, valid)
    return float(error.mean())


def fl_all(flow: Map, truth: Map, valid: Mask) -> float:
    """KITTI's share of outliers among valid pixels, in 0 .. 1: wrong by over 3 px and by over 5% of the true motion.

    flow, truth: [H, W, 2] px. A flow that is not a number is an outlier. Raises InvalidInput as `epe` does.
    """
    error, motion = _errors_px(flow, truth, valid)
    return 1 - float(np.mean((error <= OUTLIER_PX) | (error <= OUTLIER_SHARE * motion)))


def iou(mask: Mask, truth: Mask) -> float:
    """Intersection over union of two masks, [H, W] bool; 1 if both are empty. Raises InvalidInput if shapes differ."""
    if mask.shape != truth.shape:
        raise InvalidInput(f"mask is {mask.shape} but truth is {truth.shape}", param="mask")
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def _depths(prediction: Map, truth: Map, valid: Mask) -> tuple[Float64, Float64]:
    p, g = _at_valid(prediction, truth, valid)
    if not g.min() > 0:
        raise InvalidInput("true depth must be positive at every valid pixel", param="truth")
    return p, g


def _errors_px(flow: Map, truth: Map, valid: Mask) -> tuple[Float64, Float64]:
    """End-point error and length of the true motion at the valid pixels, [n] each."""
    f, g = _at_valid(flow, truth, valid)
    return np.hypot(*(f - g).T), np.hypot(*g.T)


def _at_valid(prediction: Map, truth: Map, valid: Mask) -> tuple[Float64, Float64]:
    if prediction.shape != truth.shape or valid.shape != truth.shape[:2]:
        shapes = f"{prediction.shape}, {truth.shape} and {valid.shape}"
        raise InvalidInput(f"prediction, truth and valid do not fit together: {shapes}", param="prediction")
    if not valid.any():
        raise InvalidInput("no valid pixel to measure at", param="valid")
    g = truth[valid].astype(np.float64)
    if not np.isfinite(g).all():
        raise InvalidInput("truth must be finite at every valid pixel", param="truth")
    return prediction[valid].astype(np.float64), g
