"""Where pretraining's pictures and classes come from: class folders, shards of latents, or generated scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from training.config import COUNT, SHARE, explained, within
from training.data.images import middle

Pictures = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ImagesConfig:
    """Pictures of classes."""

    kind: Literal["folders", "latents", "scenes"] = explained(
        "folders: ROOT/CLASS/*.jpg, as ImageNet; latents: shards that `saccade encode` wrote; scenes: generated ones, "
        "whose kind is their class",
        "folders",
    )
    path: str = explained("the folder", "")
    mirror: bool = explained("every other picture mirrored (not with latents)", True)
    broken_share: float = explained("share of the files that may be missing or broken before the run stops", 0.01)
    threads: int = explained("for folders: threads that read and decode; batches come out the same", 1)

    def __post_init__(self) -> None:
        within(self, SHARE, "broken_share")
        within(self, COUNT, "threads")


class ClassSource(Protocol):
    """`batch`: rows `first`, `first` + 1, ... of an endless walk, pure in its arguments."""

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, first: int, count: int, size: tuple[int, int]) -> tuple[Pictures, Labels]: ...


class ScenePictures:
    """First frames of generated scenes [B, 3, H, W] in [-1, 1]; class 0 is solid, 1 layered."""

    def __init__(self, folder: Path, seed: int = 0, mirror: bool = True) -> None:
        self.shards = [(sorted(folder.glob(f"{kind}-*")), label) for label, kind in enumerate(("solid", "layered"))]
        self.files = [(shard / "first.npy", label) for shards, label in self.shards for shard in shards]
        if not self.files:
            raise InvalidInput(f"{folder} holds no shard of scenes: run python -m training.scenes.make", param="images")
        self.arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file, _ in self.files]
        self.seed, self.mirror = seed, mirror

    @property
    def classes(self) -> int:
        return len(self.shards)

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def batch(self, first: int, count: int, size: tuple[int, int]) -> tuple[Pictures, Labels]:
        """Every row is drawn anew, by its number alone."""
        pictures, labels = np.empty((count, 3, *size), np.float32), np.empty(count, np.int64)
        for row in range(count):
            rng = np.random.default_rng([self.seed, first + row, 3])
            shard = int(rng.integers(len(self.files)))
            array = self.arrays[shard]
            picture = middle(np.asarray(array[rng.integers(len(array))]), size)
            if self.mirror and rng.random() < 0.5:
                picture = picture[:, ::-1]
            pictures[row], labels[row] = np.moveaxis(picture / np.float32(127.5) - 1, -1, 0), self.files[shard][1]
        return pictures, labels


def open_pictures(config: ImagesConfig, seed: int, *, once: bool = False) -> ClassSource:
    """`once`: in their order and as they are, for encoding. Raises InvalidInput."""
    path = Path(config.path)
    if not config.path or not path.is_dir():
        raise InvalidInput(f"no such folder: {config.path or '(images.path is not given)'}", param="images")
    mirror = config.mirror and not once
    if config.kind == "folders":
        from training.data import ImageClasses

        return ImageClasses(path, seed, config.broken_share, mirror, shuffle=not once, threads=config.threads)
    if config.kind == "scenes":
        return ScenePictures(path, seed, mirror)
    raise InvalidInput("latents are no pictures: name folders or scenes", param="images")
