"""From affine-invariant depth to metres, by a few pixels whose distance is known. NumPy alone.

The prediction p and the distance m of a pixel are bound by m = scale * p + shift; known pixels give the two. People's
known pixels hold gross errors (a mistyped number, a point beside an edge), so the fit is an MM-type estimate: least
median of squares (Rousseeuw 1984) finds the line that half of the points agree on, whatever the other half says, then
Tukey's biweight with that line's residual scale (Yohai 1987) averages the noise of those that agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saccade.errors import MetresUndetermined

Points = Sequence[tuple[float, float, float]]
Float64 = NDArray[np.float64]

MIN_POINTS, MAX_POINTS = 2, 10_000
PARAM = "known_depths"
MIN_SPAN = 0.02
_PAIRS, _JUDGES = 3000, 600
_BIWEIGHT, _INLIER = 4.685, 2.5
_ROUNDS = 30
_SIGMAS = 3.0


@dataclass(frozen=True)
class Metres:
    """m = scale * p + shift, both in metres. `residual_m`: median |error| over all points. `inliers` of `points` agree
    with the fit: they lie within 2.5 robust standard deviations of it."""

    scale: float
    shift: float
    residual_m: float
    inliers: int
    points: int


def check(points: Points, size: tuple[int, int]) -> None:
    """Refuse what can be refused before anything is predicted. `size`: the picture's (H, W) in pixels.

    Raises MetresUndetermined for under 2 points, one outside of the picture, or a distance that is not over 0.
    """
    height, width = size
    if len(points) < MIN_POINTS:
        raise _undetermined(f"{len(points)} given, and two unknowns need at least {MIN_POINTS}. Add points.")
    for number, (x, y, metres) in enumerate(points):
        if not (0 <= x < width and 0 <= y < height):
            raise _undetermined(
                f"point {number} at ({x:g}, {y:g}) is outside the picture of {width} x {height} px. Give x, then y."
            )
        if not 0 < metres < np.inf:
            raise _undetermined(f"point {number} is {metres:g} m away. Give distances over 0.")


def fit_points(prediction: NDArray[np.float32], points: Points, size: tuple[int, int]) -> Metres:
    """The fit of a prediction [H', W'] by points (x, y, metres) in pixels of the picture of `size` (H, W).

    Pixel (0, 0) is the middle of the top left one; a point takes the value of the pixel it is nearest to. Raises
    MetresUndetermined as `check` and `fit` do.
    """
    check(points, size)
    x, y, known = np.asarray(points, np.float64).T
    rows, columns = (_nearest(at, of, to) for at, of, to in zip((y, x), size, prediction.shape, strict=True))
    return fit(prediction[rows, columns].astype(np.float64), known)


def to_metres(prediction: NDArray[np.float32], metres: Metres) -> NDArray[np.float32]:
    """[H, W] affine-invariant -> [H, W] in metres; nothing is nearer than 0."""
    depth: NDArray[np.float32] = np.float32(metres.scale) * prediction + np.float32(metres.shift)
    return np.maximum(depth, 0, out=depth)


def fit(predicted: Float64, known: Float64) -> Metres:
    """The robust line through (predicted [n], metres [n]), n >= 2; the same points give the same line, in any order.

    (n - 2) // 2 of the points may be arbitrarily wrong. Raises MetresUndetermined where the points that agree
    lie at one predicted depth, say that far is near, or scatter so much that the scale could be 0.
    """
    order = np.lexsort((known, predicted))
    p, m = predicted[order], known[order]
    if np.ptp(p) < MIN_SPAN:
        raise _undetermined(_ONE_DEPTH)
    scale, shift = _least_median(p, m)
    sigma = _spread(p, m, scale, shift)
    scale, shift, weights = _biweight(p, m, scale, shift, sigma)
    error = np.abs(m - scale * p - shift)
    agree = error <= _INLIER * sigma
    _judge(p, scale, error, agree, weights)
    return Metres(float(scale), float(shift), float(np.median(error)), int(agree.sum()), len(p))


_ONE_DEPTH = (
    f"they lie at one predicted depth (within {MIN_SPAN:.0%} of the prediction's range), so nothing tells the scale. "
    "Add points that are nearer or farther."
)


def _judge(p: Float64, scale: float, error: Float64, agree: NDArray[np.bool_], weights: Float64) -> None:
    """Raise unless the points that agree determine a scale over 0, which is some standard errors away from 0."""
    if np.ptp(p[agree]) < MIN_SPAN:
        raise _undetermined(f"of {len(p)} only {agree.sum()} agree, and {_ONE_DEPTH}")
    if scale <= 0:
        raise _undetermined("what they call far is predicted near. Check the distances, and that x comes before y.")
    total = weights.sum()
    leverage = weights @ (p - weights @ p / total) ** 2
    variance = weights @ error**2 / max(total - 2, 0.5)
    if len(p) > MIN_POINTS and scale**2 * leverage < _SIGMAS**2 * variance:
        raise _undetermined("they scatter more than they agree with the prediction. Check them, or add better ones.")


def _undetermined(reason: str) -> MetresUndetermined:
    return MetresUndetermined(f"the points cannot determine metres: {reason}", param=PARAM)


def _least_median(p: Float64, m: Float64) -> tuple[float, float]:
    """The line through two points with the least h-th smallest |error|, h just over half: all pairs of few points, a
    fixed random sample of many."""
    first, second = _pairs(p)
    scales = (m[second] - m[first]) / (p[second] - p[first])
    shifts = m[first] - scales * p[first]
    judges = np.linspace(0, len(p) - 1, min(len(p), _JUDGES)).astype(np.intp)
    errors = np.abs(m[judges] - scales[:, None] * p[judges] - shifts[:, None])
    half = _half(len(judges)) - 1
    best = int(np.partition(errors, half, axis=1)[:, half].argmin())
    return float(scales[best]), float(shifts[best])


def _pairs(p: Float64) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs of points whose predictions differ enough to draw a line through them; at least one."""
    n = len(p)
    if n * (n - 1) // 2 <= _PAIRS:
        first, second = np.triu_indices(n, 1)
    else:
        first, second = np.random.default_rng(0).integers(0, n, (2, _PAIRS))
        first, second = np.append(first, 0), np.append(second, n - 1)  # sorted: the farthest two
    apart = np.abs(p[second] - p[first]) >= MIN_SPAN / 2
    return first[apart], second[apart]


def _half(n: int) -> int:
    """How many points the least median asks to agree: of 2 both, of 3 all, of many half."""
    return min(n, (n + 3) // 2)


def _spread(p: Float64, m: Float64, scale: float, shift: float) -> float:
    """Robust standard deviation about the line, with Rousseeuw's factor for few points; never quite 0."""
    n, error = len(p), np.abs(m - scale * p - shift)
    half = _half(n) - 1
    floor = 1e-4 * float(np.median(np.abs(m)))
    few = 1 + 5 / (n - 2) if n > MIN_POINTS else 1.0
    return max(1.4826 * few * float(np.partition(error, half)[half]), floor)


def _biweight(p: Float64, m: Float64, scale: float, shift: float, sigma: float) -> tuple[float, float, Float64]:
    """Iteratively reweighted least squares with Tukey's biweight: (scale, shift, weights [n])."""
    weights = np.ones_like(p)
    for _ in range(_ROUNDS):
        share = (m - scale * p - shift) / (_BIWEIGHT * sigma)
        weights = np.where(np.abs(share) < 1, (1 - share**2) ** 2, 0.0)
        found = _weighted_line(p, m, weights)
        if found is None:
            break
        moved = abs(found[0] - scale) + abs(found[1] - shift)
        scale, shift = found
        if moved <= 1e-12 * (abs(scale) + abs(shift)):
            break
    return scale, shift, weights


def _weighted_line(p: Float64, m: Float64, weights: Float64) -> tuple[float, float] | None:
    """Weighted least squares; None where the weighted points lie at one p."""
    total = weights.sum()
    if not total > 0:
        return None
    mean_p, mean_m = weights @ p / total, weights @ m / total
    variance = weights @ (p - mean_p) ** 2
    if not variance > 1e-12 * total:
        return None
    scale = float(weights @ ((p - mean_p) * (m - mean_m)) / variance)
    return scale, float(mean_m - scale * mean_p)


def _nearest(at: Float64, of: int, to: int) -> NDArray[np.intp]:
    """Positions in a picture of `of` pixels -> indices into a map of `to`."""
    scaled = (at + 0.5) * to / of - 0.5
    return np.clip(np.rint(scaled), 0, to - 1).astype(np.intp)
