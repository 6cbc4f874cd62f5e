"""Make a validation folder in the evaluation's layout, from shards of generated scenes and folders of real depth.

    python -m training.validation OUT --scenes SHARDS [--real FOLDER ...] [--count 32]

Shards for this are written with a seed that training does not use. `saccade evaluate OUT` then measures a model, so
that checkpoints are chosen without the evaluation pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from saccade.formats import write_png
from training.data import read_real


def real_depth(out: Path, folders: Sequence[Path], per_folder: int) -> None:
    """The first `per_folder` pictures of every folder, as depth items."""
    for folder in folders:
        for file in sorted(folder.glob("*_depth_mm.png"))[:per_folder]:
            picture, depth, known = read_real(file)
            name = f"{folder.name}_{file.name.removesuffix('_depth_mm.png')}"
            write_depth(out, name, picture, depth, known)


def write_depth(out: Path, name: str, picture: np.ndarray, depth: np.ndarray, known: np.ndarray) -> None:
    (out / "depth" / f"{name}.png").write_bytes(write_png(picture))
    np.savez(out / "depth" / f"{name}.npz", gt=depth.astype(np.float32), valid=known, kind="metric_depth_m")


def generated(out: Path, shards: Path, count: int) -> None:
    """The first `count` scenes of each kind, as items of every task that they have a truth for."""
    for kind in ("solid", "layered"):
        for number, scene in enumerate(islice(_scenes(shards, kind), count)):
            write_scene(out, f"{kind}_{number:03d}", scene)


def _scenes(shards: Path, kind: str) -> Iterator[dict[str, np.ndarray]]:
    for shard in sorted(shards.glob(f"{kind}-*")):
        fields = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in shard.glob("*.npy")}
        for row in range(len(fields["first"])):
            yield {name: np.asarray(values[row]) for name, values in fields.items()}


def write_scene(out: Path, name: str, scene: dict[str, np.ndarray]) -> None:
    for place in ("first", "second"):
        (out / "flow" / f"{name}_{1 if place == 'first' else 2}.png").write_bytes(write_png(scene[place]))
    flow = scene["flow"].astype(np.float32)
    np.savez(out / "flow" / f"{name}.npz", flow=flow, valid=np.ones(flow.shape[:2], bool))
    if "depth" in scene:
        depth = scene["depth"].astype(np.float32)
        write_depth(out, name, scene["first"], depth, np.ones(depth.shape, bool))
    if scene.get("has_object", True) and scene["visible"].any():
        (out / "amodal" / f"{name}.png").write_bytes(write_png(scene.get("picture", scene["first"])))
        for part in ("visible", "whole"):
            (out / "amodal" / f"{name}_00_{part}.png").write_bytes(write_png(scene[part].astype(np.uint8) * 255))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="make a validation folder in the evaluation's layout")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=Path, help="folder of shards")
    parser.add_argument("--real", type=Path, action="append", default=[], help="folder of NAME.jpg + NAME_depth_mm.png")
    parser.add_argument("--count", type=int, default=32, help="scenes of each kind")
    parser.add_argument("--per-folder", type=int, default=4, help="real pictures of each folder")
    args = parser.parse_args(argv)
    for task in ("depth", "flow", "amodal"):
        (args.out / task).mkdir(parents=True, exist_ok=True)
    if args.scenes:
        generated(args.out, args.scenes, args.count)
    real_depth(args.out, args.real, args.per_folder)


if __name__ == "__main__":
    main()
