"""Depth, flow, amodal: what goes in, how a target is coded into planes in about [-1, 1], and back. NumPy alone.

A target is coded into a *target picture* [K, H, W] float32, one plane per quantity. The codec
(`training.models.codec`, the decoder in model_repository/) carries planes to latents and back and knows of no task.

| task   | plane 0            | plane 1            | planes 2.. (where the codec has them) |
|--------|--------------------|--------------------|---------------------------------------|
| depth  | depth, -1 near     | 0                  | 0                                     |
| flow   | u, symlog          | v, symlog          | 0                                     |
| amodal | whole mask, +-1    | luma of the object | its Cb and Cr; white outside          |

Models from elsewhere code into the three channels of a picture; fields of the codings say so (`channels`, `linear_px`,
`ground`), and a flow in two runs has u in the one picture and v in the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput

TaskName = Literal["depth", "flow", "amodal"]
Array = NDArray[np.float32]


@dataclass(frozen=True)
class DepthCoding:
    """Affine-invariant depth: the 2% and 98% quantiles go to -1 and 1 (the paper's configuration).

    Linear in between, or with a `knee` logarithmic: with x the share of the way from near to far, the code runs as
    log(1 + x / knee), so that near things keep their relative precision where the far ones are very far.
    `channels`: the code is the mean of so many planes. `clip`: no code beyond +-1 (Marigold's).
    """

    low: float = 0.02
    high: float = 0.98
    knee: float | None = None
    channels: int = 1
    clip: bool = False

    def __post_init__(self) -> None:
        _expect(self.channels >= 1, "channels must be at least 1")

    def code(self, planes: Array) -> Array:
        """Target pictures [N, K, H, W] -> the code [N, H, W]."""
        code = _mean(planes, self.channels)
        return np.clip(code, -1, 1) if self.clip else code

    def encode(self, depth: Array, valid: NDArray[np.bool_] | None = None) -> Array:
        """Depth [H, W] (any unit, larger is farther) -> [H, W] in about [-1, 1], the quantiles being those of the
        `valid` pixels; a constant map becomes zeros."""
        seen = depth if valid is None else depth[valid]
        near, far = np.quantile(seen, [self.low, self.high])
        span = max(float(far - near), 1e-6 * max(abs(float(far)), 1e-6))
        way = (depth - near) / span
        if self.knee is not None:
            way = np.sign(way) * np.log1p(np.abs(way) / self.knee) / np.log1p(1 / self.knee)
        coded: Array = np.clip(way * 2 - 1, -1.25, 1.25).astype(np.float32)
        return coded

    def decode(self, plane: Array) -> Array:
        """[..., H, W] coded -> affine depth with 0 at the near quantile and 1 at the far one (not clipped)."""
        way = (plane + 1) / 2
        if self.knee is not None:
            way = np.sign(way) * np.expm1(np.abs(way) * math.log1p(1 / self.knee)) * self.knee
        return np.asarray(way, np.float32)


@dataclass(frozen=True)
class FlowCoding:
    """Symmetric logarithm of displacement, as a share of the longer edge of the model's picture, padding included.

    sign(x) * log(1 + |x| / knee) / log(1 + reach / knee): near zero the code is linear, large motions keep their
    relative precision, `reach` is coded as 1.
    `linear_px`: instead, a displacement of so many pixels is coded as 1, and nothing is clipped. `channels`: of a flow
    in two runs, the code is the mean of so many planes.
    """

    knee: float = 1 / 128
    reach: float = 0.25
    linear_px: float | None = None
    channels: int = 1

    def __post_init__(self) -> None:
        _expect(self.channels >= 1, "channels must be at least 1")
        _expect(self.linear_px is None or self.linear_px > 0, "linear_px must be above 0")

    def code(self, planes: Array, runs: int) -> Array:
        """Target pictures [N * runs, K, H, W] -> the code [N, 2, H, W]: the first two planes of one run's, or the
        first run's for u and the second's for v."""
        if runs == 1:
            return planes[:, :2]
        return _mean(planes, self.channels).reshape(-1, runs, *planes.shape[2:])

    def encode(self, flow_px: Array, longer_edge_px: float) -> Array:
        """Flow [..., 2, H, W] in pixels -> the same shape, coded, clipped to [-1.5, 1.5]."""
        if self.linear_px is not None:
            return np.asarray(flow_px / self.linear_px, np.float32)
        share = np.abs(flow_px) / longer_edge_px
        coded = np.sign(flow_px) * np.log1p(share / self.knee) / np.log1p(self.reach / self.knee)
        clipped: Array = np.clip(coded, -1.5, 1.5).astype(np.float32)
        return clipped

    def decode(self, planes: Array, longer_edge_px: float) -> Array:
        """Coded [..., 2, H, W] -> flow in pixels of the model's picture."""
        if self.linear_px is not None:
            return np.asarray(planes * self.linear_px, np.float32)
        clipped = np.clip(planes, -1.5, 1.5)
        share = np.expm1(np.abs(clipped) * math.log1p(self.reach / self.knee)) * self.knee
        return np.asarray(np.sign(clipped) * share * longer_edge_px, np.float32)


@dataclass(frozen=True)
class AmodalCoding:
    """The whole object's mask as +-1, and the object itself in YCbCr on a white ground.

    `context`: the model sees the visible part's bounding box, widened by this share of its longer side on every side
    (and never beyond the picture). None shows it the whole picture, as the paper does.
    `ground`: there is no plane for the mask; the planes are the object in RGB on white, and it is where their gray
    (0 .. 255) is at most `ground` (pix2gestalt's 250).
    """

    context: float | None = 0.75
    ground: int | None = None

    def __post_init__(self) -> None:
        _expect(self.ground is None or 0 <= self.ground < 255, "ground must be 0 to 254")

    def probability(self, planes: Array) -> Array:
        """Target pictures [N, K, H, W] -> how surely the object is there, [N, H, W] in [0, 1]."""
        if self.ground is None:
            return self.decode_probability(planes[:, 0])
        return (_gray(planes[:, :3]) <= self.ground).astype(np.float32)

    def picture(self, planes: Array) -> Array | None:
        """Target pictures [N, K, H, W] -> the members' mean object, RGB [3, H, W] in [-1, 1]; None: they show none."""
        if self.ground is not None:
            return np.asarray(np.clip(planes[:, :3].mean(0), -1, 1), np.float32)
        return self.decode_rgb(planes[:, 1:4].mean(0)) if planes.shape[1] >= 4 else None

    def encode(self, whole: NDArray[np.bool_], rgb: Array) -> Array:
        """Mask [H, W] and picture [3, H, W] in [-1, 1] -> planes [4, H, W]: mask, Y, Cb, Cr; with a `ground`, RGB."""
        on_white = np.where(whole, rgb, np.float32(1))
        if self.ground is not None:
            return on_white.astype(np.float32)
        mask = np.where(whole, np.float32(1), np.float32(-1))
        return np.concatenate([mask[None], rgb_to_ycbcr(on_white)]).astype(np.float32)

    def decode_probability(self, plane: Array) -> Array:
        """Coded mask plane [..., H, W] -> [0, 1]."""
        return np.clip((plane + 1) / 2, 0, 1).astype(np.float32)

    def decode_rgb(self, planes: Array) -> Array:
        """YCbCr planes [3, H, W] -> RGB [3, H, W] in [-1, 1]."""
        return np.clip(ycbcr_to_rgb(planes), -1, 1)


# BT.601, full range, on values in [-1, 1]; orthogonality is not needed, only that the two invert each other.
_TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_TO_RGB = np.linalg.inv(_TO_YCBCR)


def rgb_to_ycbcr(rgb: Array) -> Array:
    """[3, ...] -> [3, ...]; white is (1, 0, 0)."""
    return np.tensordot(_TO_YCBCR, rgb, axes=1).astype(np.float32)


def ycbcr_to_rgb(ycbcr: Array) -> Array:
    """[3, ...] -> [3, ...]."""
    return np.tensordot(_TO_RGB, ycbcr, axes=1).astype(np.float32)


def _expect(true: bool, told: str) -> None:
    """Raises InvalidInput."""
    if not true:
        raise InvalidInput(told, param="coding")


def _mean(planes: Array, channels: int) -> Array:
    """[N, K, H, W] -> [N, H, W], the mean of the first planes."""
    return planes[:, 0] if channels == 1 else planes[:, :channels].mean(1)


def _gray(rgb: Array) -> Array:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W], as of a picture in a file: whole numbers 0 .. 255, the colours' too."""
    levels = np.clip(np.rint((rgb + 1) * 127.5), 0, 255)
    return np.rint(np.tensordot(_TO_YCBCR[0], levels, axes=(0, 1))).astype(np.float32)


Coding = DepthCoding | FlowCoding | AmodalCoding


@dataclass(frozen=True)
class Task:
    """What a caller must know of a task.

    `prompt`: the second conditioning picture. `reductions`: the ensembles that make sense. `units`: of the prediction.
    """

    name: TaskName
    prompt: Literal["none", "next_image", "mask"]
    reductions: tuple[str, ...]
    units: str


TASKS: dict[TaskName, Task] = {
    "depth": Task("depth", "none", ("aligned_median", "median", "mean"),
                  "affine-invariant depth, 0 nearest, 1 farthest"),
    "flow": Task("flow", "next_image", ("median", "mean"), "pixels of the input, u right, v down"),
    "amodal": Task("amodal", "mask", ("mean", "median"), "1 where the whole object is, 0 elsewhere"),
}  # fmt: skip
