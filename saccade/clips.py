"""Videos, and pictures that are one clip, on the command line: asked about as one, written as a folder or an MP4."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.errands import Format, Task, expand, suffix_format
from saccade.errors import InvalidInput

if TYPE_CHECKING:
    from saccade.client import Client
    from saccade.local import Local

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")


def is_clip(inputs: Sequence[Path], steady: bool | None) -> bool:
    """Whether the inputs are asked about as one: a video, or pictures with one scale. Raises InvalidInput for several
    videos, or one among pictures."""
    videos = [path for path in inputs if path.suffix.lower() in VIDEOS]
    if videos and len(inputs) > 1:
        raise InvalidInput(f"{videos[0].name} is a video: ask about it alone", param="video")
    return bool(videos) or bool(steady)


def target(task: Task, inputs: Sequence[Path], out: Path | None, format: Format | None) -> tuple[Path, Format]:
    """Where the answers go: an MP4 file, or a folder of files. Raises InvalidInput for a file of another format."""
    out = out or Path(f"{inputs[0].stem}_{task}")
    named = suffix_format(out)
    if named == "mp4" or (format == "mp4" and named is None):
        return out.with_suffix(".mp4"), "mp4"
    if named is not None or format == "mp4":
        raise InvalidInput(f"{out}: of several answers name a folder, or an .mp4", param="output")
    return out, format or "png"


def ask(task: Task, inputs: Sequence[Path], model: Client | Local, about: dict[str, Any]) -> Any:
    """The answers, a `saccade.sequence.Seen`."""
    video = inputs[0].suffix.lower() in VIDEOS
    frames = inputs[0] if video else [path for given in inputs for path in expand(given)]
    return model.flows(frames, **about) if task == "flow" else model.depths(frames, **about)


def write(seen: Any, out: Path, format: Format, style: Any) -> None:
    """Answers to `out` as `target` has chosen it: PNGs in colours unless `style` says otherwise."""
    from saccade import reel, render

    if format == "mp4":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(reel.encode(seen, "mp4").data)
        return
    out.mkdir(parents=True, exist_ok=True)
    style = style or ("color" if format == "png" else "data")
    for index, answer in enumerate(seen):
        (out / f"{index:04}.{format}").write_bytes(render.encode(answer, format, style, "npy").data)


def known_depths(file: Path) -> list[tuple[float, float, float]]:
    """Rows of x, y and metres from a JSON array of arrays, or from lines of `x, y, metres`. Raises InvalidInput."""
    text = file.read_text("utf-8")
    try:
        rows = (
            json.loads(text) if text.lstrip().startswith("[") else [row for row in csv.reader(text.splitlines()) if row]
        )
        return [(float(x), float(y), float(metres)) for x, y, metres in rows]
    except (TypeError, ValueError) as error:
        told = f"{file.name} must hold rows of x, y and metres: JSON arrays, or lines of CSV without a head"
        raise InvalidInput(told, param="known_depths") from error
