"""Pictures and depth PNGs named pair by pair in a list, as Marigold has them: PICTURE DEPTH [anything else] a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawDepth


class Pairs:
    """`names` are (picture, depth) under `pictures` and `depths`; a depth is a 16-bit PNG, `per_metre` to the metre and
    0 where it is not known. Beyond `far_m` nothing counts as known."""

    task = "depth"

    def __init__(
        self,
        names: list[tuple[str, str]],
        pictures: Path,
        depths: Path,
        per_metre: float,
        far_m: float = float("inf"),
        gap_px: float = 0.0,
    ) -> None:
        if not names:
            raise InvalidInput(f"there is not one pair of a picture and a depth in {pictures}")
        self.names, self.pictures, self.depths = names, pictures, depths
        self.per_metre, self.far_m, self.gap_px = per_metre, far_m, gap_px

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index][1]

    def read(self, index: int) -> RawDepth:
        picture_name, depth_name = self.names[index]
        path = files.within(self.depths, depth_name)
        levels = files.levels(path)
        if levels.ndim != 2 or levels.dtype != np.uint16:
            raise InvalidInput(f"{path.name}: depth must be a grey PNG of 16 bits")
        picture = files.within(self.pictures, picture_name)
        if picture.suffix == ".png" and not picture.exists() and picture.with_suffix(".jpg").exists():
            picture = picture.with_suffix(".jpg")  # recordings are often kept so
        image = files.picture(picture)
        files.same_size(path, picture=image, depth=levels)
        depth = levels.astype(np.float32) / np.float32(self.per_metre)
        known = (levels > 0) & (depth <= self.far_m)
        return RawDepth(image, np.where(known, depth, np.float32(0)), known)


def listed_pairs(path: Path) -> list[tuple[str, str]]:
    """The first two names of every line; a line whose depth is "None" has none and is left out."""
    out = []
    for number, line in enumerate(files.lines(path), 1):
        names = line.split()
        if len(names) < 2:
            raise InvalidInput(f"{path.name}: line {number} does not name a picture and a depth")
        if names[1] != "None":
            files.within(Path(), names[0])
            files.within(Path(), names[1])
            out.append((names[0], names[1]))
    return out
