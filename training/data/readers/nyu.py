"""NYU Depth v2 (Silberman et al. 2012): a Kinect in rooms, 1449 labelled frames of 480 x 640.

    FOLDER/nyu_depth_v2_labeled.mat      MATLAB 7.3, which is HDF5 with the axes reversed: images [N, 3, W, H] uint8,
                                         depths and rawDepths [N, W, H] metres (filled in, and as measured, 0 unknown)
    FOLDER/splits.mat                    trainNdxs and testNdxs, counted from 1
or, as Marigold and others lay it out, PNGs of millimetres:
    FOLDER/{train,test}/SCENE/rgb_IIII.png, depth_IIII.png (measured) and filled_IIII.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawDepth
from training.data.readers import hdf5
from training.data.readers.pairs import Pairs, listed_pairs

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
MAX_MAT_BYTES = 2**34  # the published file has 2.8 GB
MAX_SPLITS_BYTES = 2**16
FRAME = (slice(45, 471), slice(41, 601))  # what is left of 480 x 640 without the white edge (Eigen et al. 2014)
FAR_M = 10.0


class NYU:
    """`split`: train (795), test (654) or all. `measured`: only what the sensor saw, not what was filled in after.
    `names`: for folders of PNGs, a list of pairs in place of every frame on disk."""

    task = "depth"
    gap_px = 0.0

    def __init__(
        self, folder: Path, split: str = "train", measured: bool = False, names: Path | str | None = None
    ) -> None:
        if split not in ("train", "test", "all"):
            raise InvalidInput(f"NYUv2 has the splits train, test and all, not {split!r}", param="split")
        self.mat = folder / MAT
        self.pairs: Pairs | None = None
        if self.mat.is_file():
            self.depths = "rawDepths" if measured else "depths"
            self.rows = _rows(self.mat, folder / SPLITS, split)
        else:
            self.pairs = _pairs(folder, split, measured, names)

    def __len__(self) -> int:
        return len(self.rows) if self.pairs is None else len(self.pairs)

    def name(self, index: int) -> str:
        return f"{MAT} frame {self.rows[index] + 1}" if self.pairs is None else self.pairs.name(index)

    def read(self, index: int) -> RawDepth:
        if self.pairs is not None:
            raw = self.pairs.read(index)
            return _framed(raw.image, raw.depth)
        row = self.rows[index]
        image = hdf5.read(self.mat, "images", row, MAX_MAT_BYTES)
        depth = hdf5.read(self.mat, self.depths, row, MAX_MAT_BYTES)
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != np.uint8 or depth.shape != image.shape[1:]:
            raise InvalidInput(f"{MAT}: images are {image.shape}, {self.depths} {depth.shape}: not of one kind")
        return _framed(image.transpose(2, 1, 0).copy(), depth.T.astype(np.float32))


def _framed(image: np.ndarray, depth: np.ndarray) -> RawDepth:
    if depth.shape == (480, 640):
        image, depth = image[FRAME], depth[FRAME]
    known = np.isfinite(depth) & (depth > 0) & (depth <= FAR_M)
    return RawDepth(np.ascontiguousarray(image), np.where(known, depth, np.float32(0)), known)


def _rows(mat: Path, splits: Path, split: str) -> list[int]:
    count = hdf5.shape(mat, "images", MAX_MAT_BYTES)[0]
    if split == "all":
        return list(range(count))
    if not splits.is_file():
        raise InvalidInput(f"{splits.parent} has no {SPLITS}, which says what belongs to {split!r}; or ask for 'all'")
    import io

    from scipy.io import loadmat

    with files.naming(splits):
        wanted = f"{split}Ndxs"
        numbers = np.ravel(loadmat(io.BytesIO(files.contents(splits, MAX_SPLITS_BYTES)))[wanted]).astype(np.int64) - 1
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= count:
            raise InvalidInput(f"{wanted} names frames that are not among the {count} of {MAT}")
        return sorted(int(n) for n in numbers)


def _pairs(folder: Path, split: str, measured: bool, names: Path | str | None) -> Pairs:
    if not folder.is_dir():
        raise InvalidInput(f"there is no folder {folder}")
    kind = "depth" if measured else "filled"
    if names is not None:
        listed = listed_pairs(Path(names))
        pairs = [(rgb, depth if measured else depth.replace("/depth_", "/filled_")) for rgb, depth in listed]
    else:
        below = "*" if split == "all" else split
        rgb = sorted(p.relative_to(folder).as_posix() for p in folder.glob(f"{below}/*/rgb_*.png"))
        pairs = [(name, name.replace("/rgb_", f"/{kind}_")) for name in rgb]
    if not pairs:
        raise InvalidInput(f"{folder} holds neither {MAT} nor {split}/SCENE/rgb_IIII.png")
    return Pairs(pairs, folder, folder, per_metre=1000)
