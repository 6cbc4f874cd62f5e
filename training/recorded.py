"""Batches written down once: what a source drew, at one size, so that small models need not wait for their pictures.

    python -m training.recorded SCENES OUT --count 4096 --size 64 [--seed 0]

OUT/TASK holds image.npy and prompt.npy [N, 3, H, W] uint8, target.npy [N, 4, H, W] float16 and weight.npy
[N, H/8, W/8] bool. The augmentations are those that the source drew: N samples see no more of them than N.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saccade.errors import InvalidInput, SaccadeError
from training.data import Batch, Scenes
from training.data.batch import CELL
from training.data.order import Order

log = logging.getLogger(__name__)
TASKS = ("depth", "flow", "amodal")
KINDS = {"image": np.uint8, "prompt": np.uint8, "target": np.float16, "weight": np.bool_}
SHARDS = ("solid", "layered")  # the kinds that `Scenes` draws from
AT_ONCE = 256
BAD_INPUT, FAILED = 2, 1


class Recorded:
    """A source that goes through the first `limit` (0: all) recorded samples of a task in epochs, each shuffled."""

    def __init__(self, folder: Path, seed: int = 0, limit: int = 0) -> None:
        self.folder = folder
        self.rows = {task: _open(folder / task) for task in TASKS}
        self.orders = {
            task: Order(min(limit or len(rows["image"]), len(rows["image"])), seed) for task, rows in self.rows.items()
        }

    def batch(self, step: int, task: str, count: int, size: tuple[int, int], first: int | None = None) -> Batch:
        """`count` samples of `task`, a pure function of the arguments. Raises InvalidInput for a size that was not
        recorded."""
        rows = self.rows[task]
        if tuple(size) != rows["image"].shape[2:]:
            recorded = "x".join(map(str, rows["image"].shape[2:]))
            raise InvalidInput(f"{self.folder} was recorded at {recorded}, not at {size[0]}x{size[1]}", param="size")
        return self.at(task, self.orders[task].at(step * count if first is None else first, count))

    def at(self, task: str, places: np.ndarray) -> Batch:
        """The recorded samples of those numbers."""
        image, prompt, target, weight = (self.rows[task][name][places] for name in KINDS)
        pictures = (p.astype(np.float32) / np.float32(127.5) - 1 for p in (image, prompt))
        return Batch(*pictures, target.astype(np.float32), weight.astype(np.float32))


def _open(folder: Path) -> dict[str, np.ndarray]:
    try:
        rows = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in KINDS}
    except (OSError, ValueError) as error:
        how = f"python -m training.recorded SCENES {folder.parent} --size 64"
        raise InvalidInput(f"{folder} holds no recorded samples: {how} makes them") from error
    if len({len(values) for values in rows.values()}) != 1 or not len(rows["image"]):
        raise InvalidInput(f"{folder}: its files are of different lengths, or empty")
    return rows


def record(source: Scenes, out: Path, count: int, size: tuple[int, int], tasks: Sequence[str] = TASKS) -> None:
    """Draw `count` samples of every task and write them; a task that is there already is left as it is."""
    for task in tasks:
        if (out / task).exists():
            continue
        draft = out / f".{task}.part"
        draft.mkdir(parents=True, exist_ok=True)
        channels = {
            "image": (3, *size),
            "prompt": (3, *size),
            "target": (4, *size),
            "weight": (size[0] // 8, size[1] // 8),
        }
        files = {
            name: np.lib.format.open_memmap(draft / f"{name}.npy", "w+", np.dtype(kind), (count, *channels[name]))
            for name, kind in KINDS.items()
        }
        for step, begin in enumerate(range(0, count, AT_ONCE)):
            batch = source.batch(step, task, min(AT_ONCE, count - begin), size)
            part = np.s_[begin : begin + AT_ONCE]
            for name in ("image", "prompt"):
                files[name][part] = np.clip(np.rint((getattr(batch, name) + 1) * 127.5), 0, 255)
            files["target"][part], files["weight"][part] = batch.target, batch.weight > 0
            log.info("%s: %d/%d", task, min(begin + AT_ONCE, count), count)
        for file in files.values():
            file.flush()
        draft.rename(out / task)


def check(scenes: Path, count: int, size: int) -> None:
    """Raises InvalidInput for what cannot be recorded, and names the kind of shards that is missing."""
    if count < 1 or size < CELL or size % CELL:
        raise InvalidInput(f"--count is at least 1 and --size a multiple of {CELL}, not {count} and {size}")
    if lacking := [kind for kind in SHARDS if not any(scenes.glob(f"{kind}-*"))]:
        how = " and ".join(f"python -m training.scenes.make {scenes} --kind {kind}" for kind in lacking)
        raise InvalidInput(f"{scenes} holds no {' and no '.join(lacking)} shards: {how} makes them", param="scenes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write down batches of generated scenes")
    parser.add_argument("scenes", type=Path, help="folder of shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4096, help="samples of each task")
    parser.add_argument("--size", type=int, default=64, help="edge in pixels, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check(args.scenes, args.count, args.size)
        record(Scenes(args.scenes, seed=args.seed), args.out, args.count, (args.size, args.size))
    except (SaccadeError, OSError) as error:
        sys.stderr.write(f"training.recorded: {error}\n")
        raise SystemExit(BAD_INPUT if isinstance(error, InvalidInput) else FAILED) from None


if __name__ == "__main__":
    main()
