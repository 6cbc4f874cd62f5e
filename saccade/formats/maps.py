"""Depth, flow and mask maps as files: PNG, NumPy, Middlebury .flo, PFM and KITTI flow. To bytes and back."""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from saccade.errors import PictureTooLarge, UnreadablePicture, UnsupportedPicture
from saccade.formats.pictures import MAX_PIXELS, check_pixels, open_picture, refusing

MAX_ARRAY_BYTES = 2**28
MAX_ARRAYS = 32
MAX_NPY_HEADER = 1024

_UP = 2  # the filter type of PNG (ISO 15948, 9.2)
# ISA-L's levels 0 to 2 hash an address of the thread's stack as if it were the input's third to sixth byte
# (write_first_byte in its assembly), so that a stack in some thousands gives other bytes. Level 3 has code of its own.
_LEVEL = 3
_COLOURS = {1: 0, 3: 2, 4: 6}
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_FLO_MAGIC = b"PIEH"
_FLO_UNKNOWN = np.float32(1e10)
_FLO_KNOWN_BELOW = 1e9
_PFM_HEADER = re.compile(rb"(P[Ff])\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?[\d.]{1,32}(?:[eE][-+]?\d{1,3})?)\s")
_KITTI_SCALE, _KITTI_ZERO = 64.0, 2**15

Levels = NDArray[np.uint8] | NDArray[np.uint16]


def to_uint8(unit: NDArray[np.floating]) -> NDArray[np.uint8]:
    """0..1 -> 0..255, rounded; clips, and what is not a number becomes 0."""
    return _quantize(unit, 255).astype(np.uint8)


def to_uint16(unit: NDArray[np.floating]) -> NDArray[np.uint16]:
    """0..1 -> 0..65535, rounded; clips, and what is not a number becomes 0."""
    return _quantize(unit, 65535).astype(np.uint16)


def write_png(levels: Levels) -> bytes:
    """[H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA, uint8 or uint16, to a PNG of just those bits.

    Every line is stored as its difference to the one above: on maps that comes as small as Pillow's search for the best
    filter. ISA-L deflates it about twice as fast as zlib's fastest, to as many bytes. On one machine the same
    levels give the same bytes in every thread and process. Raises ValueError for others.
    """
    kinds = ((), (3,), (4,)) if levels.ndim > 1 else ()
    if levels.dtype not in (np.uint8, np.uint16) or 0 in levels.shape or levels.shape[2:] not in kinds:
        raise ValueError(
            f"a PNG needs uint8 or uint16 [H, W], [H, W, 3] or [H, W, 4], not {levels.dtype} {levels.shape}"
        )
    height, width, channels = np.atleast_3d(levels).shape
    rows = levels.astype(levels.dtype.newbyteorder(">"), order="C").reshape(height, -1).view(np.uint8)
    lines = np.empty((height, 1 + rows.shape[1]), np.uint8)
    lines[:, 0] = _UP
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8 * levels.itemsize, _COLOURS[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", isal_zlib.compress(lines.data, _LEVEL)), (b"IEND", b"")]
    return b"".join([_PNG_MAGIC, *chain.from_iterable(_png_chunk(kind, content) for kind, content in chunks)])


def read_png(data: bytes, *, max_pixels: int = MAX_PIXELS, param: str = "map") -> Levels:
    """[H, W] or [H, W, 3], uint8 or uint16: a PNG's levels exactly as stored.

    Raises UnsupportedPicture for other files, palettes, alpha or fewer than 8 bits; PictureTooLarge; UnreadablePicture.
    """
    with refusing(param):
        if not data.startswith(_PNG_MAGIC) or (data[24:25], data[25:26]) not in _PNG_KINDS:
            raise UnsupportedPicture("The map must be a PNG, grey or RGB, of 8 or 16 bits.", param=param)
        high = _png_levels(data, max_pixels, param)
        if data[24:26] != b"\x10\x02":
            return high
        # Pillow has no 16-bit RGB mode: it unpacks the high bytes, or, told that they are little-endian, the low ones.
        low = _png_levels(data, max_pixels, param, rawmode="RGB;16L")
        return np.asarray(high.astype(np.uint16) << 8 | low)


_PNG_KINDS = [(bits, colour) for bits in (b"\x08", b"\x10") for colour in (b"\0", b"\2")]


def write_npy(array: NDArray[Any]) -> bytes:
    """Any array of numbers or booleans as a `.npy` file. Raises ValueError for objects."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), allow_pickle=False)
    return out.getvalue()


def read_npy(data: bytes, *, max_bytes: int = MAX_ARRAY_BYTES, param: str = "map") -> NDArray[Any]:
    """The array of a `.npy` file; numbers and booleans only, never a pickle.

    Raises UnsupportedPicture (another file, object or text dtypes), PictureTooLarge, or UnreadablePicture where the
    header does not match the length of the data.
    """
    with refusing(param):
        stream = io.BytesIO(data)
        shape, fortran, dtype = _npy_header(stream, param)
        count = math.prod(shape)
        _check_bytes(count * dtype.itemsize, max_bytes, param)
        if len(data) - stream.tell() != count * dtype.itemsize:
            raise UnreadablePicture("The .npy file is not as long as its header says. Send it whole.", param=param)
        stored = np.uint8 if dtype == np.bool_ else dtype
        flat = np.frombuffer(data, stored, count, stream.tell()).astype(dtype.newbyteorder("="))
        return flat.reshape(shape, order="F" if fortran else "C")


def write_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """name -> array as a compressed `.npz` file. Raises ValueError for objects."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), write_npy(array), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def read_npz(data: bytes, *, max_bytes: int = MAX_ARRAY_BYTES, param: str = "map") -> dict[str, NDArray[Any]]:
    """name -> array of a `.npz` file, with `read_npy`'s rules; `max_bytes` bounds all arrays together."""
    if not data.startswith((b"PK\3\4", b"PK\5\6")):
        raise UnsupportedPicture("The file is not an .npz archive.", param=param)
    with refusing(param), zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ARRAYS:
            raise PictureTooLarge(f"The archive holds more than {MAX_ARRAYS} arrays.", param=param)
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise UnsupportedPicture("The archive's compression is not read. Use numpy.savez_compressed.", param=param)
        _check_bytes(sum(entry.file_size for entry in entries), max_bytes, param)
        return {
            entry.filename.removesuffix(".npy"): read_npy(archive.read(entry), max_bytes=max_bytes, param=param)
            for entry in entries
        }


def write_flo(flow: NDArray[np.floating]) -> bytes:
    """[H, W, 2] px to a Middlebury `.flo`; a pixel that is not finite is written as unknown (1e10)."""
    height, width = _flow_size(flow)
    known = np.isfinite(flow).all(axis=-1, keepdims=True)
    return _FLO_MAGIC + struct.pack("<ii", width, height) + np.where(known, flow, _FLO_UNKNOWN).astype("<f4").tobytes()


def read_flo(data: bytes, *, max_pixels: int = MAX_PIXELS, param: str = "map") -> NDArray[np.float32]:
    """[H, W, 2] float32 px from a Middlebury `.flo`; unknown pixels (a component over 1e9) are NaN.

    Raises UnsupportedPicture (another file), PictureTooLarge or UnreadablePicture.
    """
    if data[:4] != _FLO_MAGIC:
        raise UnsupportedPicture("The file is not a Middlebury .flo file.", param=param)
    with refusing(param):
        width, height = struct.unpack_from("<ii", data, 4)
        flow = _floats(data, 12, (height, width, 2), "<f4", max_pixels, param)
        flow[~(np.abs(flow) <= _FLO_KNOWN_BELOW).all(axis=-1)] = np.nan
        return flow


def write_pfm(values: NDArray[np.floating]) -> bytes:
    """[H, W] or [H, W, 3] to a little-endian float32 PFM, bottom row first as the format has it."""
    if values.shape[2:] not in ((), (3,)) or values.ndim < 2 or 0 in values.shape:
        raise ValueError(f"a PFM needs [H, W] or [H, W, 3], not {values.shape}")
    kind = b"Pf" if values.ndim == 2 else b"PF"
    height, width = values.shape[:2]
    return kind + f"\n{width} {height}\n-1.0\n".encode() + values[::-1].astype("<f4").tobytes()


def read_pfm(data: bytes, *, max_pixels: int = MAX_PIXELS, param: str = "map") -> NDArray[np.float32]:
    """[H, W] or [H, W, 3] float32, top row first, from a PFM of either byte order; its scale's size is not applied.

    Raises UnsupportedPicture (another file), PictureTooLarge or UnreadablePicture.
    """
    if data[:2] not in (b"PF", b"Pf"):
        raise UnsupportedPicture("The file is not a PFM file.", param=param)
    header = _PFM_HEADER.match(data[:128])
    if header is None:
        raise UnreadablePicture("The PFM header is malformed.", param=param)
    kind, width, height, scale = header.groups()
    with refusing(param):
        shape = (int(height), int(width)) + ((3,) if kind == b"PF" else ())
        dtype = "<f4" if float(scale) < 0 else ">f4"
        return _floats(data, header.end(), shape, dtype, max_pixels, param)[::-1].copy()


def write_kitti_flow(flow: NDArray[np.floating], valid: NDArray[np.bool_] | None = None) -> bytes:
    """[H, W, 2] px (and [H, W] bool) to KITTI's 16-bit RGB PNG: u * 64 + 2^15, v likewise, valid.

    Steps of 1/64 px. Flow that is not finite or does not fit in -512 .. 511.98 px is written as invalid, not clipped: a
    missing vector is honest, a wrong one is not.
    """
    height, width = _flow_size(flow)
    with np.errstate(over="ignore", invalid="ignore"):
        u, v = (np.rint(flow[..., axis].astype(np.float64) * _KITTI_SCALE + _KITTI_ZERO) for axis in (0, 1))
    fits = (u >= 0) & (u <= 65535) & (v >= 0) & (v <= 65535)
    if valid is not None:
        fits &= valid
    out = np.empty((height, width, 3), np.uint16)
    out[..., 0], out[..., 1], out[..., 2] = np.where(fits, u, 0), np.where(fits, v, 0), fits
    return write_png(out)


def read_kitti_flow(
    data: bytes, *, max_pixels: int = MAX_PIXELS, param: str = "map"
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """[H, W, 2] float32 px and [H, W] bool from a KITTI flow PNG; flow is 0 where not valid. Errors as `read_png`."""
    levels = read_png(data, max_pixels=max_pixels, param=param)
    if levels.dtype != np.uint16 or levels.ndim != 3:
        raise UnsupportedPicture("KITTI flow must be a 16-bit RGB PNG.", param=param)
    valid = levels[..., 2] > 0
    flow = (levels[..., :2].astype(np.float32) - _KITTI_ZERO) / np.float32(_KITTI_SCALE)
    return np.where(valid[..., None], flow, np.float32(0)), valid


def _quantize(unit: NDArray[np.floating], top: int) -> NDArray[np.floating]:
    levels = np.clip(unit, 0, 1) * np.float64(top)
    np.copyto(levels, 0, where=np.isnan(unit))
    return np.asarray(np.rint(levels, out=levels))


def _png_chunk(kind: bytes, content: bytes) -> tuple[bytes, ...]:
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(kind))
    return struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)


def _png_levels(data: bytes, max_pixels: int, param: str, rawmode: str | None = None) -> Levels:
    picture: Any = open_picture(data, max_pixels=max_pixels, param=param)
    if rawmode:
        picture.tile = [tile._replace(args=rawmode) for tile in picture.tile]
    return np.array(picture)


def _npy_header(stream: io.BytesIO, param: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if stream.getvalue()[:6] != b"\x93NUMPY":
        raise UnsupportedPicture("The file is not a .npy file.", param=param)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise UnsupportedPicture("The .npy version is not read. Save plain numbers with numpy.save.", param=param)
    shape, fortran, dtype = readers[version](stream, max_header_size=MAX_NPY_HEADER)
    if dtype.kind not in "biufc" or dtype.hasobject:
        raise UnsupportedPicture("Only arrays of numbers or booleans are read.", param=param)
    if any(side < 0 for side in shape) or len(shape) > 8:
        raise UnreadablePicture("The .npy header has an impossible shape.", param=param)
    return shape, fortran, dtype


def _check_bytes(size: int, max_bytes: int, param: str) -> None:
    if size > max_bytes:
        raise PictureTooLarge(f"The arrays take {size} bytes; the limit is {max_bytes}. Send less.", param=param)


def _flow_size(flow: NDArray[np.floating]) -> tuple[int, int]:
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f"flow must be [H, W, 2], not {flow.shape}")
    return flow.shape[0], flow.shape[1]


def _floats(
    data: bytes, start: int, shape: tuple[int, ...], dtype: str, max_pixels: int, param: str
) -> NDArray[np.float32]:
    check_pixels(shape[1], shape[0], max_pixels, param)
    count = math.prod(shape)
    if len(data) - start != 4 * count:
        raise UnreadablePicture("The file is not as long as its header says. Send it whole.", param=param)
    return np.frombuffer(data, dtype, count, start).astype(np.float32).reshape(shape)
