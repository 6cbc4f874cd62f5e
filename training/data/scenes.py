"""Shards of generated scenes and folders of real depth pictures, mapped and not read."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from saccade.tasks import DepthCoding
from training.data.batch import Batch, Sample, collate
from training.data.coded import code_amodal, code_depth, code_flow
from training.data.raw import RawAmodal, RawDepth, RawFlow

Fields = dict[str, np.ndarray]
OPEN_FILES = 128  # every mapped file keeps a descriptor, of which a process may have few (often 1024, or 256)


class Scenes:
    """`folder` holds shards written by `training.scenes.make`; `real` are folders of NAME.jpg + NAME_depth_mm.png, of
    which `real_share` of the depth samples are drawn; into `in_front` of them a cut-out is put.

    Every batch is drawn anew and independently of all others: there are no epochs, and `first` changes nothing.
    """

    def __init__(
        self,
        folder: Path,
        real: tuple[Path, ...] = (),
        real_share: float = 0.0,
        seed: int = 0,
        in_front: float = 0.0,
        coding: DepthCoding | None = None,
    ) -> None:
        self.solid = sorted(folder.glob("solid-*"))
        self.layered = sorted(folder.glob("layered-*"))
        if not self.solid or not self.layered:
            raise FileNotFoundError(f"{folder} needs shards of both kinds: run python -m training.scenes.make")
        self.real = [p for root in real for p in _depth_files(root)]
        self.real_share = real_share if self.real else 0.0
        self.seed, self.in_front, self.coding = seed, in_front, coding or DepthCoding()

    def batch(self, step: int, task: str, count: int, size: tuple[int, int], first: int | None = None) -> Batch:
        """`count` samples of `task` at (H, W)."""
        rng = np.random.default_rng([self.seed, step, ("depth", "flow", "amodal").index(task)])
        draw = {"depth": self.depth, "flow": self.flow, "amodal": self.amodal}[task]
        return collate([draw(rng, size) for _ in range(count)])

    def depth(self, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
        if rng.random() < self.real_share:
            raw = RawDepth(*read_real(self.real[rng.integers(len(self.real))]))
        else:
            scene = _pick(self.solid, rng, ("first", "depth"))
            depth = scene["depth"].astype(np.float32)
            solid = depth < depth.max()  # the sky is where depth was clipped
            raw = RawDepth(scene["first"], depth, np.ones(depth.shape, bool), solid)

        def cut_out(picture: np.ndarray, depth: np.ndarray, known: np.ndarray) -> None:
            if rng.random() < self.in_front:
                scene = _pick(self.layered, rng, ("whole_rgb", "whole"))
                put_in_front(picture, depth, known, scene["whole_rgb"], scene["whole"], rng)

        return code_depth(raw, rng, size, self.coding, cut_out) or self.depth(rng, size)

    def flow(self, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
        scene = _pick(self.solid if rng.random() < 0.35 else self.layered, rng, ("first", "second", "flow"))
        flow = scene["flow"].astype(np.float32)
        return code_flow(RawFlow(scene["first"], scene["second"], flow, np.ones(flow.shape[:2], bool)), rng, size)

    def amodal(self, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
        if rng.random() < 0.3:
            scene = _pick(self.solid, rng, ("first", "visible", "whole", "whole_rgb", "has_object"))
            if not scene["has_object"]:
                return self.amodal(rng, size)
            scene["picture"] = scene["first"]
        else:
            scene = _pick(self.layered, rng, ("picture", "visible", "whole", "whole_rgb"))
        visible, whole = (scene[k].astype(np.uint8) * 255 for k in ("visible", "whole"))
        return code_amodal(RawAmodal(scene["picture"], visible, whole, scene["whole_rgb"]), rng, size)


@lru_cache(maxsize=OPEN_FILES)
def _open(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _pick(shards: list[Path], rng: np.random.Generator, names: tuple[str, ...]) -> Fields:
    shard = shards[rng.integers(len(shards))]
    arrays = {name: _open(shard / f"{name}.npy") for name in names}
    row = rng.integers(len(arrays[names[0]]))
    return {name: np.asarray(array[row]) for name, array in arrays.items()}


def _depth_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*_depth_mm.png"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no NAME_depth_mm.png")
    return files


def read_real(depth_file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NAME_depth_mm.png -> picture [H, W, 3] uint8 RGB, depth [H, W] float32 metres, known [H, W] bool."""
    import cv2

    beside = depth_file.with_name(depth_file.name.removesuffix("_depth_mm.png") + ".jpg")
    picture = cv2.imread(str(beside), cv2.IMREAD_COLOR)
    depth = cv2.imread(str(depth_file), cv2.IMREAD_UNCHANGED)
    if picture is None or depth is None or depth.shape != picture.shape[:2]:
        raise ValueError(f"{depth_file.name}: no readable picture beside it, or of another size")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), depth.astype(np.float32) / 1000, depth > 0


def put_in_front(
    picture: np.ndarray,
    depth: np.ndarray,
    known: np.ndarray,
    rgb: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Paste an object (`mask` [H, W] bool of `rgb`) upright into a picture with depth, in place, at a random size and
    at a depth between the eye and what it hides; nearer things stay before it."""
    import cv2

    height, width = depth.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    tall = int(rng.uniform(0.2, 0.9) * height)
    wide = min(width, max(2, round(tall * len(columns) / len(rows))))
    top, left = int(rng.integers(height // 8, height)), int(rng.integers(-wide // 3, width - wide // 2))
    rows_in, columns_in = slice(top, min(height, top + tall)), slice(max(0, left), min(width, left + wide))
    cut = np.s_[: rows_in.stop - top, columns_in.start - left : columns_in.stop - left]
    inside = cv2.resize(mask[part].astype(np.uint8) * 255, (wide, tall), interpolation=cv2.INTER_AREA)[cut] > 127
    there = inside & known[rows_in, columns_in]
    if not there.any():
        return
    distance = rng.uniform(0.4, 0.95) * np.median(depth[rows_in, columns_in][there])
    shown = there & (depth[rows_in, columns_in] > distance)
    picture[rows_in, columns_in][shown] = cv2.resize(rgb[part], (wide, tall), interpolation=cv2.INTER_AREA)[cut][shown]
    depth[rows_in, columns_in][shown] = distance
