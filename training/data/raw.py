"""What a dataset says of one sample, in its own size and in honest units, before anything is cropped or coded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RawDepth:
    """image [H, W, 3]; depth [H, W] float32 metres along the optical axis, 0 where not known; known [H, W].

    solid [H, W]: what has a depth that means something for the range (all that is known, if None); a sky is known to be
    beyond everything and not solid.
    """

    image: Picture
    depth: NDArray[np.float32]
    known: Mask
    solid: Mask | None = None


@dataclass(frozen=True)
class RawFlow:
    """image, next_image [H, W, 3]; flow [H, W, 2] float32 pixels, u right, v down, 0 where not known; known [H, W]."""

    image: Picture
    next_image: Picture
    flow: NDArray[np.float32]
    known: Mask


@dataclass(frozen=True)
class RawAmodal:
    """image [H, W, 3]; visible, whole [H, W] uint8, 0..255 as a pixel is covered; object_rgb [H, W, 3], the whole
    object, of which only what lies within `whole` means anything."""

    image: Picture
    visible: Picture
    whole: Picture
    object_rgb: Picture


@dataclass(frozen=True)
class RawClass:
    """image [H, W, 3] and the number of its class."""

    image: Picture
    label: int


Raw = RawDepth | RawFlow | RawAmodal


class Reader(Protocol):
    """One dataset, or one split of it.

    `task` says which Raw comes out. `gap_px`: truth that was measured at points is spread this far around them before
    it is resampled (0: it is dense).
    """

    task: str
    gap_px: float

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How messages call the sample: a path inside the dataset."""
        ...

    def read(self, index: int) -> Raw:
        """Raises InvalidInput for a file that is broken, and OSError for one that is not there."""
        ...
