"""Several answers as one file: JSON with a list of them, a ZIP of one file each, or an MP4 to look at."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from saccade import render
from saccade.errors import InvalidInput
from saccade.formats.video import require_opencv, write_mp4
from saccade.pipeline import Answer, Picture
from saccade.render import CARRIES_UNCERTAINTY, FORMATS_OF_SEVERAL, Encoded, Encoding, Format, Render
from saccade.sequence import Seen
from saccade.tasks import TaskName

ZIP = "application/zip"
FPS_OF_PICTURES = 4.0
_PACKED: tuple[Format, ...] = ("png", "npz", "exr")


def media_type(format: Format) -> str:
    """Of several answers in `format`."""
    return render.MEDIA_TYPES[format] if format in ("json", "mp4") else ZIP


def check(task: TaskName, format: Format, style: Render = "data", output_uncertainty: bool = False) -> None:
    """Raise InvalidInput, which says what to ask for, where `encode` could not do it."""
    if format != "mp4":
        return render.check(task, format, style, output_uncertainty)
    if format not in FORMATS_OF_SEVERAL[task]:
        raise InvalidInput(f"{task} cannot be written as mp4; use format png", param="format")
    require_opencv()
    if output_uncertainty:
        told = f"an mp4 cannot carry an uncertainty; ask for {', '.join(CARRIES_UNCERTAINTY)}"
        raise InvalidInput(told, param="output_uncertainty")


def encode(
    seen: Seen,
    format: Format,
    style: Render = "data",
    encoding: Encoding = "png16",
    *,
    pictures: Sequence[Picture] | None = None,
) -> Encoded:
    """`format` json: one document; mp4: a video in colours; others: a ZIP of such files, 0000.png and so on, and an
    index.json. `pictures` are amodal's, for its colours.

    The same answers give the same bytes, but for the timings inside JSON. Raises InvalidInput as `check` does.
    """
    check(seen[0].task, format, style, seen[0].uncertainty is not None)
    if format == "json":
        data = json.dumps({"answers": [render.document(answer, encoding) for answer in seen]} | _facts(seen))
        return Encoded(data.encode(), media_type(format))
    if format == "mp4":
        return Encoded(write_mp4(_film(seen.answers), seen.fps or FPS_OF_PICTURES), media_type(format))
    grounds: Sequence[Picture | None] = pictures or [None] * len(seen)
    files = [
        render.encode(answer, format, style, encoding, picture=picture).data
        for answer, picture in zip(seen, grounds, strict=True)
    ]
    return Encoded(_zip(seen, files, format), ZIP)


def _facts(seen: Seen) -> dict[str, object]:
    return {"fps": seen.fps, "shots": seen.shots}


def _film(answers: Sequence[Answer]) -> list[Picture]:
    """All in one scale of colours."""
    if answers[0].task != "flow":
        return [render.coloured(answer) for answer in answers]
    fastest = max(float(np.hypot(*np.moveaxis(answer.prediction, -1, 0)).max()) for answer in answers)
    return [render.coloured(answer, fastest_px=max(fastest, 1e-6)) for answer in answers]


def _zip(seen: Seen, files: Sequence[bytes], format: Format) -> bytes:
    how = zipfile.ZIP_STORED if format in _PACKED else zipfile.ZIP_DEFLATED
    names = [f"{index:04}.{format}" for index in range(len(files))]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how, compresslevel=1) as archive:
        for name, data in zip(names, files, strict=True):
            archive.writestr(zipfile.ZipInfo(name), data, how)  # a date of its own would change the bytes
        index = json.dumps(_index(seen, names) | _facts(seen), indent=1)
        archive.writestr(zipfile.ZipInfo("index.json"), index, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _index(seen: Seen, names: Sequence[str]) -> dict[str, object]:
    first = seen[0]
    return {
        "task": first.task,
        "model": first.model,
        "digest": first.digest,
        "units": first.units,
        "options": asdict(first.options),
        "files": list(names),
        "metres": None if first.metres is None else asdict(first.metres),
        **({} if first.plan is None else {"plans": [asdict(one.plan) for one in seen if one.plan is not None]}),
    }
