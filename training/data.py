"""Training batches from shards of generated scenes and folders of real depth pictures.

A batch is a pure function of (seed, step, task, size) and of the shards on disk, so a resumed run sees what it would
have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from saccade.tasks import AmodalCoding, DepthCoding, FlowCoding

Fields = dict[str, np.ndarray]
PLANES = 4
OPEN_FILES = 128  # every mapped file keeps a descriptor, of which a process may have few (often 1024, or 256)


@dataclass(frozen=True)
class Batch:
    """image, prompt [B, 3, H, W] and target [B, 4, H, W] float32 in about [-1, 1]; weight [B, H/8, W/8] in {0, 1}, zero
    where the truth is unknown."""

    image: NDArray[np.float32]
    prompt: NDArray[np.float32]
    target: NDArray[np.float32]
    weight: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One row of a batch."""

    image: np.ndarray
    prompt: np.ndarray
    target: np.ndarray
    known: np.ndarray


class Scenes:
    """`folder` holds shards written by `training.scenes.make`; `real` are folders of NAME.jpg + NAME_depth_mm.png, of
    which `real_share` of the depth samples are drawn; into `in_front` of them a cut-out is put."""

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

    def batch(self, step: int, task: str, count: int, size: tuple[int, int]) -> Batch:
        """`count` samples of `task` at (H, W)."""
        rng = np.random.default_rng([self.seed, step, ("depth", "flow", "amodal").index(task)])
        draw = {"depth": self.depth, "flow": self.flow, "amodal": self.amodal}[task]
        rows = [draw(rng, size) for _ in range(count)]
        known = np.stack([r.known for r in rows])[:, None].astype(np.float32)
        share = known.reshape(count, size[0] // 8, 8, size[1] // 8, 8).mean((2, 4))
        return Batch(
            *(np.stack([getattr(r, f) for r in rows]) for f in ("image", "prompt", "target")),
            (share > 0.7).astype(np.float32),
        )

    def depth(self, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
        if rng.random() < self.real_share:
            picture, depth, known = read_real(self.real[rng.integers(len(self.real))])
            solid = known
        else:
            scene = _pick(self.solid, rng, ("first", "depth"))
            picture, depth = scene["first"], scene["depth"].astype(np.float32)
            known, solid = np.ones(depth.shape, bool), depth < depth.max()  # the sky is where depth was clipped
        crop = Crop.random(rng, picture.shape[:2], size, least=0.4)
        picture, depth = crop.picture(picture), crop.nearest(depth)
        known, solid = (crop.nearest(mask.astype(np.uint8)) > 0 for mask in (known, solid))
        if rng.random() < self.in_front:
            scene = _pick(self.layered, rng, ("whole_rgb", "whole"))
            put_in_front(picture, depth, known, scene["whole_rgb"], scene["whole"], rng)
        picture = _colours(picture, rng)
        if (known & solid).mean() < 0.2:
            return self.depth(rng, size)
        coded = self.coding.encode(np.where(known, depth, np.median(depth[known])), known & solid)
        return _sample(picture, np.full_like(picture, 127.5), [coded], known)

    def flow(self, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
        scene = _pick(self.solid if rng.random() < 0.35 else self.layered, rng, ("first", "second", "flow"))
        frames, flow = (scene["first"], scene["second"]), scene["flow"].astype(np.float32)
        crop = Crop.random(rng, frames[0].shape[:2], size, least=0.6)
        look = _look(rng)
        first, second = (np.clip(_apply(crop.picture(f), look) + rng.normal(0, 3), 0, 255) for f in frames)
        coded = FlowCoding().encode(np.moveaxis(crop.flow(flow), -1, 0), max(size))
        return _sample(first, second, list(coded), np.ones(size, bool))

    def amodal(self, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
        if rng.random() < 0.3:
            scene = _pick(self.solid, rng, ("first", "visible", "whole", "whole_rgb", "has_object"))
            if not scene["has_object"]:
                return self.amodal(rng, size)
            scene["picture"] = scene["first"]
        else:
            scene = _pick(self.layered, rng, ("picture", "visible", "whole", "whole_rgb"))
        crop = Crop.around(scene["visible"], rng, size)
        look = _look(rng)
        picture, rgb = (_apply(crop.picture(scene[k]), look) for k in ("picture", "whole_rgb"))
        visible, whole = (crop.picture(scene[k].astype(np.uint8) * 255) for k in ("visible", "whole"))
        object_rgb = np.moveaxis(rgb / 127.5 - 1, -1, 0).astype(np.float32)
        target = AmodalCoding().encode(whole > 127, object_rgb)
        target[0] = whole / 127.5 - 1  # the edge's coverage says where within a pixel it runs
        return _sample(picture, np.repeat(visible[..., None], 3, -1), list(target), np.ones(size, bool))


def _sample(image: np.ndarray, prompt: np.ndarray, planes: list[np.ndarray], known: np.ndarray) -> Sample:
    target = np.zeros((PLANES, *known.shape), np.float32)
    target[: len(planes)] = planes
    coded = [np.moveaxis(p.astype(np.float32) / 127.5 - 1, -1, 0) for p in (image, prompt)]
    return Sample(coded[0], coded[1], target, known)


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


@dataclass(frozen=True)
class Crop:
    """A part of a picture, mirrored or not, brought to `size` (H, W)."""

    top: int
    left: int
    height: int
    width: int
    mirror: bool
    size: tuple[int, int]

    @classmethod
    def random(cls, rng: np.random.Generator, full: tuple[int, int], size: tuple[int, int], least: float) -> Crop:
        """Of the target's aspect ratio give or take 15%, covering at least `least` of what would fit."""
        aspect = size[1] / size[0] * np.exp(rng.uniform(-0.15, 0.15))
        height = min(full[0], full[1] / aspect) * np.sqrt(rng.uniform(least, 1))
        h, w = max(8, int(height)), max(8, min(full[1], int(height * aspect)))
        top, left = int(rng.integers(full[0] - h + 1)), int(rng.integers(full[1] - w + 1))
        return cls(top, left, h, w, rng.random() < 0.5, size)

    @classmethod
    def around(cls, mask: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> Crop:
        """As `saccade.fit.context_box` with a context of 0.5 to 1, then widened towards the aspect ratio of `size`, as
        far as the picture goes; what still differs is stretched."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        margin = rng.uniform(0.5, 1.0) * max(np.ptp(rows) + 1, np.ptp(columns) + 1)
        spans = [(v[0] - margin, v[-1] + 1 + margin) for v in (rows, columns)]
        spans = [(max(0, int(a)), min(edge, int(b))) for (a, b), edge in zip(spans, mask.shape, strict=True)]
        height, width = (b - a for a, b in spans)
        wanted = max(height, width * size[0] / size[1]), max(width, height * size[1] / size[0])
        (top, bottom), (left, right) = (
            _widened(*span, want, edge, rng) for span, want, edge in zip(spans, wanted, mask.shape, strict=True)
        )
        return cls(top, left, bottom - top, right - left, rng.random() < 0.5, size)

    def picture(self, picture: np.ndarray) -> np.ndarray:
        """[H, W] or [H, W, C] resampled with antialiasing."""
        return self._resize(picture, cv2.INTER_AREA if self.height > self.size[0] else cv2.INTER_LINEAR)

    def nearest(self, plane: np.ndarray) -> np.ndarray:
        return self._resize(plane, cv2.INTER_NEAREST)

    def flow(self, flow: np.ndarray) -> np.ndarray:
        """Vectors follow the resize and the mirror."""
        across, down = self.size[1] / self.width, self.size[0] / self.height
        scale = np.array([-across if self.mirror else across, down], np.float32)
        return self._resize(flow, cv2.INTER_NEAREST) * scale

    def _resize(self, picture: np.ndarray, how: int) -> np.ndarray:
        part = picture[self.top : self.top + self.height, self.left : self.left + self.width]
        out = cv2.resize(np.ascontiguousarray(part), self.size[::-1], interpolation=how)
        return np.ascontiguousarray(out[:, ::-1]) if self.mirror else out


def _widened(low: int, high: int, want: float, edge: int, rng: np.random.Generator) -> tuple[int, int]:
    """The span within 0 .. edge, of length `want` where that fits, `low` to `high` somewhere in it."""
    length = max(high - low, min(edge, round(want)))
    low = int(rng.integers(max(0, high - length), min(low, edge - length) + 1))
    return low, low + length


def _look(rng: np.random.Generator) -> tuple[float, np.ndarray, float]:
    """Saturation, gain of each channel, gamma."""
    return rng.uniform(0, 1.3), np.exp(rng.normal(0, 0.08, 3) + rng.normal(0, 0.2)), float(np.exp(rng.normal(0, 0.2)))


def _apply(picture: np.ndarray, look: tuple[float, np.ndarray, float]) -> np.ndarray:
    saturation, gain, gamma = look
    values = picture.astype(np.float32)
    grey = values.mean(-1, keepdims=True)
    values = np.clip((grey + (values - grey) * saturation) * gain, 0, 255)
    return (255 * (values / 255) ** gamma).astype(np.float32)


def _colours(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For single pictures: colours, sometimes blur or noise."""
    values = _apply(picture, _look(rng))
    if rng.random() < 0.3:
        values = cv2.GaussianBlur(values, (0, 0), rng.uniform(0.3, 1.2))
    if rng.random() < 0.3:
        values = values + rng.normal(0, rng.uniform(1, 10), values.shape).astype(np.float32)
    return np.clip(values, 0, 255)
