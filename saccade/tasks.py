"""Depth, flow, amodal: what goes in, how a target is coded into planes in about [-1, 1], and back. NumPy alone.

A target is coded into a *target picture* [K, H, W] float32, one plane per quantity. The codec
(`training.models.codec`, the decoder in model_repository/) carries planes to latents and back and knows of no task.

| task   | plane 0            | plane 1            | planes 2.. (where the codec has them) |
|--------|--------------------|--------------------|---------------------------------------|
| depth  | depth, -1 near     | 0                  | 0                                     |
| flow   | u, symlog          | v, symlog          | 0                                     |
| amodal | whole mask, +-1    | luma of the object | its Cb and Cr; white outside          |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TaskName = Literal["depth", "flow", "amodal"]
Array = NDArray[np.float32]


@dataclass(frozen=True)
class DepthCoding:
    """Affine-invariant depth: the 2% and 98% quantiles go to -1 and 1 (the paper's configuration).

    Linear in between, or with a `knee` logarithmic: with x the share of the way from near to far, the code runs as
    log(1 + x / knee), so that near things keep their relative precision where the far ones are very far.
    """

    low: float = 0.02
    high: float = 0.98
    knee: float | None = None

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
            way = np.sign(way) * np.expm1(np.abs(way) * np.log1p(1 / self.knee)) * self.knee
        return np.asarray(way, np.float32)


@dataclass(frozen=True)
class FlowCoding:
    """Symmetric logarithm of displacement, as a share of the longer edge of the model's picture, padding included.

    sign(x) * log(1 + |x| / knee) / log(1 + reach / knee): near zero the code is linear, large motions keep their
    relative precision, `reach` is coded as 1.
    """

    knee: float = 1 / 128
    reach: float = 0.25

    def encode(self, flow_px: Array, longer_edge_px: float) -> Array:
        """Flow [..., 2, H, W] in pixels -> the same shape, coded, clipped to [-1.5, 1.5]."""
        share = np.abs(flow_px) / longer_edge_px
        coded = np.sign(flow_px) * np.log1p(share / self.knee) / np.log1p(self.reach / self.knee)
        clipped: Array = np.clip(coded, -1.5, 1.5).astype(np.float32)
        return clipped

    def decode(self, planes: Array, longer_edge_px: float) -> Array:
        """Coded [..., 2, H, W] -> flow in pixels of the model's picture."""
        clipped = np.clip(planes, -1.5, 1.5)
        share = np.expm1(np.abs(clipped) * np.log1p(self.reach / self.knee)) * self.knee
        flow: Array = (np.sign(clipped) * share * longer_edge_px).astype(np.float32)
        return flow


@dataclass(frozen=True)
class AmodalCoding:
    """The whole object's mask as +-1, and the object itself in YCbCr on a white ground.

    `context`: the model sees the visible part's bounding box, widened by this share of its longer side on every side
    (and never beyond the picture). None shows it the whole picture, as the paper does.
    """

    context: float | None = 0.75

    def encode(self, whole: NDArray[np.bool_], rgb: Array) -> Array:
        """Mask [H, W] and picture [3, H, W] in [-1, 1] -> planes [4, H, W]: mask, Y, Cb, Cr."""
        on_white = np.where(whole, rgb, np.float32(1))
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
