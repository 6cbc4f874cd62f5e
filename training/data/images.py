"""Pictures with a class, for pretraining: crops of class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from training.data.faults import Faults
from training.data.order import Order
from training.data.raw import RawClass
from training.data.readers.imagenet import ImageNet
from training.data.together import Together


class ImageClasses:
    """Class folders as ImageNet has them (`training.data.readers.imagenet`), every epoch in its own order.

    The shorter edge is brought to the size, the middle is cut out and every other one mirrored by chance, as DiT's
    recipe does (Peebles and Xie 2023, section 4). `mirror=False` and `shuffle=False` for encoding them once. `threads`
    that read and decode change nothing but the speed.
    """

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        broken_share: float = 0.01,
        mirror: bool = True,
        shuffle: bool = True,
        threads: int = 1,
    ) -> None:
        self.reader = ImageNet(folder)
        self.seed, self.mirror = seed, mirror
        self.faults = Faults("ImageNet", len(self.reader), broken_share)
        self.order = Order(len(self.reader), seed, shuffle)
        self._together = Together(threads)

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def classes(self) -> int:
        return len(self.reader.classes)

    def batch(
        self, first: int, count: int, size: tuple[int, int] | int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Samples `first` .. `first` + `count` over all epochs: pictures [B, 3, H, W] in [-1, 1], labels [B] int64."""
        height, width = size if isinstance(size, tuple) else (size, size)
        if min(height, width, count) < 1:
            raise InvalidInput(f"a batch of {count} pictures of {width} x {height} pixels cannot be had")
        numbered = enumerate(self.order.at(first, count), first)
        rows = self._together.map(lambda at: self._row(at[0], int(at[1]), (height, width)), numbered)
        return np.stack([picture for picture, _ in rows]), np.array([label for _, label in rows], np.int64)

    def _row(self, number: int, index: int, size: tuple[int, int]) -> tuple[NDArray[np.float32], int]:
        raw: RawClass = self.faults.read(index, self.reader.read, self.reader.name)
        rgb = middle(raw.image, size)
        if self.mirror and np.random.default_rng([self.seed, number]).random() < 0.5:
            rgb = rgb[:, ::-1]
        return np.moveaxis(rgb.astype(np.float32) / 127.5 - 1, -1, 0), raw.label


def middle(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H, W, 3] -> the largest middle part of the proportions of `size`, brought to it with antialiasing."""
    from PIL import Image

    height, width = image.shape[:2]
    scale = min(height / size[0], width / size[1])
    tall, wide = size[0] * scale, size[1] * scale
    top, left = (height - tall) / 2, (width - wide) / 2
    out = Image.fromarray(image).resize(
        size[::-1], Image.Resampling.BICUBIC, box=(left, top, min(width, left + wide), min(height, top + tall))
    )
    return np.asarray(out)
