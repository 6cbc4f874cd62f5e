"""What every way of asking shares: pictures as people hold them, options as keywords."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from saccade.errors import InvalidInput

if TYPE_CHECKING:
    from saccade.dial import Quality
    from saccade.ensemble import Reduction
    from saccade.schedule import Spacing

ImageLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

# Pictures in a row, or a video: its path or its bytes.
Frames = Sequence[ImageLike] | str | os.PathLike[str] | bytes

# People's own pictures are not a stranger's: more than a server takes, and less than Pillow warns of.
MAX_PIXELS = 80_000_000

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


# Rows of x, y (pixels) and metres; a NumPy array [N, 3] will do.
Known = Iterable[Sequence[float]] | NDArray[Any]


class Choices(TypedDict, total=False):
    """The fields of `saccade.pipeline.Options`, where they are described. What is left out or None is the model's own
    default."""

    steps: int | None
    ensemble_size: int | None
    reduction: Reduction | None
    seed: int
    spacing: Spacing | None
    processing_resolution: int | None
    match_input_resolution: bool
    output_uncertainty: bool
    budget_ms: int | None
    quality: Quality | None
    target_uncertainty: float | None


def to_bytes(image: ImageLike, param: str) -> bytes:
    """A picture file's bytes: read from a path, as given, or a lossless file made of what is in memory.

    Arrays are uint8 [H, W], [H, W, 3] or [H, W, 4], or bool [H, W]. Raises InvalidInput that names `param`.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return _read(Path(image), param)
    if isinstance(image, np.ndarray):
        return _save(_from_array(image, param), param)
    if isinstance(image, Image.Image):
        return _save(image, param)
    raise InvalidInput(f"{param} must be a path, bytes, a PIL image or an array, not {_kind(image)}", param=param)


def _kind(given: object) -> str:
    several = "; several: use depths() or flows()" if isinstance(given, list | tuple) else ""
    return type(given).__name__ + several


def parts(frames: Frames) -> list[tuple[str, ImageLike]]:
    """Frames under the names that the server takes them by. Raises InvalidInput for none."""
    if isinstance(frames, str | os.PathLike | bytes):
        return [("video", frames)]
    if not len(frames):
        raise InvalidInput("there are no frames", param="image")
    return [("image", image) for image in frames]


def points(known: Known | None) -> list[tuple[float, float, float]] | None:
    """Rows of x, y and metres as plain numbers. Raises InvalidInput for anything else."""
    try:
        return None if known is None else [(float(x), float(y), float(metres)) for x, y, metres in known]
    except (TypeError, ValueError) as error:
        raise InvalidInput("known_depths must be rows of x, y and metres", param="known_depths") from error


def points_text(known: Known | None) -> str | None:
    """The same as the server takes them."""
    rows = points(known)
    return None if rows is None else json.dumps(rows)


def _read(path: Path, param: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}", param=param) from error


def _from_array(array: NDArray[Any], param: str) -> Image.Image:
    levels = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    if levels.dtype != np.uint8 or levels.shape[2:] not in ((), (3,), (4,)) or levels.ndim < 2 or 0 in levels.shape:
        raise InvalidInput(
            f"{param} must be uint8 [H, W], [H, W, 3] or [H, W, 4], or bool [H, W]; it is {array.dtype} {array.shape}",
            param=param,
        )
    return Image.fromarray(np.ascontiguousarray(levels))


def _save(image: Image.Image, param: str) -> bytes:
    """PNG, or TIFF for the modes that PNG lacks. Upright, because neither carries an orientation here."""
    out = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        upright.save(out, "PNG" if image.mode in _PNG_MODES else "TIFF", compress_level=1)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{param} cannot be read as a picture of mode {image.mode}: {error}", param=param) from error
    return out.getvalue()
