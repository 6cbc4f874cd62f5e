"""Pictures that dress the scenes: textures and cut-outs, from folders or made up when there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

TEXTURE_PX = 256
CUTOUT_PX = 224
TRIES = 100
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Assets:
    """`textures` [T, 256, 256, 3] uint8 RGB; `cutouts` [C, 224, 224, 4] uint8 RGBA, the object centred, its longer side
    filling the square."""

    textures: NDArray[np.uint8]
    cutouts: NDArray[np.uint8]


def load(
    photos: Sequence[Path], cutouts: Sequence[Path], rng: np.random.Generator, textures: int, stamps: int
) -> Assets:
    """A random choice from the folders' pictures; a quarter of the textures, or all without photos, are procedural.

    Raises FileNotFoundError for a folder without pictures, ValueError where hardly any picture can be used.
    """
    made = textures if not photos else textures // 4
    sheets = [procedural_texture(rng) for _ in range(made)]
    if photos:
        sheets += _choose(pictures_in(photos), rng, textures - made, lambda file: _photo(file, rng))
    cut = _choose(pictures_in(cutouts), rng, stamps, _cutout) if cutouts else [_blob(rng) for _ in range(stamps)]
    return Assets(np.stack(sheets), np.stack(cut))


def pictures_in(folders: Sequence[Path]) -> list[Path]:
    """Every picture below the folders, sorted. A glob pattern in the last part of a path is honoured."""
    found: list[Path] = []
    for folder in folders:
        pattern = any(c in folder.name for c in "*?[")
        paths = folder.parent.glob(folder.name) if pattern else folder.rglob("*")
        pictures = [path for path in paths if path.suffix.lower() in _SUFFIXES]
        if not pictures:
            raise FileNotFoundError(f"no pictures in {folder}")
        found += pictures
    return sorted(found)


def _choose(
    files: list[Path], rng: np.random.Generator, count: int, read: Callable[[Path], NDArray[np.uint8] | None]
) -> list[NDArray[np.uint8]]:
    """`count` random files, read; where `read` has no use for one (None), another is drawn."""
    chosen: list[NDArray[np.uint8]] = []
    for _ in range(TRIES * count):
        picture = read(files[rng.integers(len(files))])
        if picture is not None:
            chosen.append(picture)
        if len(chosen) == count:
            return chosen
    raise ValueError(f"hardly any of the {len(files)} pictures beside {files[0].name} can be used")


def _photo(file: Path, rng: np.random.Generator) -> NDArray[np.uint8] | None:
    picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if picture is None or min(picture.shape[:2]) < 32:
        return None
    return _random_square(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), rng)


def _cutout(file: Path) -> NDArray[np.uint8] | None:
    """RGBA with an object that fills at least a twentieth of the picture."""
    stamp = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if stamp is None or stamp.dtype != np.uint8 or stamp.ndim != 3 or stamp.shape[2] != 4:
        return None
    return centre(cv2.cvtColor(stamp, cv2.COLOR_BGRA2RGBA)) if (stamp[..., 3] > 127).mean() >= 0.05 else None


def _random_square(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    edge = int(min(picture.shape[:2]) * rng.uniform(0.4, 1))
    top = rng.integers(picture.shape[0] - edge + 1)
    left = rng.integers(picture.shape[1] - edge + 1)
    crop = np.rot90(picture[top : top + edge, left : left + edge], rng.integers(4))
    return cv2.resize(np.ascontiguousarray(crop), (TEXTURE_PX, TEXTURE_PX), interpolation=cv2.INTER_AREA)


def centre(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Crop to the object and fit its longer side to the square."""
    rows, columns = np.flatnonzero((rgba[..., 3] > 127).any(1)), np.flatnonzero((rgba[..., 3] > 127).any(0))
    crop = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    factor = CUTOUT_PX / max(crop.shape[:2])
    size = (max(1, round(crop.shape[1] * factor)), max(1, round(crop.shape[0] * factor)))
    crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    sheet = np.zeros((CUTOUT_PX, CUTOUT_PX, 4), np.uint8)
    top, left = (CUTOUT_PX - size[1]) // 2, (CUTOUT_PX - size[0]) // 2
    sheet[top : top + size[1], left : left + size[0]] = crop
    return sheet


def procedural_texture(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Fractal noise, checks, planks or plain paint in random colours."""
    kind = rng.integers(4)
    if kind == 0:
        field = fractal(rng)
    elif kind == 1:
        y, x = np.indices((TEXTURE_PX, TEXTURE_PX)) // int(2 ** rng.integers(3, 7))
        field = ((x + y * rng.integers(2)) % 2).astype(np.float32) * 0.8 + fractal(rng) * 0.2
    elif kind == 2:
        planks = np.repeat(rng.random(TEXTURE_PX // 16), 16)[None].repeat(TEXTURE_PX, 0)
        field = planks.astype(np.float32) * 0.6 + fractal(rng) * 0.4
    else:
        field = np.full((TEXTURE_PX, TEXTURE_PX), 0.5, np.float32) + 0.05 * fractal(rng)
    low, high = _paint(rng), _paint(rng)
    if kind == 3:
        high = low + rng.uniform(-20, 20, 3)
    return np.clip(low + (high - low) * field[..., None], 0, 255).astype(np.uint8)


def _paint(rng: np.random.Generator) -> NDArray[np.float64]:
    """A colour [3] in 0..255, more often dull than bright: most of what is built and painted is."""
    grey, strength = rng.uniform(15, 250), rng.choice([10.0, 25.0, 60.0], p=[0.5, 0.3, 0.2])
    return np.clip(grey + rng.normal(0, strength, 3), 0, 255)


def fractal(rng: np.random.Generator) -> NDArray[np.float32]:
    """[256, 256] float32 in [0, 1]: octaves of smoothed noise."""
    field = np.zeros((TEXTURE_PX, TEXTURE_PX), np.float32)
    for octave in range(1, 7):
        grid = rng.standard_normal((2**octave, 2**octave)).astype(np.float32)
        field += cv2.resize(grid, (TEXTURE_PX, TEXTURE_PX), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    field -= field.min()
    return field / max(float(field.max()), 1e-6)


def _blob(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A made-up object: a star-shaped outline filled with a procedural texture."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    harmonics = sum(rng.uniform(-0.3, 0.3) / k * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(1, 6))
    radius = CUTOUT_PX * 0.4 * np.clip(1 + harmonics, 0.3, 1.3) * rng.uniform(0.6, 1)
    points = np.stack([np.cos(angle) * radius, np.sin(angle) * radius * rng.uniform(0.4, 1)], 1) + CUTOUT_PX / 2
    alpha = np.zeros((CUTOUT_PX, CUTOUT_PX), np.uint8)
    cv2.fillPoly(alpha, [points.astype(np.int32)], 255)
    texture = cv2.resize(procedural_texture(rng), (CUTOUT_PX, CUTOUT_PX))
    return centre(np.concatenate([texture, alpha[..., None]], axis=-1))
