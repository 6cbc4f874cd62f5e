"""Files of datasets, read with bounds: what is too large, cut short or of another type is an InvalidInput by name.

Whatever decoder runs below, nothing but InvalidInput and OSError comes out.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput, SaccadeError, UnreadablePicture

MAX_FILE_BYTES = 2**28
MAX_PIXELS = 2**26  # ImageNet's largest pictures have some 50 million
MAX_LIST_BYTES = 2**27
LEAST_SIDE = 8

_PPM = re.compile(rb"P6(?:\s+|\s*#[^\n]*\n\s*)(\d{1,6})\s+(\d{1,6})\s+255\s")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before every complaint about it, and turn a decoder's own errors into InvalidInput."""
    try:
        yield
    except InvalidInput as error:
        told = str(error)
        raise InvalidInput(told if told.startswith(path.name) else f"{path.name}: {told}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InvalidInput(f"{path.name}: cannot be decoded ({error})") from error
    except SaccadeError:
        raise
    except MemoryError as error:
        raise InvalidInput(f"{path.name}: needs too much memory to decode") from error
    except Exception as error:
        raise InvalidInput(f"{path.name}: cannot be decoded ({type(error).__name__}: {error})") from error


def contents(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """All of a plain file of at most `most` bytes. Raises OSError, or InvalidInput."""
    with open(path, "rb", opener=plain_only) as file:
        size = file.seek(0, 2)
        if size > most:
            raise InvalidInput(f"{path.name}: {size} bytes are more than the {most} that such a file may have")
        file.seek(0)
        return file.read(most)


def picture(path: Path) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB from PNG, JPEG, WebP, BMP, TIFF or PPM, told by its first bytes and not by its name."""
    from saccade.formats.pictures import read_picture

    with naming(path):
        data = contents(path)
        rgb = _ppm(data) if data[:2] == b"P6" else read_picture(data, max_pixels=MAX_PIXELS)
        if min(rgb.shape[:2]) < LEAST_SIDE:
            raise InvalidInput(f"{rgb.shape[1]} x {rgb.shape[0]} pixels are too few")
        return rgb


def levels(path: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """[H, W] or [H, W, 3], uint8 or uint16: a PNG as stored."""
    from saccade.formats.maps import read_png

    with naming(path):
        return read_png(contents(path), max_pixels=MAX_PIXELS)


def mask(path: Path) -> NDArray[np.uint8]:
    """[H, W] uint8, 0 outside and 255 inside, what lies between where the file has it so; 0 and 1 are taken as 0 and
    255, a mask of one bit or of colours as its brightness."""
    with naming(path):
        brightness = picture(path).max(-1)
        return brightness * np.uint8(255) if brightness.max() == 1 else brightness


def flo(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """flow [H, W, 2] px and known [H, W] from a Middlebury `.flo`; what it calls unknown (over 1e9) is 0."""
    from saccade.formats.maps import read_flo

    with naming(path):
        return known_flow(read_flo(contents(path), max_pixels=MAX_PIXELS))


def known_flow(flow: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The finite vectors, and where they are."""
    known = np.isfinite(flow).all(-1)
    return np.where(known[..., None], flow, np.float32(0)), known


def pfm(path: Path) -> NDArray[np.float32]:
    """[H, W] or [H, W, 3], top row first."""
    from saccade.formats.maps import read_pfm

    with naming(path):
        return read_pfm(contents(path), max_pixels=MAX_PIXELS)


def lines(path: Path, most: int = MAX_LIST_BYTES) -> list[str]:
    """Lines of a text file that are not blank, without the space around them."""
    with naming(path):
        text = contents(path, most).decode("utf-8-sig")
        return [line.strip() for line in text.splitlines() if line.strip()]


def within(root: Path, name: str) -> Path:
    """`root` / `name`, which a list may not lead out of."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InvalidInput(f"the name {name[:100]!r} leads out of the dataset")
    return root / name


def same_size(path: Path, **planes: np.ndarray) -> None:
    """Raise InvalidInput unless all have the same height and width."""
    sizes = {name: plane.shape[:2] for name, plane in planes.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {w} x {h}" for name, (h, w) in sizes.items())
        raise InvalidInput(f"{path.name}: its parts differ in size: {told}")


def listed(folder: Path, *patterns: str) -> list[Path]:
    """What matches, sorted. Raises InvalidInput where there is no such folder or nothing in it."""
    if not folder.is_dir():
        raise InvalidInput(f"there is no folder {folder}")
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not found:
        raise InvalidInput(f"{folder} holds nothing like {' or '.join(patterns)}")
    return found


def plain_only(name: str, flags: int) -> int:
    """Open without waiting for whoever writes into a pipe, and refuse what is not a file."""
    import os

    descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInput(f"{Path(name).name} is not a plain file")
    return descriptor


def _ppm(data: bytes) -> NDArray[np.uint8]:
    from saccade.formats.pictures import check_pixels

    head = _PPM.match(data[:256])
    if head is None:
        raise UnreadablePicture("the PPM header is malformed, or not of 8 bits")
    width, height = (int(n) for n in head.groups())
    check_pixels(width, height, MAX_PIXELS, "image")
    if len(data) - head.end() < 3 * width * height:
        raise UnreadablePicture("the PPM is cut short")
    return np.frombuffer(data, np.uint8, 3 * width * height, head.end()).reshape(height, width, 3).copy()
