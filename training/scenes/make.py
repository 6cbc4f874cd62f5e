"""Write generated scenes to disk: shard k of a kind is a folder of .npy files, drawn from seed (seed, kind, k) alone.

    python -m training.scenes.make OUT --kind solid --shards 100 --photos DIR --cutouts DIR [--workers 2]

| kind    | fields                                                                                                    |
|---------|-----------------------------------------------------------------------------------------------------------|
| solid   | first, second [N,S,S,3] u8; depth [N,S,S] f16 metres; flow [N,S,S,2] f16 px; visible, whole [N,S,S] bool; |
|         | whole_rgb [N,S,S,3] u8; has_object [N] bool                                                               |
| layered | first, second, flow as above; picture, whole_rgb [N,S,S,3] u8; visible, whole [N,S,S] bool                |
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from training.scenes import assets, layered, raycast, worlds

log = logging.getLogger(__name__)
Fields = dict[str, np.ndarray]
SCENES_PER_SHARD = 64
SHEETS = 48


def solid(stock: assets.Assets, rng: np.random.Generator, size: int) -> Callable[[], Fields]:
    """A maker of ray-cast scenes."""
    atlas = raycast.Atlas.of(stock, rng)

    def make() -> Fields:
        scene = raycast.cast(worlds.random_world(atlas, rng, size), atlas, rng, size)
        blank = np.zeros((size, size), bool)
        return {
            "first": scene.first,
            "second": scene.second,
            "depth": scene.depth.astype(np.float16),
            "flow": scene.flow.astype(np.float16),
            "visible": blank if scene.visible is None else scene.visible,
            "whole": blank if scene.whole is None else scene.whole,
            "whole_rgb": np.zeros_like(scene.first) if scene.whole_rgb is None else scene.whole_rgb,
            "has_object": np.array(scene.whole is not None),
        }

    return make


def flat(stock: assets.Assets, rng: np.random.Generator, size: int) -> Callable[[], Fields]:
    """A maker of layered scenes."""

    def make() -> Fields:
        pair, hidden = layered.flow_pair(stock, rng, size), layered.hidden_object(stock, rng, size)
        return {
            "first": pair.first,
            "second": pair.second,
            "flow": pair.flow.astype(np.float16),
            "picture": hidden.picture,
            "visible": hidden.visible,
            "whole": hidden.whole,
            "whole_rgb": hidden.whole_rgb,
        }

    return make


KINDS = {"solid": solid, "layered": flat}


def write_shard(
    index: int, out: Path, kind: str, size: int, seed: int, photos: Sequence[Path], cutouts: Sequence[Path]
) -> float:
    """Write shard `index` and return the seconds it took, 0 where it is there already.

    A shard appears under its name only when whole.
    """
    target = out / f"{kind}-{index:05d}"
    if target.exists():
        return 0.0
    began = time.perf_counter()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, sorted(KINDS).index(kind), index])
    stock = assets.load(photos, cutouts, rng, textures=SHEETS, stamps=SHEETS)
    maker = KINDS[kind](stock, rng, size)
    scenes = [maker() for _ in range(SCENES_PER_SHARD)]
    draft = out / f".{kind}-{index:05d}.part"
    draft.mkdir(parents=True, exist_ok=True)
    for name in scenes[0]:
        np.save(draft / f"{name}.npy", np.stack([scene[name] for scene in scenes]))
    draft.rename(target)
    return time.perf_counter() - began


def write_shards(write: Callable[[int], float], indices: range, workers: int) -> Iterator[float]:
    """The seconds of every shard, as they come; more than one worker are processes of their own."""
    if workers == 1:
        yield from map(write, indices)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(write, indices)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write shards of generated scenes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="index of the first shard")
    parser.add_argument("--size", type=int, default=192, help="edge in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", type=Path, action="append", default=[], help="folder or glob; may be repeated")
    parser.add_argument("--cutouts", type=Path, action="append", default=[], help="as photos, of RGBA objects")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fixed = {name: getattr(args, name) for name in ("out", "kind", "size", "seed", "photos", "cutouts")}
    indices = range(args.first, args.first + args.shards)
    for done, seconds in enumerate(write_shards(partial(write_shard, **fixed), indices, args.workers), start=1):
        pace = f"{SCENES_PER_SHARD / seconds:.1f} scenes/s a worker" if seconds else "already there"
        log.info("%s: %d/%d shards, %s", args.kind, done, args.shards, pace)


if __name__ == "__main__":
    main()
