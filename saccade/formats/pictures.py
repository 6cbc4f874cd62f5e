"""Photographs and masks, read from bytes that a stranger sent."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Image.open with a formats list only knows plugins that are already imported.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from saccade.errors import InvalidInput, PictureTooLarge, UnreadablePicture, UnsupportedPicture

MAX_PIXELS = 20_000_000
MIN_SIDE = 2
MAX_ASPECT = 50
MAX_JPEG_SCANS = 100
MAX_TIFF_STRIPS = 65_536

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
}
_NATIVE = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(data: bytes, *, max_pixels: int = MAX_PIXELS, param: str = "image") -> NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB, upright by its EXIF orientation. PNG, JPEG, WebP, BMP, TIFF, or the first frame of a GIF.

    Transparent pixels are laid on white, colour profiles are ignored. 16-bit levels are scaled to 8. Floating-point and
    32-bit pictures must hold 0..1, 0..255 or 0..65535 (the smallest range that fits is taken, negatives are 0).
    Raises UnsupportedPicture, PictureTooLarge (before any pixel is decoded), UnreadablePicture, or InvalidInput for a
    side under 2 px or an aspect ratio over 50.
    """
    with refusing(param):
        return _rgb(_upright_picture(data, max_pixels, param))


def read_mask(data: bytes, *, max_pixels: int = MAX_PIXELS, param: str = "mask") -> NDArray[np.bool_]:
    """[H, W] bool from any picture `read_picture` reads, with the same errors.

    A picture with transparent pixels says it by its alpha (over one half: inside). Any other says it by brightness, the
    largest of its channels: inside is what is brighter than half of the brightest pixel, so 0/1 masks work as 0/255 do.
    """
    with refusing(param):
        picture = _upright_picture(data, max_pixels, param)
        brightness = _brightness(picture)
        return np.asarray(2.0 * brightness > brightness.max(), np.bool_)


@contextmanager
def refusing(param: str) -> Iterator[None]:
    """Turn whatever a decoder throws into one of our errors about `param`."""
    try:
        yield
    except InvalidInput as error:
        error.param = error.param or param
        raise
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureTooLarge("The file needs too much memory to decode. Send a smaller one.", param=param) from error
    except Exception as error:
        raise UnreadablePicture(
            "The file cannot be decoded: it is cut short, damaged, or a rare variant of its type. "
            "Save it again, as PNG if in doubt, and send it whole.",
            param=param,
        ) from error


def check_pixels(width: int, height: int, max_pixels: int, param: str) -> None:
    """Raise PictureTooLarge, or UnreadablePicture if there is no pixel at all."""
    if width < 1 or height < 1:
        raise UnreadablePicture("The file holds no pixels. Send a whole picture.", param=param)
    if width * height > max_pixels:
        raise PictureTooLarge(
            f"The file holds {width} x {height} pixels; the limit is {max_pixels} in all. Send a smaller one.",
            param=param,
        )


def open_picture(data: bytes, *, max_pixels: int, param: str) -> Image.Image:
    """The picture with its header read and its sizes checked, no pixel decoded yet."""
    kind = _kind(data, param)
    for width, height in _declared_sizes(data, kind, param):
        check_pixels(width, height, max_pixels, param)
    picture = Image.open(io.BytesIO(data), formats=(kind,))
    check_pixels(*picture.size, max_pixels, param)
    if _tiff_tag(picture, 284) == 2 and (_tiff_tag(picture, 258) or 1) > 8:  # Pillow mixes up the bytes of these
        raise UnsupportedPicture("TIFFs of 16-bit separate planes are not read. Save it as PNG.", param=param)
    return picture


def _upright_picture(data: bytes, max_pixels: int, param: str) -> Image.Image:
    picture = open_picture(data, max_pixels=max_pixels, param=param)
    check_proportions(*picture.size, param)
    _unpack_as_decoded(picture)
    picture.load()
    return _upright(picture)


def _kind(data: bytes, param: str) -> str:
    if not data:
        raise UnreadablePicture("The file is empty. Send the bytes of a picture.", param=param)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    raise UnsupportedPicture("Unknown file type. Send a PNG, JPEG, WebP, BMP, TIFF or GIF picture.", param=param)


def check_proportions(width: int, height: int, param: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise InvalidInput(f"The picture is {width} x {height} px; each side needs at least {MIN_SIDE}.", param=param)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidInput(
            f"The picture is {width} x {height} px; one side may be at most {MAX_ASPECT} times the other. Crop it.",
            param=param,
        )


def _declared_sizes(data: bytes, kind: str, param: str) -> list[tuple[int, int]]:
    """Sizes that a decoder would allocate for on opening, or without looking at the picture's own size."""
    if kind == "WEBP":
        return _webp_sizes(data)
    if kind == "TIFF":
        return _tiff_sizes(data, param)
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise UnsupportedPicture(
            f"The JPEG has more than {MAX_JPEG_SCANS} scans. Save it again as a plain JPEG.", param=param
        )
    return []


def _webp_sizes(data: bytes) -> list[tuple[int, int]]:
    chunk, head = data[12:16], data[20:30]
    if chunk == b"VP8X":
        return [(1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little"))]
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return [(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))]
    width, height = struct.unpack("<HH", head[6:10])
    return [(width & 0x3FFF, height & 0x3FFF)]


def _tiff_sizes(data: bytes, param: str) -> list[tuple[int, int]]:
    fields = _tiff_fields(data)
    if max(fields.get(273, (0, 0))[0], fields.get(324, (0, 0))[0]) > MAX_TIFF_STRIPS:
        raise UnsupportedPicture("The TIFF is cut into too many strips or tiles. Save it again as PNG.", param=param)
    pairs = [(fields.get(256), fields.get(257)), (fields.get(322), fields.get(323))]
    return [(width[1], height[1]) for width, height in pairs if width and height]


def _tiff_fields(data: bytes) -> dict[int, tuple[int, int]]:
    """tag -> (count, first value where it is an integer held in the entry itself) of the first directory."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, start)
    fields = {}
    for position in range(start + 2, start + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, position)
        (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, position + 8)
        fields[tag] = (count, value)
    return fields


def _unpack_as_decoded(picture: Any) -> None:
    """libtiff hands over native byte order; Pillow would swap these once more."""
    picture.tile = [
        tile._replace(args=(_NATIVE.get(tile.args[0], tile.args[0]), *tile.args[1:]))
        if tile.codec_name == "libtiff"
        else tile
        for tile in picture.tile
    ]


def _upright(picture: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # pixels are whole: a damaged EXIF block is no reason to refuse them
        return picture
    return picture if method is None else picture.transpose(method)


def _rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if _is_wide(picture):
        return np.repeat(_grey(picture)[..., None], 3, axis=-1)
    if not _has_transparency(picture):
        return np.array(_convert(picture, "RGB"))
    white = Image.new("RGBA", picture.size, "white")
    return np.array(Image.alpha_composite(white, _convert(picture, "RGBA")).convert("RGB"))


def _brightness(picture: Image.Image) -> NDArray[Any]:
    if _is_wide(picture):
        return np.asarray(_finite(picture))
    rgba = np.asarray(_convert(picture, "RGBA"))
    if _has_transparency(picture) and rgba[..., 3].min() < 255:
        return np.asarray(rgba[..., 3] > 127)
    return np.asarray(rgba[..., :3].max(axis=-1))


def _has_transparency(picture: Image.Image) -> bool:
    return picture.has_transparency_data or picture.mode in ("La", "RGBa")


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode == "LAB":
        raise UnsupportedPicture("Lab colours are not read. Save the picture as RGB.")
    key = picture.info.get("transparency")
    if picture.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        picture.info["transparency"] = tuple(level >> 8 for level in key)
    return picture.convert(mode)


def _is_wide(picture: Image.Image) -> bool:
    return picture.mode in ("I", "F") or picture.mode.startswith("I;")


def _finite(picture: Image.Image) -> NDArray[Any]:
    values = np.asarray(picture)
    if not np.isfinite(values).all():
        raise UnsupportedPicture("The picture holds NaN or infinite values. Replace them.")
    return values


def _grey(picture: Image.Image) -> NDArray[np.uint8]:
    values = _finite(picture)
    scaled = np.clip(values, 0, None) * np.float32(255 / _full_scale(picture, values))
    grey: NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    if _tiff_tag(picture, 262) == 0 and picture.mode.startswith("I;"):
        grey = 255 - grey
    if isinstance(key := picture.info.get("transparency"), int):
        grey[values == key] = 255
    return grey


def _full_scale(picture: Image.Image, values: NDArray[Any]) -> int:
    if picture.mode.startswith("I;"):
        return int(2 ** (_tiff_tag(picture, 258) or 16) - 1)
    peak = values.max()
    for scale in (1, 255, 65535):
        if peak <= scale and not (scale == 1 and picture.mode == "I"):
            return scale
    raise UnsupportedPicture("The picture's values go past 65535. Scale them to 0..1, 0..255 or 0..65535.")


def _tiff_tag(picture: Image.Image, tag: int) -> int | None:
    value = getattr(picture, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value
