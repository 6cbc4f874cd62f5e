"""ImageNet, and whatever else lies in class folders: CLASS/NAME.JPEG, the classes numbered in their sorted order.

Also ILSVRC's own layout, ILSVRC/Data/CLS-LOC/train/nXXXXXXXX/*.JPEG, from any folder above it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawClass

PICTURES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm")
_BELOW = ("", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "CLS-LOC/train")


class ImageNet:
    """`folder` holds one folder per class; hidden ones and other files are not looked at."""

    task = "class"
    gap_px = 0.0

    def __init__(self, folder: Path) -> None:
        self.folder = next((at for below in _BELOW if _has_folders(at := folder / below)), folder)
        if not _has_folders(self.folder):
            raise InvalidInput(f"{folder} holds no class folders")
        self.classes = sorted(entry.name for entry in os.scandir(self.folder) if _is_class(entry))
        listed = [_pictures(self.folder / name) for name in self.classes]
        self._names = np.array([os.fsencode(name) for names in listed for name in names])  # a third of what str takes
        self._labels = np.repeat(np.arange(len(listed)), [len(names) for names in listed])
        if not len(self._names):
            raise InvalidInput(f"{self.folder} holds class folders, but no picture in them")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.classes[self._labels[index]]}/{os.fsdecode(self._names[index])}"

    def read(self, index: int) -> RawClass:
        return RawClass(files.picture(self.folder / self.name(index)), int(self._labels[index]))


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _has_folders(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = [entry.name for entry in os.scandir(folder) if _is_class(entry)]
    return bool(names) and not {"ILSVRC", "Data", "CLS-LOC"} & set(names)


def _pictures(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(PICTURES))
