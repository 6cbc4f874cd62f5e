"""Maps as OpenEXR files. Channels in this house: depth `Z`, flow `U` and `V`, a mask `A`, a spread `uncertainty`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import UnsupportedPicture
from saccade.formats.pictures import MAX_PIXELS, check_pixels, refusing

MAX_CHANNELS = 16
MAX_TILE_SIDE = 8192

_MAGIC = b"\x76\x2f\x31\x01"


def write_exr(channels: Mapping[str, NDArray[np.floating]]) -> bytes:
    """name -> [H, W], all of one shape, to a ZIP-compressed float32 EXR. Raises ValueError for anything else."""
    import OpenEXR

    planes = {name: np.ascontiguousarray(plane, np.float32) for name, plane in channels.items()}
    shapes = {plane.shape for plane in planes.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or 0 in shape:
        raise ValueError("channels must be [H, W] arrays of one shape")
    if any(not name or "\0" in name for name in planes):
        raise ValueError("channels must have names")
    out = io.BytesIO()
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, planes).write(out)
    return out.getvalue()


def read_exr(data: bytes, *, max_pixels: int = MAX_PIXELS, param: str = "map") -> dict[str, NDArray[np.float32]]:
    """name -> [H, W] float32 of an EXR, scan-line or tiled, of any compression; half and integer are widened.

    Raises UnsupportedPicture (not an EXR, or deep, multi-part, subsampled, of too many channels, of huge tiles),
    PictureTooLarge (before any pixel is decoded) or UnreadablePicture.
    """
    with refusing(param):
        if data[:4] != _MAGIC:
            raise UnsupportedPicture("The file is not an OpenEXR file.", param=param)
        _check_headers([part.header for part in _parts(data, header_only=True)], max_pixels, param)
        [part] = _parts(data, separate_channels=True)  # a part that cannot be decoded whole is left out: ValueError
        return {name: channel.pixels.astype(np.float32) for name, channel in part.channels.items()}


def _parts(data: bytes, **options: bool) -> list[Any]:
    import OpenEXR

    return list(OpenEXR.File(io.BytesIO(data), **options).parts)


def _check_headers(headers: list[dict[str, Any]], max_pixels: int, param: str) -> None:
    """The headers decide how much the library allocates, whatever the file's length."""
    import OpenEXR

    if len(headers) != 1 or headers[0]["type"] not in (OpenEXR.scanlineimage, OpenEXR.tiledimage):
        raise UnsupportedPicture("Deep and multi-part EXR files are not read. Save one flat image.", param=param)
    [header] = headers
    (left, top), (right, bottom) = (corner.tolist() for corner in header["dataWindow"])
    check_pixels(right - left + 1, bottom - top + 1, max_pixels, param)
    channels, tiles = header["channels"], header.get("tiles")
    if len(channels) > MAX_CHANNELS or any((each.xSampling, each.ySampling) != (1, 1) for each in channels):
        raise UnsupportedPicture(f"EXR channels must be at most {MAX_CHANNELS} and not subsampled.", param=param)
    if tiles and max(tiles.xSize, tiles.ySize) > MAX_TILE_SIDE:
        raise UnsupportedPicture(f"EXR tiles must be at most {MAX_TILE_SIDE} px a side.", param=param)
