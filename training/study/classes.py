"""Class folders of generated pictures, to pretrain on: what kind of thing is seen is the class.

    python -m training.study.classes OUT --count 600 --size 64 [--seed 0]

OUT/CLASS/00000.png ...: rooms, streets, tables and collages are those of the generated scenes, objects are their
cut-outs on white, textures what they are dressed with. All are made up; no photograph is needed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from saccade.formats import write_png
from training.scenes import assets, layered, raycast, worlds

log = logging.getLogger(__name__)
Rng = np.random.Generator
Maker = Callable[[Rng, int], np.ndarray]
DRESSED_ANEW = 100  # pictures between two draws of textures and cut-outs


def makers(rng: Rng) -> dict[str, Maker]:
    """A maker of pictures [size, size, 3] uint8 for every class, all dressed from one draw of textures and cut-outs."""
    stock = assets.load([], [], rng, textures=24, stamps=24)
    atlas = raycast.Atlas.of(stock, rng)

    def seen(world: Callable[[raycast.Atlas, Rng, int], raycast.World]) -> Maker:
        return lambda rng, size: raycast.cast(world(atlas, rng, size), atlas, rng, size).first

    def on_white(rng: Rng, size: int) -> np.ndarray:
        rgba = stock.cutouts[rng.integers(len(stock.cutouts))].astype(np.float32)
        share = rgba[..., 3:] / 255
        return _small(rgba[..., :3] * share + 255 * (1 - share), size)

    return {
        "collage": lambda rng, size: layered.flow_pair(stock, rng, size).first,
        "object": on_white,
        "room": seen(worlds.room),
        "street": seen(worlds.street),
        "table": seen(worlds.table_top),
        "texture": lambda rng, size: _small(stock.textures[rng.integers(len(stock.textures))], size),
    }


def _small(picture: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(picture.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA).round().astype(np.uint8)


def write(out: Path, count: int, size: int, seed: int = 0) -> None:
    """`count` pictures of every class. What is there already is made again, and comes out the same."""
    made: dict[str, Maker] = {}
    for index in range(count):
        if index % DRESSED_ANEW == 0:
            made = makers(np.random.default_rng([seed, index]))
            log.info("%d/%d pictures of every class", index, count)
        for number, (name, make) in enumerate(made.items()):
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            picture = make(np.random.default_rng([seed, index, number]), size)
            (folder / f"{index:05d}.png").write_bytes(write_png(picture))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write class folders of generated pictures")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=600, help="pictures of each class")
    parser.add_argument("--size", type=int, default=64, help="edge in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(args.out, args.count, args.size, args.seed)


if __name__ == "__main__":
    main()
