"""Fit a picture to a model's size and bring maps back: crop, resize with antialiasing, pad; then the reverse."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Fit:
    """How one picture meets the model. All in pixels; the model's picture is `padded`, its content the top left `size`.

    `source` is the picture's own (H, W); `box` = (top, left, height, width) the part of it that the model sees.
    """

    source: tuple[int, int]
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def plan(
        cls,
        source: tuple[int, int],
        processing_resolution: int,
        multiple: int,
        box: tuple[int, int, int, int] | None = None,
    ) -> Fit:
        """Longer edge of the box to `processing_resolution` (0 keeps it), each edge then padded up to `multiple`."""
        box = box or (0, 0, *source)
        height, width = box[2:]
        factor = processing_resolution / max(height, width) if processing_resolution else 1.0
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        padded = (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)
        return cls(source, box, size, padded)

    def shrunk(self, longest: int) -> Fit:
        """The same view of the same picture, its longer edge at most `longest` pixels."""
        factor = min(1.0, longest / max(self.source))
        height, width = (max(1, round(edge * factor)) for edge in self.source)
        top, left = min(round(self.box[0] * factor), height - 1), min(round(self.box[1] * factor), width - 1)
        tall, wide = (max(1, round(edge * factor)) for edge in self.box[2:])
        box = (top, left, min(tall, height - top), min(wide, width - left))
        return replace(self, source=(height, width), box=box)

    def picture(self, rgb: NDArray[np.uint8]) -> Array:
        """[H, W, 3] uint8 -> [3, h, w] float32 in [-1, 1], padded by repeating the last row and column."""
        resized = Image.fromarray(rgb[self.inside]).resize(self.size[::-1], Image.Resampling.BICUBIC)
        scaled = np.asarray(resized, np.float32).transpose(2, 0, 1) / 127.5 - 1
        return self._pad(scaled)

    def mask(self, mask: NDArray[np.bool_]) -> Array:
        """[H, W] bool -> [3, h, w] float32, -1 outside and 1 inside, soft where a pixel is partly covered."""
        coverage = resize(mask[self.inside].astype(np.float32), self.size)
        return self._pad(np.repeat(coverage[None] * 2 - 1, 3, axis=0))

    def content(self, planes: Array) -> Array:
        """[..., h, w] of the model -> [..., h', w'] without the padding."""
        return planes[..., : self.size[0], : self.size[1]]

    def restore(self, plane: Array) -> Array:
        """[h', w'] content -> [H, W] of the source; 0 where the model did not look."""
        inner = self.to_box(plane)
        if inner.shape == self.source:
            return inner
        full = np.zeros(self.source, np.float32)
        full[self.inside] = inner
        return full

    def to_box(self, plane: Array) -> Array:
        """[h', w'] content -> the size of the box."""
        return resize(plane, self.box[2:])

    @property
    def inside(self) -> tuple[slice, slice]:
        """Where in the source the box is."""
        top, left, height, width = self.box
        return slice(top, top + height), slice(left, left + width)

    def unresized(self) -> Fit:
        """The same with the content for the picture, which needs no resizing."""
        return replace(self, source=self.size, box=(0, 0, *self.size))

    def _pad(self, planes: Array) -> Array:
        (height, width), (padded_height, padded_width) = self.size, self.padded
        return np.pad(planes, ((0, 0), (0, padded_height - height), (0, padded_width - width)), mode="edge")


def resize(plane: Array, size: tuple[int, int]) -> Array:
    """[h, w] float32 -> [size] float32, bilinear, antialiased when shrinking."""
    plane = plane.astype(np.float32, copy=False)
    if plane.shape == size:
        return plane
    if plane.shape[0] <= size[0] and plane.shape[1] <= size[1]:
        return _stretch(_stretch(plane, 1, size[1]), 0, size[0])
    return np.asarray(Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR))


def _stretch(plane: Array, axis: int, edge: int) -> Array:
    """One edge of [h, w] longer, as Pillow does it but for rounding, in half the time."""
    at = np.clip((np.arange(edge) + 0.5) * plane.shape[axis] / edge - 0.5, 0, plane.shape[axis] - 1)
    below = at.astype(np.intp)
    share = (at - below).astype(np.float32)
    stretched: Array = plane.take(below, axis)
    step = plane.take(np.minimum(below + 1, plane.shape[axis] - 1), axis)
    step -= stretched
    step *= share if axis == 1 else share[:, None]
    stretched += step
    return stretched


def context_box(mask: NDArray[np.bool_], context: float) -> tuple[int, int, int, int]:
    """Bounding box (top, left, height, width) of a non-empty mask, widened on every side by `context` times its longer
    side and cut at the picture's border."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    margin = round(context * max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
    top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - margin)
    bottom = min(mask.shape[0], int(rows[-1]) + 1 + margin)
    right = min(mask.shape[1], int(columns[-1]) + 1 + margin)
    return top, left, bottom - top, right - left
