"""Many members, one answer: mean, median, and median compilation, which first fits the members to one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput

Reduction = Literal["mean", "median", "aligned_median"]
Maps = NDArray[np.floating[Any]]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Objective = Callable[[Float64], tuple[float, Float64]]
Aligner = Callable[[Maps], tuple[Float64, Float64]]
Spread = Callable[[], Float32]

REGULARIZER_STRENGTH = 0.02
MIN_RANGE = 1e-6
MIN_CONTRAST = 0.5
# The cost has corners (two members that coincide, or tie for the median, or a merged map that ends exactly at 0 or 1),
# and clipped maps sit in them. Rounded off, the fit does not jump when the input moves by a rounding error.
ROUND_DISTANCE = 1e-4
ROUND_END = 2e-3
ROUND_TIE = 1e-4
MOST_EXCHANGED = 64
# As SciPy stops its line search, which diffusers runs: so the few iterations lead to the same place.
SUFFICIENT_DECREASE, CURVATURE = 1e-4, 0.9


def reduce(maps: Maps, reduction: Reduction) -> tuple[Float32, Float32]:
    """Members [N, H, W] or [N, H, W, 2] -> (map [H, W] or [H, W, 2], uncertainty [H, W]), float32, in the maps' units.

    `mean`: with the standard deviation. `median`: with the median absolute deviation (MAD). `aligned_median`: see
    `aligned_median`; only for [N, H, W]. Of vectors, the uncertainty is the length over the components (px for flow).
    One member: itself, with uncertainty 0. Raises InvalidInput for other shapes, no member, or an unknown reduction.
    """
    merged, spread = _reduced(maps, reduction)
    return merged, spread()


def merge(maps: Maps, reduction: Reduction) -> Float32:
    """The map of `reduce`, for who needs no uncertainty."""
    return _reduced(maps, reduction)[0]


def _reduced(maps: Maps, reduction: Reduction) -> tuple[Float32, Spread]:
    """The map, and its uncertainty for who asks."""
    _check(maps)
    if reduction == "aligned_median":
        return _aligned_median(maps, align)
    if reduction == "mean":
        mean = maps.mean(0, dtype=np.float64)
        return mean.astype(np.float32), lambda: _length(maps.std(0, dtype=np.float64))
    if reduction == "median":
        median = _median(maps)
        return median.astype(np.float32), lambda: _length(_median(np.abs(maps - median)))
    raise InvalidInput(f"reduction must be mean, median or aligned_median, not {reduction}", param="reduction")


def _length(spread: Maps) -> Float32:
    """[H, W], or the components [H, W, 2] of vectors -> [H, W]."""
    return (np.linalg.norm(spread, axis=-1) if spread.ndim == 3 else spread).astype(np.float32)


def aligned_median(
    maps: Maps,
    *,
    regularizer_strength: float = REGULARIZER_STRENGTH,
    max_iter: int = 2,
    tol: float = 1e-3,
    max_res: int = 1024,
) -> tuple[Float32, Float32]:
    """Median compilation: members [N, H, W] -> (map, uncertainty), [H, W] float32 each, the map stretched to 0 .. 1.

    The map is the pixelwise median of the aligned members, the lower one of the middle two when N is even; the
    uncertainty their median absolute deviation from it, on the map's scale. A flat map is not stretched. One member:
    itself, as it is, with uncertainty 0. Options as in `align`. Raises InvalidInput unless maps is [N, H, W], N >= 1.
    """
    fitted = partial(align, regularizer_strength=regularizer_strength, max_iter=max_iter, tol=tol, max_res=max_res)
    merged, spread = _aligned_median(maps, fitted)
    return merged, spread()


def _aligned_median(maps: Maps, align: Aligner) -> tuple[Float32, Spread]:
    _check_flat(maps)
    if len(maps) == 1:
        return maps[0].astype(np.float32), lambda: np.zeros(maps.shape[1:], np.float32)
    scales, shifts = align(maps)
    aligned = (scales[:, None, None] * maps + shifts[:, None, None]).astype(np.float32)
    merged = _lower_median(aligned)
    contrast = float(np.ptp(merged))
    span = np.float32(contrast if contrast > MIN_RANGE else 1)
    return (merged - merged.min()) / span, lambda: (_median(np.abs(aligned - merged)) / span).astype(np.float32)


def align(
    maps: Maps,
    *,
    regularizer_strength: float = REGULARIZER_STRENGTH,
    max_iter: int = 2,
    tol: float = 1e-3,
    max_res: int = 1024,
) -> tuple[Float64, Float64]:
    """Scale and shift of each member, [N, H, W] -> ([N], [N]) float64, that bring the members s_i d_i + t_i together.

    Lowers sum_{i<j} rms(s_i d_i + t_i - s_j d_j - t_j) + strength * (|min m| + |1 - max m|), m the members' median,
    from every member stretched to 0 .. 1: Marigold's alignment (2312.02145), as diffusers' `ensemble_depth` has it.
    `max_iter` BFGS iterations: few on purpose, for the cost's minimum is at constant maps. `tol`: largest gradient
    component to stop at. `max_res`: longest edge in pixels to fit at. Raises InvalidInput unless maps is [N, H, W],
    N >= 1.
    """
    _check_flat(maps)
    fit = _Fit.of(_shrink(maps, max_res), regularizer_strength)
    return fit.split(_bfgs(fit.cost, fit.start(), fit.floor(), max_iter, tol))


@dataclass(frozen=True)
class _Fit:
    """The alignment's cost and gradient, from statistics of the members stretched to 0 .. 1.

    stretched: [N, P] float32; its mean [N] and covariance [N, N]. low, span: [N], d_i = low_i + span_i * stretched_i.
    """

    stretched: Float32
    low: Float64
    span: Float64
    mean: Float64
    covariance: Float64
    strength: float

    @classmethod
    def of(cls, maps: Maps, strength: float) -> _Fit:
        flat = maps.reshape(len(maps), -1)
        low = flat.min(1).astype(np.float64)
        span = np.maximum(flat.max(1) - low, MIN_RANGE)
        exact = flat - low[:, None]
        exact /= span[:, None]
        mean = exact.mean(1)
        # Taking off one mean does: and the product of a matrix with itself, so few rows, takes BLAS five times as long.
        covariance = (exact - mean[:, None]) @ exact.T / flat.shape[1]
        return cls(exact.astype(np.float32), low, span, mean, covariance, strength)

    def start(self) -> Float64:
        return np.concatenate([1 / self.span, -self.low / self.span])

    def floor(self) -> Float64:
        """No member may lose more than half of its contrast: below lie constant maps, and then mirrored ones."""
        return np.concatenate([MIN_CONTRAST / self.span, np.full_like(self.low, -np.inf)])

    @staticmethod
    def split(parameters: Float64) -> tuple[Float64, Float64]:
        scales, shifts = np.split(parameters, 2)
        return scales, shifts

    def cost(self, parameters: Float64) -> tuple[float, Float64]:
        """Parameters [2N], scales and then shifts -> (cost, gradient [2N])."""
        scales, shifts = self.split(parameters)
        a, b = scales * self.span, shifts + scales * self.low
        distance, distance_a, distance_b = self.distances(a, b)
        end, end_a, end_b = self.ends(a, b)
        grad_a, grad_b = distance_a + self.strength * end_a, distance_b + self.strength * end_b
        gradient = np.concatenate([grad_a * self.span + grad_b * self.low, grad_b])
        return distance + self.strength * end, gradient

    def distances(self, a: Float64, b: Float64) -> tuple[float, Float64, Float64]:
        """Sum of the pairwise rms distances of a_i u_i + b_i, and its gradient: the pixels enter as covariance only."""
        centre = a * self.mean + b
        product = np.outer(a, a) * self.covariance
        energy = np.diag(product)
        squared = energy[:, None] + energy - 2 * product + np.subtract.outer(centre, centre) ** 2
        rms = np.sqrt(np.maximum(squared, 0) + ROUND_DISTANCE**2)
        weight = 1 / rms
        np.fill_diagonal(weight, 0)
        total = weight.sum(1)
        grad_b = total * centre - weight @ centre
        grad_a = total * a * np.diag(self.covariance) - (weight * self.covariance) @ a + self.mean * grad_b
        return float(np.triu(rms, 1).sum()), grad_a, grad_b

    def ends(self, a: Float64, b: Float64) -> tuple[float, Float64, Float64]:
        """|min m| + |1 - max m| of the merged map m, and a subgradient: through what is m at those ends."""
        merged = _lower_median(a.astype(np.float32)[:, None] * self.stretched + b.astype(np.float32)[:, None])
        cost, grad_a, grad_b = 0.0, np.zeros_like(a), np.zeros_like(b)
        for pixel, target in ((merged.argmin(), 0.0), (merged.argmax(), 1.0)):
            middle = float(np.sort(a * self.stretched[:, pixel] + b)[_middle(len(a))])
            size, slope = _rounded_abs(middle - target)
            columns, share = self.tied(a, b, merged, middle)
            cost += size
            grad_a += slope * (share * columns).sum(1)
            grad_b += slope * share.sum(1)
        return cost, grad_a, grad_b

    def tied(self, a: Float64, b: Float64, merged: Float32, value: float) -> tuple[Float64, Float64]:
        """The members at the K pixels where m is all but `value`, [N, K], and the share of each in making it so."""
        pixels = np.flatnonzero(np.abs(merged - value) < ROUND_TIE)
        columns = self.stretched[:, pixels].astype(np.float64)
        share = np.maximum(1 - np.abs(a[:, None] * columns + b[:, None] - value) / ROUND_TIE, 0)
        share *= 1 - np.abs(merged[pixels] - value) / ROUND_TIE
        return columns, share / share.sum()


def _rounded_abs(x: float) -> tuple[float, float]:
    """|x| and its slope, with a parabola for a corner."""
    if abs(x) >= ROUND_END:
        return abs(x), float(np.sign(x))
    return (x * x / ROUND_END + ROUND_END) / 2, x / ROUND_END


def _bfgs(objective: Objective, x: Float64, floor: Float64, max_iter: int, tol: float) -> Float64:
    """Quasi-Newton descent (Nocedal & Wright algorithm 6.1) from the identity, as far as max_iter iterations go."""
    cost, gradient = objective(x)
    inverse, gain = np.eye(len(x)), float(np.linalg.norm(gradient)) / 2
    for _ in range(max_iter):
        if np.abs(gradient).max() <= tol:
            break
        direction = -inverse @ gradient
        slope = float(gradient @ direction)
        # The first trial expects the last iteration's gain again.
        first = min(1.0, 2.02 * gain / -slope) if gain > 0 else 1.0
        furthest = _room(x, direction, floor)
        found = _line_search(objective, _Point(0, cost, slope, x, gradient), direction, min(first, furthest), furthest)
        if found is None:
            break
        inverse = _updated(inverse, found.x - x, found.gradient - gradient)
        x, cost, gradient, gain = found.x, found.cost, found.gradient, cost - found.cost
    return x


def _room(x: Float64, direction: Float64, floor: Float64) -> float:
    """How far x may go in a direction before a component falls below its floor."""
    falling = direction < 0
    return float(np.min((floor - x)[falling] / direction[falling], initial=np.inf))


def _updated(inverse: Float64, moved: Float64, change: Float64) -> Float64:
    """The inverse Hessian after a step (Nocedal & Wright eq. 6.17); as it was where the curvature is not positive."""
    curvature = moved @ change
    if curvature <= 0:
        return inverse
    left = np.eye(len(moved)) - np.outer(moved, change) / curvature
    updated: Float64 = left @ inverse @ left.T + np.outer(moved, moved) / curvature
    return updated


@dataclass(frozen=True)
class _Point:
    """A point on the line: how far along, its cost and slope there, and the parameters and gradient behind them."""

    at: float
    cost: float
    slope: float
    x: Float64
    gradient: Float64


def _line_search(
    objective: Objective, start: _Point, direction: Float64, first: float, furthest: float
) -> _Point | None:
    """A point that meets the strong Wolfe conditions, or the furthest allowed, by the interpolations of More & Thuente
    (1994); the best point seen if 20 trials find none; None if nothing is better than the start."""
    best, other, at = start, None, first
    for _ in range(20 if furthest > 0 else 0):
        x = start.x + at * direction
        cost, gradient = objective(x)
        point = _Point(at, cost, float(gradient @ direction), x, gradient)
        low_enough = cost <= start.cost + SUFFICIENT_DECREASE * at * start.slope
        if low_enough and (abs(point.slope) <= CURVATURE * abs(start.slope) or at >= furthest):
            return point
        best, other, at = _narrow(best, other, point)
        at = min(at, furthest)
        if at == best.at:
            break
    return best if best.at > 0 else None


def _narrow(best: _Point, other: _Point | None, point: _Point) -> tuple[_Point, _Point | None, float]:
    """The lower end of the interval, its other end (None: not yet found), and where to look next."""
    cubic = _cubic_minimum(best, point)
    if point.cost > best.cost:
        quadratic = _quadratic_minimum(best, point)
        nearer = abs(cubic - best.at) < abs(quadratic - best.at)
        return best, point, cubic if nearer else (cubic + quadratic) / 2
    if point.slope * best.slope < 0:
        return point, best, max(cubic, _secant(best, point), key=lambda at: abs(at - point.at))
    if other is not None:
        return point, other, _cubic_minimum(point, other)
    stride = point.at - best.at
    ahead = max(cubic, _secant(best, point)) if abs(point.slope) < abs(best.slope) else np.inf
    return point, None, float(np.clip(ahead, point.at + 1.1 * stride, point.at + 4 * stride))


def _cubic_minimum(a: _Point, b: _Point) -> float:
    """Of the cubic with both points' costs and slopes (Nocedal & Wright eq. 3.59)."""
    width = b.at - a.at
    d1 = a.slope + b.slope - 3 * (b.cost - a.cost) / width
    d2 = float(np.copysign(max(d1 * d1 - a.slope * b.slope, 0) ** 0.5, width))
    bend = b.slope - a.slope + 2 * d2
    return b.at - width * (b.slope + d2 - d1) / bend if bend else (a.at + b.at) / 2


def _quadratic_minimum(a: _Point, b: _Point) -> float:
    """Of the parabola with both points' costs and the first one's slope."""
    width = b.at - a.at
    return a.at + width * a.slope / ((a.cost - b.cost) / width + a.slope) / 2


def _secant(a: _Point, b: _Point) -> float:
    """Where a straight line through both slopes is zero."""
    return b.at + (a.at - b.at) * b.slope / (b.slope - a.slope)


def _shrink(maps: Maps, max_res: int) -> Maps:
    """The nearest pixels' values, longest edge at most max_res."""
    height, width = maps.shape[1:]
    longest = max(height, width)
    if longest <= max_res:
        return maps
    rows, columns = (_nearest(edge, max(1, edge * max_res // longest)) for edge in (height, width))
    return maps[:, rows[:, None], columns]


def _nearest(size: int, fewer: int) -> NDArray[np.int64]:
    """For each of fewer pixels, the one of size whose middle is nearest."""
    return ((np.arange(fewer) + 0.5) * size / fewer).astype(np.int64)


def _middle(count: int) -> int:
    return (count - 1) // 2


def _lower_median(members: Float32) -> Float32:
    """Over the first axis; of an even number the lower of the middle two, so that it is always one of the members."""
    return _smallest(members, _middle(len(members)) + 1)[-1]


def _median(members: Maps) -> Maps:
    """Over the first axis; of an even number the mean of the middle two."""
    smallest = _smallest(members, len(members) // 2 + 1)
    return smallest[-1] if len(members) % 2 else (smallest[-2] + smallest[-1]) / 2


def _smallest(members: Maps, count: int) -> list[Maps]:
    """[N, ...] -> the `count` smallest of each place, the least first.

    Whole maps are compared and exchanged, a bubble sort that stops early: of 5 members 20 times as fast as NumPy's
    median, which goes across the maps place by place.
    """
    if len(members) > MOST_EXCHANGED:
        return list(np.sort(members, axis=0)[:count])
    maps = list(members)
    for place in range(count):
        for at in range(len(maps) - 1, place, -1):
            low, high = maps[at - 1], maps[at]
            maps[at - 1] = np.minimum(low, high)
            if place + 1 < count:
                maps[at] = np.maximum(low, high)
    return maps[:count]


def _check(maps: Maps) -> None:
    if maps.ndim not in (3, 4) or maps.size == 0:
        raise InvalidInput(f"members must be [N, H, W] or [N, H, W, C], not {list(maps.shape)}", param="maps")


def _check_flat(maps: Maps) -> None:
    _check(maps)
    if maps.ndim != 3:
        raise InvalidInput(
            "aligned_median fits one scale and shift: it needs [N, H, W]; use mean or median", param="reduction"
        )
