"""MPI Sintel (Butler et al. 2012): 23 scenes of an animated film, 436 x 1024, exact flow; and depth, published later.

FOLDER/training/{clean,final}/SCENE/frame_NNNN.png
FOLDER/training/flow/SCENE/frame_NNNN.flo             to the next frame; the last of a scene has none
FOLDER/training/occlusions/SCENE/frame_NNNN.png       white: not seen in the next frame
FOLDER/training/invalid/SCENE/frame_NNNN.png          white: the flow is not to be trusted
FOLDER/training/depth/SCENE/frame_NNNN.dpt            float32 behind a tag and a size
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawDepth, RawFlow

TAG = 202021.25
SKY_M = 100.0


class Sintel:
    """`rendering`: clean or final; `scenes`: names of scenes, all by default (there is no official split of the
    training set). `occluded`: also pixels that the next frame does not show. Where invalid/ or occlusions/ are not on
    disk, nothing is left out by them."""

    task = "flow"
    gap_px = 0.0

    def __init__(
        self,
        folder: Path,
        rendering: str = "final",
        scenes: Sequence[str] | None = None,
        occluded: bool = True,
    ) -> None:
        self.at, self.rendering = _training(folder, rendering), rendering
        self.occluded = occluded
        self.names = _names(self.at / "flow", ".flo", scenes)
        if not occluded and not (self.at / "occlusions").is_dir():
            raise InvalidInput(f"{self.at} has no occlusions/ to leave out")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"flow/{self.names[index]}.flo"

    def read(self, index: int) -> RawFlow:
        name = self.names[index]
        path = self.at / self.name(index)
        flow, known = files.flo(path)
        pictures = self.at / self.rendering
        first, second = files.picture(pictures / f"{name}.png"), files.picture(pictures / f"{_next(name)}.png")
        files.same_size(path, picture=first, next=second, flow=flow)
        for kind in ["invalid"] if self.occluded else ["invalid", "occlusions"]:
            if (self.at / kind).is_dir():
                hidden = files.mask(self.at / kind / f"{name}.png")
                files.same_size(path, flow=flow, **{kind: hidden})
                known = known & (hidden < 128)
        return RawFlow(first, second, np.where(known[..., None], flow, np.float32(0)), known)


class SintelDepth:
    """Depth of the same frames, in the film's own units (about metres); what lies beyond 100 is sky."""

    task = "depth"
    gap_px = 0.0

    def __init__(self, folder: Path, rendering: str = "final", scenes: Sequence[str] | None = None) -> None:
        self.at, self.rendering = _training(folder, rendering), rendering
        self.names = _names(self.at / "depth", ".dpt", scenes)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"depth/{self.names[index]}.dpt"

    def read(self, index: int) -> RawDepth:
        path = self.at / self.name(index)
        depth = dpt(path)
        image = files.picture(self.at / self.rendering / f"{self.names[index]}.png")
        files.same_size(path, picture=image, depth=depth)
        known = np.isfinite(depth) & (depth > 0)
        return RawDepth(image, np.where(known, depth, np.float32(0)), known, known & (depth < SKY_M))


def dpt(path: Path) -> np.ndarray:
    """[H, W] float32 from Sintel's .dpt. Raises InvalidInput for another file, or one cut short."""
    with files.naming(path):
        data = files.contents(path)
        if len(data) < 12 or struct.unpack_from("<f", data)[0] != TAG:
            raise InvalidInput("is not a .dpt file")
        width, height = struct.unpack_from("<ii", data, 4)
        if not (width > 0 and height > 0 and width * height <= files.MAX_PIXELS):
            raise InvalidInput(f"{width} x {height} pixels cannot be")
        if len(data) != 12 + 4 * width * height:
            raise InvalidInput("is not as long as its header says")
        return np.frombuffer(data, "<f4", width * height, 12).reshape(height, width).astype(np.float32)


def _training(folder: Path, rendering: str) -> Path:
    if rendering not in ("clean", "final"):
        raise InvalidInput(f"Sintel is rendered clean or final, not {rendering!r}", param="rendering")
    return folder / "training" if (folder / "training").is_dir() else folder


def _names(folder: Path, suffix: str, scenes: Sequence[str] | None) -> list[str]:
    found = files.listed(folder, f"*/frame_*{suffix}")
    names = [f"{path.parent.name}/{path.stem}" for path in found if path.stem[6:].isdigit()]
    if scenes is not None:
        wanted = {scenes} if isinstance(scenes, str) else set(scenes)
        if missing := sorted(wanted - {name.split("/")[0] for name in names}):
            raise InvalidInput(f"{folder} has no scene {', '.join(missing)}", param="scenes")
        names = [name for name in names if name.split("/")[0] in wanted]
    return names


def _next(name: str) -> str:
    scene, frame = name.split("/")
    return f"{scene}/frame_{int(frame[6:]) + 1:04d}"
