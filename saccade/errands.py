"""From what a person names on the command line to pictures to ask about, and the files their answers go to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from saccade.errors import InvalidInput

Task = Literal["depth", "flow", "amodal"]
Format = Literal["png", "npy", "npz", "flo", "pfm", "exr", "json", "mp4"]
FORMATS: tuple[str, ...] = get_args(Format)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Errand:
    """One question: its pictures under the names that the clients' methods give them, and where the answer goes."""

    pictures: dict[str, Path]
    out: Path
    format: Format


def plan(
    task: Task,
    inputs: Sequence[Path],
    *,
    mask: Path | None = None,
    out: Path | None = None,
    format: Format | None = None,
) -> list[Errand]:
    """One errand for each picture, or for flow for each pair of neighbours, in the order of their names.

    One picture (or pair) goes to the file `out`, default <name>_<task>.png; more than that, or a folder, to files named
    as their pictures in the folder `out`. Raises InvalidInput for what is not there and for what would be overwritten.
    """
    found = [path for given in inputs for path in expand(given)]
    asked = _questions(task, found, mask)
    if len(asked) == 1 and not any(given.is_dir() for given in inputs):
        errands = [_single(task, asked[0], out, format)]
    else:
        errands = _several(task, asked, _folder(task, inputs, out), format or "png")
    _spare({path for question in asked for path in question.values()}, errands)
    return errands


def collect(out: Path, format: Format | None) -> Errand:
    """The errand of an answer that was asked for before. Raises InvalidInput where no format is named."""
    return Errand({}, out, format or _by_suffix(out))


def expand(given: Path) -> list[Path]:
    """A file as it is, a folder as its pictures in the order people count in."""
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise InvalidInput(f"no such file or folder: {given}", param="image")
    found = [path for path in given.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    if not found:
        raise InvalidInput(f"no pictures ({' '.join(PICTURES)}) in {given}", param="image")
    return sorted(found, key=_counted)


def _counted(path: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d*)(\D*)", path.name)]


def _questions(task: Task, found: Sequence[Path], mask: Path | None) -> list[dict[str, Path]]:
    if task == "flow":
        if len(found) < 2:
            raise InvalidInput("flow needs two frames or more", param="next_image")
        return [{"image": image, "next_image": following} for image, following in pairwise(found)]
    if mask is None:
        return [{"image": image} for image in found]
    return [{"image": image, "mask": _mask(image, mask)} for image in found]


def _mask(image: Path, mask: Path) -> Path:
    """`mask` itself, or the picture in it that is named as the image is."""
    if not mask.is_dir():
        return mask
    for path in expand(mask):
        if path.stem == image.stem:
            return path
    raise InvalidInput(f"no mask for {image.name} in {mask}", param="mask")


def _single(task: Task, question: dict[str, Path], out: Path | None, format: Format | None) -> Errand:
    stem = question["image"].stem
    if out is None:
        out = Path(f"{stem}_{task}.{format or 'png'}")
    elif out.is_dir():
        out = out / f"{stem}.{format or 'png'}"
    return Errand(question, out, format or _by_suffix(out))


def suffix_format(out: Path) -> Format | None:
    """What a file's ending says."""
    for format in get_args(Format):
        if out.suffix.lower() == f".{format}":
            return format  # type: ignore[no-any-return]
    return None


def _by_suffix(out: Path) -> Format:
    if (format := suffix_format(out)) is not None:
        return format
    raise InvalidInput(f"{out}: say the format with --format or an ending: {' '.join('.' + f for f in FORMATS)}")


def _folder(task: Task, inputs: Sequence[Path], out: Path | None) -> Path:
    if out is None:
        if len(inputs) == 1:
            return Path(f"{inputs[0].resolve().name}_{task}")
        raise InvalidInput("several pictures: name a folder for their answers with -o", param="output")
    if out.is_file() or (out.suffix[1:].lower() in FORMATS and not out.is_dir()):
        raise InvalidInput(f"several pictures need a folder, and {out} is a file", param="output")
    return out


def _several(task: Task, asked: Sequence[dict[str, Path]], folder: Path, format: Format) -> list[Errand]:
    """Pictures that differ only in their ending keep it: a.jpg.png, a.png.png."""
    shared = Counter(question["image"].stem for question in asked)
    errands = []
    for question in asked:
        image = question["image"]
        name = image.stem if shared[image.stem] == 1 else image.name
        errands.append(Errand(question, folder / f"{name}.{format}", format))
    return errands


def _spare(sources: set[Path], errands: Sequence[Errand]) -> None:
    kept = {path.resolve() for path in sources}
    targets = Counter(errand.out.resolve() for errand in errands)
    for target, times in targets.items():
        if target in kept:
            raise InvalidInput(f"{target.name} would be overwritten by its answer: choose another -o", param="output")
        if times > 1:
            raise InvalidInput(
                f"two pictures are named {target.stem}: ask for their folders one by one", param="output"
            )
