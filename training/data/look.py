"""See what training would see: `python -m training.data.look FOLDER --kind hypersim [--out sheet.png] [split=val ...]`.

Below a row of titles, a row for every sample: the picture, its prompt (next frame, visible mask), its coded target
made visible, and what of it is known, cell by cell. Whatever was skipped on the way is told below.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput, SaccadeError
from saccade.tasks import AmodalCoding, FlowCoding
from training.data.batch import CELL, TASKS, Batch, Source
from training.data.folders import Folders
from training.data.images import ImageClasses
from training.data.readers.registry import READERS, open_reader
from training.data.scenes import Scenes

GAP_PX = 6
TITLE_PX = 18
TITLES = ("image", "prompt", "target", "known")
KINDS = (*READERS, "scenes", "imagenet")

Picture = NDArray[np.uint8]


def rows(batch: Batch, task: str) -> list[Picture]:
    """One picture of four cells side by side for every sample of a batch."""
    return [
        _beside(_rgb(image), _rgb(prompt), _target(target, task), _known(image, weight))
        for image, prompt, target, weight in zip(batch.image, batch.prompt, batch.target, batch.weight, strict=True)
    ]


def sheet(strips: list[Picture]) -> Picture:
    """Strips one below the other, on grey."""
    gap = np.full((GAP_PX, strips[0].shape[1], 3), 128, np.uint8)
    return np.concatenate([part for strip in strips for part in (gap, strip)][1:])


def titles(edge: int) -> Picture:
    """What the four cells of a row are, each above its own."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(min(14, max(7, edge // 4)))
    cells = []
    for title in TITLES:
        cell = Image.new("RGB", (edge, TITLE_PX), "white")
        ImageDraw.Draw(cell).text((edge / 2, TITLE_PX / 2), title, "black", font, anchor="mm")
        cells.append(np.asarray(cell))
    return _beside(*cells)


def main(arguments: list[str] | None = None) -> int:
    """Write a sheet and say what was read. Returns 0, or 1 after a line that says why not."""
    parser = argparse.ArgumentParser(prog="python -m training.data.look", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--task", choices=TASKS, help="for generated scenes, which have all three")
    parser.add_argument("--count", type=int, default=6, help="samples (6)")
    parser.add_argument("--step", type=int, default=0, help="which batch (0)")
    parser.add_argument("--size", type=int, default=256, help="edge in pixels, a multiple of 8 (256)")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    parser.add_argument(
        "options", nargs="*", metavar="name=value", help="of the reader: split=val, rendering=clean, ..."
    )
    given = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        strips, told = _seen(given)
        head = [] if given.kind == "imagenet" else [titles(given.size)]
    except (SaccadeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from PIL import Image

    Image.fromarray(sheet([*head, *strips])).save(given.out)
    print("\n".join([*told, f"{len(strips)} samples: {given.out}"]))
    return 0


def _seen(given: argparse.Namespace) -> tuple[list[Picture], list[str]]:
    size = (given.size, given.size)
    if given.count < 1 or given.size < CELL or given.size % CELL or given.size * given.size * given.count > 2**26:
        raise InvalidInput(f"--count is at least 1, --size a multiple of {CELL}, and both together not too much")
    if given.kind == "imagenet":
        images = ImageClasses(given.folder, broken_share=1)
        pictures, labels = images.batch(given.step * given.count, given.count, size)
        told = [f"{len(images)} pictures of {images.classes} classes; here {', '.join(map(str, labels))}"]
        return [_rgb(picture) for picture in pictures], [*told, images.faults.summary()]
    source, task, told = _source(given)
    return rows(source.batch(given.step, task, given.count, size), task), told + _report(source)


def _source(given: argparse.Namespace) -> tuple[Source, str, list[str]]:
    if given.kind == "scenes":
        return Scenes(given.folder), given.task or "depth", []
    options = dict(_option(text) for text in given.options)
    reader = open_reader(given.kind, given.folder, **options)
    return Folders(reader, broken_share=1), reader.task, [f"{len(reader)} samples of {reader.task}"]


def _option(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise InvalidInput(f"options of a reader are name=value, not {text!r}")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _report(source: Source) -> list[str]:
    return source.report() if isinstance(source, Folders) else []


def _rgb(planes: np.ndarray) -> Picture:
    """[3, H, W] in [-1, 1] -> [H, W, 3] uint8."""
    return np.rint(np.clip(np.moveaxis(planes, 0, -1) * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def _target(target: np.ndarray, task: str) -> Picture:
    """[4, H, W] coded -> colours: depth red to violet, flow on the wheel, the whole object on white."""
    from saccade.formats.colour import colorize_depth, colorize_flow

    if task == "depth":
        return colorize_depth((target[0] + 1) / 2)
    if task == "flow":
        return colorize_flow(np.moveaxis(FlowCoding().decode(target[:2], max(target.shape[1:])), 0, -1))
    return _rgb(AmodalCoding().decode_rgb(target[1:]))


def _known(image: np.ndarray, weight: np.ndarray) -> Picture:
    """The picture, darkened to a quarter where nothing is known."""
    share = np.kron(weight.reshape(weight.shape[-2:]), np.ones((CELL, CELL), np.float32))
    return (_rgb(image) * (0.25 + 0.75 * share[..., None])).astype(np.uint8)


def _beside(*cells: Picture) -> Picture:
    gap = np.full((cells[0].shape[0], GAP_PX, 3), 128, np.uint8)
    return np.concatenate([part for cell in cells for part in (gap, cell)][1:], axis=1)


if __name__ == "__main__":
    sys.exit(main())
