"""pix2gestalt's dataset (Ozguroglu et al. 2024): objects cut from photographs, each put behind another.

FOLDER/occlusion/               the picture, with the occluder pasted over the object
FOLDER/visible_object_mask/     what is still seen of the object
FOLDER/whole/                   the whole object, on white
FOLDER/whole_mask/              its mask
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawAmodal

PARTS = ("occlusion", "visible_object_mask", "whole", "whole_mask")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_KEY = re.compile(r"_(?:occlusion|occluded|visible_object_mask|visible_mask|whole_mask|whole|mask)$")


class Pix2Gestalt:
    """`split`: train (the first 99% by name), val (the last 1%) or all, as its own training code cuts it.

    The four files of a sample have one name, or one but for an ending such as _occlusion and _whole_mask. A sample of
    which a part is missing is counted as missing. Where whole_mask/ is not there, the mask is what is not white.
    """

    task = "amodal"
    gap_px = 0.0

    def __init__(self, folder: Path, split: str = "train") -> None:
        if split not in ("train", "val", "all"):
            raise InvalidInput(f"pix2gestalt has the splits train, val and all, not {split!r}", param="split")
        self.folder = folder
        self.parts = {part: _Names(folder / part) for part in PARTS if part != "whole_mask" or (folder / part).is_dir()}
        keys = self.parts["occlusion"].keys
        if not np.isin(keys, self.parts["whole"].keys).any():
            raise InvalidInput(f"{folder}: no picture in occlusion/ has one of the same name in whole/")
        cut = len(keys) * 99 // 100
        self.keys = {"train": keys[:cut], "val": keys[cut:], "all": keys}[split]
        if not len(self.keys):
            raise InvalidInput(f"{folder} has too few samples for a split {split!r}")

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        return f"occlusion/{self.parts['occlusion'].named(self.keys[index])}"

    def read(self, index: int) -> RawAmodal:
        key = self.keys[index]
        names = {part: listed.named(key) for part, listed in self.parts.items()}
        if missing := [part for part, name in names.items() if name is None]:
            raise InvalidInput(f"there is no {' and no '.join(missing)} of {os.fsdecode(key)}")
        paths = {part: self.folder / part / str(name) for part, name in names.items()}
        image, whole_rgb = files.picture(paths["occlusion"]), files.picture(paths["whole"])
        visible = files.mask(paths["visible_object_mask"])
        whole = files.mask(paths["whole_mask"]) if "whole_mask" in paths else _not_white(whole_rgb)
        files.same_size(paths["occlusion"], picture=image, visible=visible, whole=whole_rgb, mask=whole)
        return RawAmodal(image, visible, np.maximum(visible, whole), whole_rgb)


def _not_white(rgb: np.ndarray) -> np.ndarray:
    """[H, W] uint8: 255 where a picture on a white ground is 250 of 255 or darker, as its authors cut it."""
    grey = rgb @ np.array([0.299, 0.587, 0.114])
    return np.where(grey <= 250, 255, 0).astype(np.uint8)


class _Names:
    """Pictures of a folder by key, as bytes in arrays: there are 837 thousand, four times over."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InvalidInput(f"there is no folder {folder}")
        names = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(PICTURES)]
        if not names:
            raise InvalidInput(f"{folder} holds no picture")
        keys = np.array([os.fsencode(_KEY.sub("", Path(name).stem)) for name in names])
        self.keys, first = np.unique(keys, return_index=True)
        self._names = np.array([os.fsencode(name) for name in names])[first]

    def named(self, key: bytes) -> str | None:
        at = int(np.searchsorted(self.keys, key))
        return os.fsdecode(self._names[at]) if at < len(self.keys) and self.keys[at] == key else None
