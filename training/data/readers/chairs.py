"""FlyingChairs (Dosovitskiy et al. 2015): 22872 pairs of 384 x 512 with exact flow.

FOLDER/data/NNNNN_img1.ppm, NNNNN_img2.ppm, NNNNN_flow.flo         (FOLDER may be FlyingChairs_release or above it)
FOLDER/FlyingChairs_train_val.txt                                  a line per pair: 1 training, 2 validation
"""

from __future__ import annotations

from pathlib import Path

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawFlow

SPLIT_FILE = "FlyingChairs_train_val.txt"
_SPLITS = {"train": ("1",), "val": ("2",), "all": ("1", "2")}


class FlyingChairs:
    """`split`: train (22232), val (640) or all; the list lies in the folder, above it, or in data/. A list longer than
    what is on disk leaves the rest as missing."""

    task = "flow"
    gap_px = 0.0

    def __init__(self, folder: Path, split: str = "train") -> None:
        if split not in _SPLITS:
            raise InvalidInput(f"FlyingChairs has the splits {', '.join(_SPLITS)}, not {split!r}", param="split")
        places = (folder / "data", folder / "FlyingChairs_release" / "data", folder)
        self.data = next((at for at in places if at.is_dir()), folder)
        if not self.data.is_dir():
            raise InvalidInput(f"there is no folder {folder}")
        self.numbers = self._numbers(folder, split)
        if not self.numbers:
            raise InvalidInput(f"{folder} holds no pair of the split {split!r}")

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"{self.numbers[index]:05d}_flow.flo"

    def read(self, index: int) -> RawFlow:
        path = self.data / self.name(index)
        flow, known = files.flo(path)
        first, second = (files.picture(self.data / f"{self.numbers[index]:05d}_img{n}.ppm") for n in (1, 2))
        files.same_size(path, picture=first, next=second, flow=flow)
        return RawFlow(first, second, flow, known)

    def _numbers(self, folder: Path, split: str) -> list[int]:
        lists = (at / SPLIT_FILE for at in (folder, self.data, self.data.parent))
        path = next((at for at in lists if at.is_file()), None)
        if path is None and split == "all":
            found = (p.name.removesuffix("_flow.flo") for p in files.listed(self.data, "*_flow.flo"))
            return [int(name) for name in found if name.isdigit()]
        if path is None:
            raise InvalidInput(f"{folder} has no {SPLIT_FILE}, which says what belongs to {split!r}; or ask for 'all'")
        marks = files.lines(path)
        if set(marks) - {"1", "2"}:
            raise InvalidInput(f"{SPLIT_FILE}: a line is 1 or 2, not {sorted(set(marks) - {'1', '2'})[0][:40]!r}")
        return [number for number, mark in enumerate(marks, 1) if mark in _SPLITS[split]]
