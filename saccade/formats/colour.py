"""Maps made visible: depth in Spectral, flow on the Middlebury wheel, a mask laid over its picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# ColorBrewer's 11-class Spectral (Cynthia Brewer, Mark Harrower, Pennsylvania State University).
_SPECTRAL = "9e0142 d53e4f f46d43 fdae61 fee08b ffffbf e6f598 abdda4 66c2a5 3288bd 5e4fa2"
_WHEEL_SEGMENTS = (15, 6, 4, 11, 13, 6)
_WHEEL_CORNERS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0))
_UNKNOWN_FLOW = 1e9


def _spectral_table() -> NDArray[np.uint8]:
    knots = np.array([list(bytes.fromhex(colour)) for colour in _SPECTRAL.split()])
    at, places = np.linspace(0, 10, 256), np.arange(11)
    levels = np.stack([np.interp(at, places, channel) for channel in knots.T], axis=-1)
    return np.asarray(np.rint(levels), np.uint8)


def _flow_wheel() -> NDArray[np.float32]:
    """[55, 3] in 0..1: red, yellow, green, cyan, blue, magenta; more steps where the eye tells more hues apart."""
    corners = np.array(_WHEEL_CORNERS)
    levels = [255 * np.arange(count)[:, None] // count for count in _WHEEL_SEGMENTS]
    spans = [
        start + level * np.sign(end - start)
        for start, end, level in zip(corners[:-1], corners[1:], levels, strict=True)
    ]
    return np.asarray(np.concatenate(spans) / 255, np.float32)


def _refined(wheel: NDArray[np.float32], times: int) -> NDArray[np.float32]:
    """[54 * times + 1, 3]: the wheel with `times` steps for one."""
    at, places = np.linspace(0, len(wheel) - 1, times * (len(wheel) - 1) + 1), np.arange(len(wheel))
    return np.stack([np.interp(at, places, channel) for channel in wheel.T], axis=-1).astype(np.float32)


_BLACK = 256
_SPECTRAL_TABLE = np.pad(_spectral_table(), ((0, 1), (0, 0)))
FLOW_WHEEL = _flow_wheel()
_FINE_WHEEL = _refined(FLOW_WHEEL, 256)


def colorize_depth(depth: NDArray[np.floating]) -> NDArray[np.uint8]:
    """[H, W] in 0 (near) .. 1 (far) -> [H, W, 3] uint8 RGB: near is red, far is violet, not finite is black. Clips."""
    if depth.ndim != 2:
        raise ValueError(f"depth must be [H, W], not {depth.shape}")
    place = np.where(np.isfinite(depth), np.minimum(np.clip(depth, 0, 1) * 256, 255), _BLACK)
    return _SPECTRAL_TABLE.take(place.astype(np.intp), axis=0)


def colorize_flow(flow: NDArray[np.floating], max_magnitude: float | None = None) -> NDArray[np.uint8]:
    """[H, W, 2] (u right, v down, px) -> [H, W, 3] uint8 RGB on the wheel of Baker et al. 2011.

    Hue is direction, white is no motion, full colour is `max_magnitude` px (default: the largest in this flow),
    faster is darkened. Unknown flow (not finite, or over 1e9) is black.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must be [H, W, 2], not {flow.shape}")
    if max_magnitude is not None and not max_magnitude > 0:
        raise ValueError(f"max_magnitude must be over 0, not {max_magnitude}")
    known = (np.abs(flow[..., 0]) < _UNKNOWN_FLOW) & (np.abs(flow[..., 1]) < _UNKNOWN_FLOW)
    u, v = (np.where(known, flow[..., axis], 0).astype(np.float32) for axis in (0, 1))
    magnitude = np.hypot(u, v)
    radius = magnitude / np.float32(max_magnitude or max(magnitude.max(initial=0), 1e-6))
    place = np.rint((np.arctan2(-v, -u) / np.float32(np.pi) + 1) * ((len(_FINE_WHEEL) - 1) / 2)).astype(np.intp)
    colours = np.empty((*known.shape, 3), np.uint8)
    for channel in range(3):
        hue = _FINE_WHEEL[:, channel].take(place)
        colours[..., channel] = 255 * known * np.where(radius <= 1, 1 - radius * (1 - hue), np.float32(0.75) * hue)
    return colours


def colorize_mask(
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    *,
    colour: tuple[int, int, int] = (255, 64, 32),
    opacity: float = 0.5,
) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 and [H, W] bool -> a copy of the image with the mask tinted and its inner edge drawn solid."""
    if mask.shape != image.shape[:2] or image.ndim != 3:
        raise ValueError(f"image must be [H, W, 3] and mask [H, W], not {image.shape} and {mask.shape}")
    levels = np.arange(256)[:, None]
    table = np.rint((1 - opacity) * levels + opacity * np.array(colour, np.float32)).astype(np.uint8)
    tinted = np.array(image, order="C")
    seen = _as_pixels(tinted)[mask].view(np.uint8).reshape(-1, 3)
    mixed = np.stack([table[:, channel].take(seen[:, channel]) for channel in range(3)], axis=-1)
    _as_pixels(tinted)[mask] = _as_pixels(mixed)
    _as_pixels(tinted)[_inner_edge(mask)] = _as_pixels(np.array(colour, np.uint8))
    return tinted


def _as_pixels(picture: NDArray[np.uint8]) -> NDArray[np.void]:
    """[..., 3] as [...] with a pixel for one item, which NumPy takes and puts many times as fast as three: a view, or a
    copy where the picture is not contiguous."""
    pixels: NDArray[np.void] = np.ascontiguousarray(picture).view("V3")[..., 0]
    return pixels


def _inner_edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
