"""Hypersim (Roberts et al. 2021): rendered rooms. Its "depth" is the length of a ray; here it becomes planar depth.

FOLDER/ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5   dataset [768, 1024], metres, NaN
FOLDER/ai_VVV_NNN/images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg         or, before it, if both are there:
FOLDER/ai_VVV_NNN/images/scene_cam_XX_final_hdf5/frame.IIII.color.hdf5             dataset [768, 1024, 3], linear
FOLDER/ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.render_entity_id.hdf5     -1 where there is nothing
FOLDER/metadata_images_split_scene_v1.csv           which frames are released, and the split by scene
FOLDER/metadata_camera_parameters.csv               optional: rays of the scenes whose camera is tilted
"""

from __future__ import annotations

import csv
import io
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from training.data import files
from training.data.raw import RawDepth
from training.data.readers import hdf5
from training.data.readers.pairs import Pairs, listed_pairs

SPLIT_CSV = "metadata_images_split_scene_v1.csv"
CAMERA_CSV = "metadata_camera_parameters.csv"
FIELD_OF_VIEW = np.pi / 3  # across, of every camera that is not tilted
MOST_SAMPLES = 1_000_000

_SCENE = re.compile(r"ai_\d{3}_\d{3}")
_CAMERA = re.compile(r"cam_\d{2}")
_MARIGOLD = re.compile(r"(ai_\d{3}_\d{3})/rgb_(cam_\d{2})_fr(\d{4})\.png")
_DEPTH_FILE = re.compile(r"scene_(cam_\d{2})_geometry_hdf5/frame\.(\d{4})\.depth_meters\.hdf5")

Frame = tuple[str, str, int]


class Hypersim:
    """The dataset as it is downloaded.

    `split`: train, val or test of the official list, or "all" for every frame on disk. `names`: a list of frames to
    take instead, the official CSV or one of Marigold's lists (ai_001_001/rgb_cam_00_fr0000.png ...). A frame of which
    less than `least_known` has a depth is counted as broken.
    """

    task = "depth"
    gap_px = 0.0

    def __init__(
        self, folder: Path, split: str = "train", names: Path | str | None = None, least_known: float = 0.0
    ) -> None:
        self.folder, self.least_known = folder, least_known
        if split == "all" and names is None:
            self.frames = _on_disk(folder)
        else:
            path = Path(names) if names is not None else folder / SPLIT_CSV
            if not path.is_file():
                raise InvalidInput(
                    f"{folder} has no {SPLIT_CSV}, which says what belongs to the split {split!r}: "
                    "take it from the dataset's repository, or ask for split 'all'"
                )
            self.frames = _from_csv(path, split) if path.suffix == ".csv" else _from_list(path)
        if not self.frames:
            raise InvalidInput(f"{folder}: no frame belongs to the split {split!r}")
        self.rays = _rays(folder / CAMERA_CSV)

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, index: int) -> str:
        scene, camera, frame = self.frames[index]
        return f"{scene}/{camera}/frame.{frame:04d}"

    def read(self, index: int) -> RawDepth:
        scene, camera, frame = self.frames[index]
        images = self.folder / scene / "images"
        geometry, final = (images / f"scene_{camera}_{kind}" for kind in ("geometry_hdf5", "final_hdf5"))
        path = geometry / f"frame.{frame:04d}.depth_meters.hdf5"
        distance = hdf5.read(path, "dataset").astype(np.float32)
        if distance.ndim != 2 or min(distance.shape) < files.LEAST_SIDE:
            raise InvalidInput(f"{path.name}: distances must be [H, W], not {distance.shape}")
        color, entity = final / f"frame.{frame:04d}.color.hdf5", geometry / f"frame.{frame:04d}.render_entity_id.hdf5"
        there = hdf5.read(entity, "dataset") != -1 if entity.exists() else None
        if color.exists():
            image = tone_mapped(hdf5.read(color, "dataset"), there, color)
        else:
            image = files.picture(images / f"scene_{camera}_final_preview" / f"frame.{frame:04d}.tonemap.jpg")
        files.same_size(path, picture=image, distance=distance, **({} if there is None else {"entities": there}))
        known = np.isfinite(distance) & (distance > 0)
        known = known if there is None else known & there
        if known.mean() < self.least_known:
            raise InvalidInput(f"{path.name}: only {known.mean():.0%} of it has a depth")
        depth = np.where(known, distance, 0) * planar_share(*distance.shape, self.rays.get(scene))
        return RawDepth(image, depth.astype(np.float32), known)


class Processed(Pairs):
    """What Marigold's preprocessing leaves: FOLDER/SPLIT/ai_VVV_NNN/{rgb,depth_plane}_cam_XX_frIIII.png with a list
    FOLDER/SPLIT/filename_list_SPLIT.txt (or one given by `names`); planar millimetres, 0 unknown."""

    def __init__(self, folder: Path, split: str = "train", names: Path | str | None = None) -> None:
        below = folder / split if (folder / split).is_dir() else folder
        path = Path(names) if names is not None else below / f"filename_list_{split}.txt"
        if not path.is_file():
            raise InvalidInput(f"{below} has no filename_list_{split}.txt; name a list")
        super().__init__(listed_pairs(path), below, below, per_metre=1000)


def planar_share(height: int, width: int, cam_from_uv: tuple[float, ...] | None = None) -> NDArray[np.float32]:
    """[H, W]: depth along the optical axis per metre of ray, |z| / |ray|.

    Rays leave through pixel centres; u and v run from -1 to 1 across the picture, v upwards. `cam_from_uv` (9 numbers)
    carries (u, v, 1) to camera space where a camera is tilted; else it is a pinhole 60 degrees wide of square pixels.
    """
    return _planar_share(height, width, cam_from_uv)


@lru_cache(maxsize=8)
def _planar_share(height: int, width: int, cam_from_uv: tuple[float, ...] | None) -> NDArray[np.float32]:
    reach = np.tan(FIELD_OF_VIEW / 2)
    pinhole = np.diag([reach, reach * height / width, -1.0])
    matrix = pinhole if cam_from_uv is None else np.reshape(cam_from_uv, (3, 3))
    u = (np.arange(width) + 0.5) / width * 2 - 1
    v = 1 - (np.arange(height) + 0.5) / height * 2
    across, down = np.meshgrid(u, v)
    rays = np.stack([across, down, np.ones_like(across)], -1) @ matrix.T
    share = np.abs(rays[..., 2]) / np.maximum(np.linalg.norm(rays, axis=-1), 1e-12)
    return share.astype(np.float32)


def tone_mapped(color: np.ndarray, there: np.ndarray | None, path: Path) -> NDArray[np.uint8]:
    """Linear radiance [H, W, 3] to RGB as the dataset's own tone mapping does: the 90th percentile of the brightness of
    what is `there` comes out at 0.8, gamma 2.2."""
    if color.ndim != 3 or color.shape[2] != 3 or (there is not None and there.shape != color.shape[:2]):
        raise InvalidInput(f"{path.name}: colours must be [H, W, 3], not {color.shape}")
    values = np.nan_to_num(color.astype(np.float32), nan=0, posinf=65504, neginf=0)
    brightness = values @ np.array([0.3, 0.59, 0.11], np.float32)
    seen = brightness if there is None or not there.any() else brightness[there]
    bright = float(np.percentile(seen, 90))
    scale = 0.8**2.2 / bright if bright >= 1e-4 else 0.0
    return (np.clip(np.maximum(values * scale, 0) ** (1 / 2.2), 0, 1) * 255).astype(np.uint8)


def _from_csv(path: Path, split: str) -> list[Frame]:
    rows = csv.DictReader(io.StringIO("\n".join(files.lines(path))))
    wanted = {"scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name"}
    if not wanted <= set(rows.fieldnames or ()):
        raise InvalidInput(
            f"{path.name}: it lacks the columns {', '.join(sorted(wanted - set(rows.fieldnames or ())))}"
        )
    frames = []
    for row in rows:
        if row["included_in_public_release"] != "True" or split not in ("all", row["split_partition_name"]):
            continue
        scene, camera, frame = row["scene_name"], row["camera_name"], row["frame_id"]
        if not (_SCENE.fullmatch(scene) and _CAMERA.fullmatch(camera) and frame.isdigit()):
            raise InvalidInput(f"{path.name}: {scene[:40]!r} {camera[:40]!r} {frame[:40]!r} name no frame")
        frames.append((scene, camera, int(frame)))
    return frames


def _from_list(path: Path) -> list[Frame]:
    frames = []
    for line in files.lines(path):
        found = _MARIGOLD.match(line)
        if not found:
            raise InvalidInput(f"{path.name}: {line[:80]!r} names no frame as ai_001_001/rgb_cam_00_fr0000.png does")
        frames.append((found[1], found[2], int(found[3])))
    return frames


def _on_disk(folder: Path) -> list[Frame]:
    paths = files.listed(folder, "ai_*/images/scene_cam_*_geometry_hdf5/frame.*.depth_meters.hdf5")
    frames = []
    for path in paths[:MOST_SAMPLES]:
        scene, found = path.parts[-4], _DEPTH_FILE.search(path.as_posix())
        if found and _SCENE.fullmatch(scene):
            frames.append((scene, found[1], int(found[2])))
    return frames


def _rays(path: Path) -> dict[str, tuple[float, ...]]:
    """scene -> the 9 numbers of M_cam_from_uv; none where the file is not there."""
    if not path.is_file():
        return {}
    columns = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    with files.naming(path):
        rows = csv.DictReader(io.StringIO("\n".join(files.lines(path))))
        if not {"scene_name", *columns} <= set(rows.fieldnames or ()):
            raise InvalidInput(f"it lacks the columns scene_name and {columns[0]} to {columns[-1]}")
        found = {row["scene_name"]: tuple(float(row[column]) for column in columns) for row in rows}
        if not all(np.isfinite(numbers).all() for numbers in found.values()):
            raise InvalidInput("a camera's numbers are not finite")
        return found
