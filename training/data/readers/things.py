"""FlyingThings3D (Mayer et al. 2016): rendered scenes of 540 x 960, ten frames each, exact flow as PFM.

    FOLDER/frames_{clean,final}pass/{TRAIN,TEST}/{A,B,C}/SSSS/{left,right}/FFFF.png (or .webp)
    FOLDER/optical_flow/{TRAIN,TEST}/{A,B,C}/SSSS/into_{future,past}/{left,right}/OpticalFlowInto{Future,Past}_FFFF_{L,R}.pfm
or the subset of DispNet and FlowNet 2.0, without its hardest frames:
    FOLDER/{train,val}/image_{clean,final}/{left,right}/NNNNNNN.png
    FOLDER/{train,val}/flow/{left,right}/into_{future,past}/NNNNNNN.flo
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawFlow

MOST_PX = 1000.0  # beyond it a vector is taken as not known: things that pass through the camera
_FLOW = re.compile(r"OpticalFlowInto(?:Future|Past)_(\d{4})_[LR]\.pfm")

Pair = tuple[Path, Path, Path]


class FlyingThings3D:
    """`split`: train or test (the subset's val); `rendering`: clean or final; `camera`: left or right; `past`: flow to
    the frame before in place of the one after.

    A flow whose other frame is not in the sequence (the last one's into the future) is not listed.
    """

    task = "flow"
    gap_px = 0.0

    def __init__(
        self, folder: Path, split: str = "train", rendering: str = "clean", camera: str = "left", past: bool = False
    ) -> None:
        wrong = [
            f"{name} {value!r}"
            for name, value, known in (
                ("split", split, ("train", "test", "val")),
                ("rendering", rendering, ("clean", "final")),
                ("camera", camera, ("left", "right")),
            )
            if value not in known
        ]
        if wrong:
            raise InvalidInput(f"FlyingThings3D has no {' and no '.join(wrong)}")
        self.folder = folder
        listing = _subset if not (folder / "optical_flow").is_dir() else _full
        _there.cache_clear()
        self.pairs: list[Pair] = listing(folder, split, rendering, camera, "past" if past else "future")
        if not self.pairs:
            raise InvalidInput(f"{folder}: no flow of {split}, {rendering}, {camera} has both of its frames")

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][2].relative_to(self.folder).as_posix()

    def read(self, index: int) -> RawFlow:
        one, other, path = self.pairs[index]
        if path.suffix == ".pfm":
            planes = files.pfm(path)
            if planes.ndim != 3:
                raise InvalidInput(f"{path.name}: flow is a PFM of three channels, this one has one")
            planes = planes[..., :2]
        else:
            flow, seen = files.flo(path)
            planes = np.where(seen[..., None], flow, np.float32(np.nan))
        with np.errstate(invalid="ignore"):
            planes = np.where((np.abs(planes) <= MOST_PX).all(-1, keepdims=True), planes, np.float32(np.nan))
        flow, known = files.known_flow(planes)
        first, second = files.picture(one), files.picture(other)
        files.same_size(path, picture=first, next=second, flow=flow)
        return RawFlow(first, second, flow, known)


def _full(folder: Path, split: str, rendering: str, camera: str, way: str) -> list[Pair]:
    part = "TRAIN" if split == "train" else "TEST"
    flows = files.listed(folder / "optical_flow" / part, f"*/*/into_{way}/{camera}/*.pfm")
    pairs: list[Pair] = []
    for path in flows:
        found = _FLOW.fullmatch(path.name)
        if not found:
            continue
        letter, scene = path.parts[-5], path.parts[-4]
        frames = folder / f"frames_{rendering}pass" / part / letter / scene / camera
        number = int(found[1])
        _pair(pairs, frames, f"{number:04d}", f"{number + (1 if way == 'future' else -1):04d}", path)
    return pairs


def _subset(folder: Path, split: str, rendering: str, camera: str, way: str) -> list[Pair]:
    at = folder / ("val" if split == "test" else split)
    frames, pairs = at / f"image_{rendering}" / camera, list[Pair]()
    for path in files.listed(at / "flow" / camera / f"into_{way}", "*.flo"):
        if path.stem.isdigit():
            number = int(path.stem)
            _pair(pairs, frames, f"{number:07d}", f"{number + (1 if way == 'future' else -1):07d}", path)
    return pairs


def _pair(pairs: list[Pair], frames: Path, name: str, other: str, flow: Path) -> None:
    there = _there(frames)
    for suffix in (".png", ".webp"):
        if f"{other}{suffix}" in there:
            pairs.append((frames / f"{name}{suffix}", frames / f"{other}{suffix}", flow))
            return


@lru_cache(maxsize=4)
def _there(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
