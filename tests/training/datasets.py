"""Tiny datasets in their true formats, written by other hands than ours: h5py, OpenCV, Pillow, SciPy and struct.

Every writer fills a folder and returns the truth of its first sample, in the units that the reader promises.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

HEIGHT, WIDTH = 48, 64


class Truth(NamedTuple):
    image: np.ndarray
    other: np.ndarray | None
    values: np.ndarray
    known: np.ndarray


def photo(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """[H, W, 3] uint8 RGB: soft blobs, red on the left, so that a swap of axes or channels shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 200, (max(2, height // 8), max(2, width // 8), 3)).astype(np.uint8)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    picture[:, : width // 4, 0] = 230
    picture[:, : width // 4, 1:] = 20
    return picture


def save(path: Path, rgb: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path, **options)


def save16(path: Path, levels: np.ndarray) -> None:
    """uint16 [H, W] or [H, W, 3] in RGB order, by OpenCV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), levels[..., ::-1] if levels.ndim == 3 else levels)


def flow_field(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """[H, W, 2] float32 px: u grows to the right, v downwards."""
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.stack([x / 8 + seed, -y / 16 - seed], -1)


def write_flo(path: Path, flow: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = flow.shape[:2]
    path.write_bytes(b"PIEH" + struct.pack("<ii", width, height) + flow.astype("<f4").tobytes())


def write_pfm(path: Path, planes: np.ndarray) -> None:
    """Three channels, little endian, bottom row first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = planes.shape[:2]
    header = b"PF\n%d %d\n-1.0\n" % (width, height)
    path.write_bytes(header + np.flipud(planes).astype("<f4").tobytes())


def depth_map(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """[H, W] float32 metres, 1 to 4."""
    return np.tile(np.linspace(1 + seed / 10, 4, width, dtype=np.float32), (height, 1))


def h5(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=values, compression="gzip")


def hypersim(folder: Path, frames: int = 3, hdr: bool = False) -> Truth:
    """Rays' lengths to a tilted plane, z = depth_map, through the pinhole 60 degrees wide; a window without depth."""
    focal = WIDTH / 2 / np.tan(np.radians(30))
    x, y = np.meshgrid(np.arange(WIDTH) - (WIDTH - 1) / 2, np.arange(HEIGHT) - (HEIGHT - 1) / 2)
    longer = np.sqrt(x**2 + y**2 + focal**2) / focal
    rows = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    for frame in range(frames):
        images = folder / "ai_001_002" / "images"
        distance = (depth_map(frame) * longer).astype(np.float16)
        distance[:8, :8] = np.nan
        h5(images / "scene_cam_00_geometry_hdf5" / f"frame.{frame:04d}.depth_meters.hdf5", distance)
        save(images / "scene_cam_00_final_preview" / f"frame.{frame:04d}.tonemap.jpg", photo(frame), quality=98)
        if hdr:
            h5(images / "scene_cam_00_final_hdf5" / f"frame.{frame:04d}.color.hdf5", photo(frame).astype(np.float16))
            entity = np.where(np.isnan(distance), -1, 7).astype(np.int32)
            h5(images / "scene_cam_00_geometry_hdf5" / f"frame.{frame:04d}.render_entity_id.hdf5", entity)
        rows.append(f"ai_001_002,cam_00,{frame},True,,train")
    rows += ["ai_001_002,cam_00,77,False,people,", "ai_009_001,cam_01,3,True,,val"]
    (folder / "metadata_images_split_scene_v1.csv").write_text("\n".join(rows) + "\n")
    known = np.ones((HEIGHT, WIDTH), bool)
    known[:8, :8] = False
    return Truth(photo(0), None, np.where(known, depth_map(0), 0), known)


def hypersim_processed(folder: Path, frames: int = 3) -> Truth:
    lines = []
    for frame in range(frames):
        names = [f"ai_001_002/{kind}_cam_00_fr{frame:04d}.png" for kind in ("rgb", "depth_plane")]
        levels = (depth_map(frame) * 1000).astype(np.uint16)
        levels[:4] = 0
        save(folder / "train" / names[0], photo(frame))
        save16(folder / "train" / names[1], levels)
        lines.append(" ".join(names))
    (folder / "train" / "filename_list_train.txt").write_text("\n".join(lines))
    known = np.ones((HEIGHT, WIDTH), bool)
    known[:4] = False
    return Truth(photo(0), None, np.where(known, depth_map(0), 0), known)


def nyu_mat(folder: Path, frames: int = 4) -> Truth:
    """MATLAB 7.3 is HDF5 with the axes reversed: [N, 3, W, H] and [N, W, H]."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = depth_map(1)
    raw[:5] = 0
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        file["images"] = np.stack([photo(n).transpose(2, 1, 0) for n in range(frames)])
        file["depths"] = np.stack([depth_map(n).T for n in range(frames)])
        file["rawDepths"] = np.stack([raw.T] * frames)
    train = np.array([[2], [4]], np.uint16)
    savemat(folder / "splits.mat", {"trainNdxs": train, "testNdxs": np.array([[1], [3]], np.uint16)})
    return Truth(photo(1), None, depth_map(1), np.ones((HEIGHT, WIDTH), bool))


def nyu_folders(folder: Path, frames: int = 3) -> Truth:
    for frame in range(frames):
        at = folder / "train" / "kitchen_0004"
        measured = (depth_map(frame) * 1000).astype(np.uint16)
        save(at / f"rgb_{frame:04d}.png", photo(frame))
        save16(at / f"filled_{frame:04d}.png", measured)
        measured[:, :10] = 0
        save16(at / f"depth_{frame:04d}.png", measured)
    return Truth(photo(0), None, depth_map(0), np.ones((HEIGHT, WIDTH), bool))


def kitti_flow(folder: Path, frames: int = 3) -> Truth:
    """Flow at every third row alone, as a laser has it."""
    known = np.zeros((HEIGHT, WIDTH), bool)
    known[::3] = True
    for frame in range(frames):
        at = folder / "training"
        levels = np.zeros((HEIGHT, WIDTH, 3), np.uint16)
        levels[..., :2] = np.rint(flow_field(frame) * 64 + 2**15)
        levels[..., 2] = 1
        levels[~known] = 0
        save(at / "image_2" / f"{frame:06d}_10.png", photo(frame))
        save(at / "image_2" / f"{frame:06d}_11.png", photo(frame + 100))
        save16(at / "flow_occ" / f"{frame:06d}_10.png", levels)
    return Truth(photo(0), photo(100), np.where(known[..., None], flow_field(0), 0), known)


def kitti_depth(folder: Path, frames: int = 3) -> Truth:
    known = np.zeros((HEIGHT, WIDTH), bool)
    known[HEIGHT // 3 :: 4, ::2] = True
    drive = "2011_09_26_drive_0001_sync"
    for frame in range(frames):
        levels = np.where(known, (depth_map(frame) * 256).astype(np.uint16), 0).astype(np.uint16)
        save(folder / "2011_09_26" / drive / "image_02" / "data" / f"{frame:010d}.png", photo(frame))
        at = folder / "train" / drive / "proj_depth" / "groundtruth" / "image_02"
        save16(at / f"{frame:010d}.png", levels)
    return Truth(photo(0), None, np.where(known, depth_map(0), 0), known)


def chairs(folder: Path, frames: int = 4) -> Truth:
    for frame in range(1, frames + 1):
        save(folder / "data" / f"{frame:05d}_img1.ppm", photo(frame))
        save(folder / "data" / f"{frame:05d}_img2.ppm", photo(frame + 100))
        write_flo(folder / "data" / f"{frame:05d}_flow.flo", flow_field(frame))
    (folder / "FlyingChairs_train_val.txt").write_text("".join(f"{2 if n == 0 else 1}\n" for n in range(frames)))
    return Truth(photo(2), photo(102), flow_field(2), np.ones((HEIGHT, WIDTH), bool))


def things(folder: Path, frames: int = 4, subset: bool = False) -> Truth:
    """Frames from 6 on; the last one has a flow but no next frame."""
    known = np.ones((HEIGHT, WIDTH), bool)
    for number in range(frames):
        name, flow = 6 + number, flow_field(number)
        if subset:
            save(folder / "train/image_clean/left" / f"{number:07d}.png", photo(number))
            if number < frames - 1:
                write_flo(folder / "train/flow/left/into_future" / f"{number:07d}.flo", flow)
            continue
        flow[0, :5] = [2e5, 0]
        planes = np.concatenate([flow, np.zeros((HEIGHT, WIDTH, 1), np.float32)], -1)
        save(folder / "frames_cleanpass/TRAIN/A/0000/left" / f"{name:04d}.png", photo(number))
        write_pfm(
            folder / "optical_flow/TRAIN/A/0000/into_future/left" / f"OpticalFlowIntoFuture_{name:04d}_L.pfm", planes
        )
    if not subset:
        known[0, :5] = False
    return Truth(photo(0), photo(1), np.where(known[..., None], flow_field(0), 0), known)


def sintel(folder: Path, frames: int = 3) -> Truth:
    at, scene = folder / "training", "alley_1"
    invalid, hidden = (np.zeros((HEIGHT, WIDTH), np.uint8) for _ in range(2))
    invalid[:6], hidden[-6:] = 255, 255
    for frame in range(1, frames + 1):
        name = f"{scene}/frame_{frame:04d}"
        for rendering in ("clean", "final"):
            save(at / rendering / f"{name}.png", photo(frame))
        save(at / "invalid" / f"{name}.png", invalid)
        depth = depth_map(frame)
        depth[:10] = 5000
        (at / "depth" / scene).mkdir(parents=True, exist_ok=True)
        header = struct.pack("<fii", 202021.25, WIDTH, HEIGHT)
        (at / "depth" / f"{name}.dpt").write_bytes(header + depth.astype("<f4").tobytes())
        if frame < frames:
            save(at / "occlusions" / f"{name}.png", hidden)
            write_flo(at / "flow" / f"{name}.flo", flow_field(frame))
    known = invalid == 0
    return Truth(photo(1), photo(2), np.where(known[..., None], flow_field(1), 0), known)


def pix2gestalt(folder: Path, samples: int = 4, suffixes: bool = True) -> Truth:
    whole = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.circle(whole, (30, 24), 14, 255, -1)
    visible = whole.copy()
    visible[:, 30:] = 0
    for number in range(samples):
        object_rgb = np.where(whole[..., None] > 0, photo(number + 50), 255).astype(np.uint8)
        picture = np.where(visible[..., None] > 0, object_rgb, photo(number)).astype(np.uint8)
        parts = {"occlusion": picture, "visible_object_mask": visible, "whole": object_rgb, "whole_mask": whole}
        endings = {"visible_object_mask": "visible_mask"}
        for part, values in parts.items():
            ending = f"_{endings.get(part, part)}" if suffixes else ""
            save(folder / part / f"{number:06d}{ending}.png", values)
    first = np.where(visible[..., None] > 0, photo(50), photo(0)).astype(np.uint8)
    return Truth(first, visible, whole, whole > 0)


def imagenet(folder: Path, classes: int = 3, each: int = 4) -> None:
    for label in range(classes):
        for number in range(each):
            path = folder / f"n{label:08d}" / f"n{label:08d}_{number}.JPEG"
            save(path, photo(10 * label + number, 40 + 8 * number, 72), format="JPEG", quality=95)
