"""An answer as a file: JSON, PNG, NumPy, .flo, PFM or EXR. What the server sends and what the command line writes."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saccade import formats
from saccade.errors import InvalidInput
from saccade.pipeline import Answer, Picture
from saccade.tasks import Array, TaskName

Format = Literal["json", "png", "npy", "npz", "flo", "pfm", "exr", "mp4"]
Render = Literal["data", "color", "object"]
Encoding = Literal["png16", "npy"]

MEDIA_TYPES: dict[Format, str] = {
    "json": "application/json",
    "png": "image/png",
    "npy": "application/x-npy",
    "npz": "application/x-npz",
    "flo": "application/x-flo",
    "pfm": "image/x-portable-floatmap",
    "exr": "image/x-exr",
    "mp4": "video/mp4",
}
FORMATS: dict[TaskName, tuple[Format, ...]] = {
    "depth": ("json", "png", "npy", "npz", "pfm", "exr"),
    "flow": ("json", "png", "npy", "npz", "flo", "pfm", "exr"),
    "amodal": ("json", "png", "npy", "npz", "exr"),
}
FORMATS_OF_SEVERAL: dict[TaskName, tuple[Format, ...]] = {
    "depth": (*FORMATS["depth"], "mp4"),
    "flow": (*FORMATS["flow"], "mp4"),
    "amodal": FORMATS["amodal"],
}
RENDERS: dict[TaskName, tuple[Render, ...]] = {
    "depth": ("data", "color"),
    "flow": ("data", "color"),
    "amodal": ("data", "color", "object"),
}
MILLIMETRES = 1000
CARRIES_UNCERTAINTY: tuple[Format, ...] = ("json", "npz", "exr")


@dataclass(frozen=True)
class Encoded:
    data: bytes
    media_type: str


def usable(task: TaskName, render: Render = "data", output_uncertainty: bool = False) -> tuple[Format, ...]:
    """The formats that can carry such an answer, the preferred first; empty if none can."""
    return tuple(
        kind
        for kind in FORMATS[task]
        if (render == "data" or kind == "png") and (not output_uncertainty or kind in CARRIES_UNCERTAINTY)
    )


def check(task: TaskName, format: Format, render: Render = "data", output_uncertainty: bool = False) -> None:
    """Raise InvalidInput, which says what to ask for, where `encode` could not do it."""
    if format == "mp4":
        raise InvalidInput("an mp4 shows several answers; ask for format png, or send a video", param="format")
    if format not in FORMATS[task]:
        raise InvalidInput(f"{task} cannot be written as {format}; use {', '.join(FORMATS[task])}", param="format")
    if render not in RENDERS[task]:
        raise InvalidInput(f"{task} has no render {render}; use {', '.join(RENDERS[task])}", param="render")
    if render != "data" and format != "png":
        raise InvalidInput(f"render {render} is a picture: ask for format png, or for render data", param="render")
    if output_uncertainty and format not in CARRIES_UNCERTAINTY:
        raise InvalidInput(
            f"this answer cannot carry an uncertainty; ask for {', '.join(CARRIES_UNCERTAINTY)} with render data, "
            "or leave output_uncertainty out",
            param="output_uncertainty",
        )


def encode(
    answer: Answer,
    format: Format,
    render: Render = "data",
    encoding: Encoding = "png16",
    *,
    picture: Picture | None = None,
) -> Encoded:
    """The answer's bytes. The same answer gives the same bytes, but for the timings inside JSON.

    `encoding` is that of the maps inside JSON. `picture` [H, W, 3] uint8 is the input: amodal's colour render lays the
    mask over it, on grey where it is None. Raises InvalidInput for what `check` refuses, and for an object of a model
    that paints none.
    """
    check(answer.task, format, render, answer.uncertainty is not None)
    if format == "json":
        data = json.dumps(document(answer, encoding)).encode()
    elif format == "png":
        data = _png(answer, render, picture)
    else:
        data = _WRITERS[format](answer)
    return Encoded(data, MEDIA_TYPES[format])


def document(answer: Answer, encoding: Encoding = "png16") -> dict[str, Any]:
    """The JSON answer. A map's value is raw * scale + offset; flow's PNG has a third channel, 1 where it is known."""
    prediction, uncertainty, completed = answer.prediction, answer.uncertainty, answer.completed
    return {
        "task": answer.task,
        "model": answer.model,
        "digest": answer.digest,
        "units": answer.units,
        "shape": list(prediction.shape[:2]),
        "options": asdict(answer.options),
        "timings_ms": {name: round(value, 3) for name, value in answer.timings_ms.items()},
        "prediction": _npy_map(prediction) if encoding == "npy" else _png_map(answer),
        "uncertainty": None if uncertainty is None else _uncertainty_map(uncertainty, encoding),
        "completed": None if completed is None else _map("png", "png", formats.write_png(completed), 1.0, 0.0),
        **({} if answer.metres is None else {"metres": asdict(answer.metres)}),
        **({} if answer.plan is None else {"plan": asdict(answer.plan)}),
    }


def _map(encoding: str, format: Format, data: bytes, scale: float, offset: float) -> dict[str, Any]:
    return {
        "encoding": encoding,
        "media_type": MEDIA_TYPES[format],
        "scale": scale,
        "offset": offset,
        "data": base64.b64encode(data).decode(),
    }


def _npy_map(values: NDArray[Any]) -> dict[str, Any]:
    return _map("npy", "npy", formats.write_npy(values), 1.0, 0.0)


def _png_map(answer: Answer) -> dict[str, Any]:
    """Depth in 65535 levels (in metres: in millimetres, or coarser steps where some are farther than 65.535 m), flow in
    1/64 px from -512 px as KITTI does, a mask as 0 and 255."""
    if answer.metres is not None:
        step = max(1 / MILLIMETRES, float(answer.prediction.max()) / 65535)
        return _map("png16", "png", formats.write_png(formats.to_uint16(_numbers(answer) / (65535 * step))), step, 0.0)
    data = _data_png(answer)
    if answer.task == "depth":
        return _map("png16", "png", data, 1 / 65535, 0.0)
    if answer.task == "flow":
        return _map("png16", "png", data, 1 / 64, -512.0)
    return _map("png", "png", data, 1 / 255, 0.0)


def _uncertainty_map(values: NDArray[np.float32], encoding: Encoding) -> dict[str, Any]:
    if encoding == "npy":
        return _npy_map(values)
    peak = float(values.max()) or 1.0
    return _map("png16", "png", formats.write_png(formats.to_uint16(values / peak)), peak / 65535, 0.0)


def _numbers(answer: Answer) -> Array:
    """The prediction as float32; a mask as 0 and 1."""
    return answer.prediction.astype(np.float32, copy=False)


def _png(answer: Answer, render: Render, picture: Picture | None) -> bytes:
    if render == "data":
        return _data_png(answer)
    if render == "object":
        if answer.completed is None:
            raise InvalidInput(f"model {answer.model} paints no objects; use render data or color", param="render")
        return formats.write_png(answer.completed)
    return formats.write_png(coloured(answer, picture))


def _data_png(answer: Answer) -> bytes:
    if answer.metres is not None:
        return formats.write_png(_millimetres(_numbers(answer)))
    if answer.task == "depth":
        return formats.write_png(formats.to_uint16(_numbers(answer)))
    if answer.task == "flow":
        return formats.write_kitti_flow(_numbers(answer))
    return formats.write_png(answer.prediction.astype(np.uint8) * np.uint8(255))


def _millimetres(metres: Array) -> NDArray[np.uint16]:
    """As depth cameras write it: 0 where it is not known, which what is farther than 65.535 m becomes."""
    levels = np.rint(metres * MILLIMETRES)
    return np.where(levels <= 65535, np.maximum(levels, 1), 0).astype(np.uint16)


def coloured(answer: Answer, picture: Picture | None = None, fastest_px: float | None = None) -> Picture:
    """[H, W, 3] uint8 RGB to look at: `picture` lies under a mask, `fastest_px` has a flow's full colour."""
    if answer.metres is not None:
        return formats.colorize_depth((_numbers(answer) - answer.metres.shift) / answer.metres.scale)
    if answer.task == "depth":
        return formats.colorize_depth(_numbers(answer))
    if answer.task == "flow":
        return formats.colorize_flow(_numbers(answer), fastest_px)
    mask = answer.prediction.astype(np.bool_)
    return formats.colorize_mask(_ground(picture, (mask.shape[0], mask.shape[1])), mask)


def _ground(picture: Picture | None, size: tuple[int, int]) -> Picture:
    if picture is None:
        return np.full((*size, 3), 128, np.uint8)
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))


def _npy(answer: Answer) -> bytes:
    return formats.write_npy(answer.prediction)


def _npz(answer: Answer) -> bytes:
    extra = {} if answer.uncertainty is None else {"uncertainty": answer.uncertainty}
    return formats.write_npz({"prediction": answer.prediction, **extra})


def _flo(answer: Answer) -> bytes:
    return formats.write_flo(_numbers(answer))


def _pfm(answer: Answer) -> bytes:
    """Flow as Scene Flow's files have it: u, v, 0."""
    values = _numbers(answer)
    if answer.task == "flow":
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return formats.write_pfm(values)


def _exr(answer: Answer) -> bytes:
    """Channels Z for depth, U and V for flow, A for a mask; `uncertainty` where there is one."""
    names = {"depth": "Z", "flow": "UV", "amodal": "A"}[answer.task]
    planes = np.atleast_3d(_numbers(answer))
    channels = {name: planes[..., index] for index, name in enumerate(names)}
    return formats.write_exr(channels | ({} if answer.uncertainty is None else {"uncertainty": answer.uncertainty}))


_WRITERS = {"npy": _npy, "npz": _npz, "flo": _flo, "pfm": _pfm, "exr": _exr}
