"""KITTI: a car in streets, its truth measured by a laser at points. Flow of 2012 and 2015, and depth.

FOLDER/training/image_2/NNNNNN_10.png, NNNNNN_11.png, flow_occ/NNNNNN_10.png      flow 2015 (2012: colored_0)
FOLDER/{train,val}/DRIVE/proj_depth/groundtruth/image_0X/IIIIIIIIII.png           annotated depth, and beside it
FOLDER/DATE/DRIVE/image_0X/data/IIIIIIIIII.png (or .jpg)                          the raw recordings
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawDepth, RawFlow
from training.data.readers.pairs import Pairs, listed_pairs

PICTURES = ("image_2", "colored_0", "image_0")
FLOW_GAP_PX = 3.0
DEPTH_GAP_PX = 4.0
FAR_M = 80.0
_DEPTH = re.compile(r"(\d{4}_\d{2}_\d{2})(_drive_\d{4}_sync)/proj_depth/groundtruth/(image_0[23])/(\d{10})\.png")


class KITTIFlow:
    """`split`: training (200 pairs in 2015, 194 in 2012; the test set has no truth). `occluded`: also where the second
    frame does not show the point (flow_occ) and not only where it does (flow_noc)."""

    task = "flow"

    def __init__(
        self, folder: Path, split: str = "training", occluded: bool = True, gap_px: float = FLOW_GAP_PX
    ) -> None:
        at = folder / split
        self.pictures = next((at / name for name in PICTURES if (at / name).is_dir()), at / PICTURES[0])
        self.flows = files.listed(at / ("flow_occ" if occluded else "flow_noc"), "*_10.png")
        self.gap_px = gap_px

    def __len__(self) -> int:
        return len(self.flows)

    def name(self, index: int) -> str:
        return f"{self.flows[index].parent.name}/{self.flows[index].name}"

    def read(self, index: int) -> RawFlow:
        from saccade.formats.maps import read_kitti_flow

        path = self.flows[index]
        with files.naming(path):
            flow, known = read_kitti_flow(files.contents(path), max_pixels=files.MAX_PIXELS)
        first = files.picture(self.pictures / path.name)
        second = files.picture(self.pictures / path.name.replace("_10.", "_11."))
        files.same_size(path, picture=first, next=second, flow=flow)
        return RawFlow(first, second, flow, known)


class KITTIDepth(Pairs):
    """`split`: train, val or all of the annotated depth; `names`: a list of pairs instead, such as Eigen's split.

    `raw` and `depths` may lie elsewhere than in `folder`; data_depth_annotated/ and raw/ are looked into by themselves.
    Metres are the PNG's levels / 256; beyond 80 m nothing is taken as known.
    """

    def __init__(
        self,
        folder: Path,
        split: str = "train",
        names: Path | str | None = None,
        raw: Path | str | None = None,
        depths: Path | str | None = None,
        gap_px: float = DEPTH_GAP_PX,
    ) -> None:
        at = Path(depths) if depths else _first_folder(folder / "data_depth_annotated", folder)
        pictures = Path(raw) if raw else _first_folder(folder / "raw", folder / "kitti_raw", folder)
        if names is not None:
            pairs = [(rgb, _split_of(at, depth)) for rgb, depth in listed_pairs(Path(names))]
        else:
            below = "*" if split == "all" else split
            found = files.listed(at, f"{below}/*/proj_depth/groundtruth/image_0[23]/*.png")
            pairs = [(_picture_of(path), path.relative_to(at).as_posix()) for path in found]
        super().__init__(pairs, pictures, at, per_metre=256, far_m=FAR_M, gap_px=gap_px)

    def read(self, index: int) -> RawDepth:
        raw = super().read(index)
        if int(np.count_nonzero(raw.known)) < 16:
            raise InvalidInput(f"{self.name(index)}: hardly a point of it is known")
        return raw


def _first_folder(*folders: Path) -> Path:
    return next((folder for folder in folders if folder.is_dir()), folders[-1])


def _picture_of(depth: Path) -> str:
    """The recording's frame that an annotated depth belongs to."""
    found = _DEPTH.search(depth.as_posix())
    if not found:
        raise InvalidInput(f"{depth} is not named as KITTI's annotated depth is")
    return f"{found[1]}/{found[1]}{found[2]}/{found[3]}/data/{found[4]}.png"


def _split_of(depths: Path, name: str) -> str:
    """A name without its split, as Marigold's lists have it, with the split in which it is found."""
    return next((f"{split}/{name}" for split in ("train", "val") if (depths / split / name).exists()), name)
