"""One WebDataset shard: where its samples lie in the tar file, and one of them read and checked."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from training.data.files import naming, plain_only

MAX_LATENT_BYTES = 2**26
MAX_LABEL_BYTES = 4096
MAX_SHARD_SAMPLES = 1_000_000
BLOCK = 512  # of a tar file


class File:
    """An open file, closed when nobody reads it any more, in whichever thread that is."""

    def __init__(self, path: Path) -> None:
        self.descriptor = plain_only(str(path), os.O_RDONLY)

    def __del__(self) -> None:
        if (descriptor := getattr(self, "descriptor", None)) is not None:
            os.close(descriptor)


class Shard:
    """Where the samples of a tar file lie: `spans` [N, 4] of (latent at, bytes, label at, bytes), in bytes from its
    beginning; -1 where a sample lacks the one or the other."""

    def __init__(self, path: Path, file: File) -> None:
        with naming(path):
            self.spans, self.as_json = _index(file.descriptor)

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, file: File, row: int) -> tuple[NDArray[np.floating], int]:
        if row >= len(self.spans):
            raise InvalidInput(f"the shard holds {len(self.spans)} samples only")
        at, size, label_at, label_size = (int(n) for n in self.spans[row])
        if at < 0 or label_at < 0:
            raise InvalidInput(f"it has no {'latent' if at < 0 else 'label'}")
        if size > MAX_LATENT_BYTES or label_size > MAX_LABEL_BYTES:
            raise InvalidInput("it is too large to be a latent and a label")
        latent, label = (_bytes(file.descriptor, *span) for span in ((at, size), (label_at, label_size)))
        return _latent(latent), _label(label, bool(self.as_json[row]))


def _bytes(descriptor: int, at: int, size: int) -> bytes:
    data = os.pread(descriptor, size, at)
    if len(data) != size:
        raise InvalidInput("the shard is cut short")
    return data


def _index(descriptor: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Spans [N, 4], and which labels are JSON [N], of a tar file's samples (POSIX ustar; other headers are passed by).

    A sample is what shares a name up to its first dot, as in WebDataset.
    """
    rows: dict[str, list[int]] = {}
    as_json: set[str] = set()
    for name, at, size in _members(descriptor):
        stem, _, suffix = name.rpartition("/")[2].partition(".")
        key = f"{name.rpartition('/')[0]}/{stem}"
        if suffix not in ("npy", "cls", "json"):
            continue
        row = rows.setdefault(key, [-1, -1, -1, -1])
        if suffix == "npy":
            row[:2] = at, size
        elif suffix == "cls" or row[2] < 0:
            row[2:] = at, size
            as_json.discard(key) if suffix == "cls" else as_json.add(key)
        if len(rows) > MAX_SHARD_SAMPLES:
            raise InvalidInput(f"a shard holds at most {MAX_SHARD_SAMPLES} samples")
    spans = np.array(list(rows.values()), np.int64).reshape(-1, 4)
    return spans, np.array([key in as_json for key in rows], bool)


def _members(descriptor: int) -> Iterator[tuple[str, int, int]]:
    """(name, where its bytes begin, how many) of the plain files in a tar. Raises InvalidInput for what is not one."""
    end, at = os.fstat(descriptor).st_size, 0
    while at + BLOCK <= end:
        header = os.pread(descriptor, BLOCK, at)
        if not header.strip(b"\0"):
            return
        told = header[148:156].strip(b" \0")
        if not told.isdigit() or int(told, 8) != sum(header) - sum(header[148:156]) + 8 * 0x20:
            raise InvalidInput(f"not a tar file, or damaged at byte {at}")
        size = _size(header[124:136])
        if not 0 <= size <= end - at - BLOCK:
            raise InvalidInput("the tar file is cut short")
        if header[156:157] in (b"0", b"\0"):
            prefix, name = (part.split(b"\0")[0].decode("utf-8", "replace") for part in (header[345:500], header[:100]))
            yield (f"{prefix}/{name}" if prefix else name), at + BLOCK, size
        at += BLOCK + -(-size // BLOCK) * BLOCK
    if at != end:
        raise InvalidInput("the tar file is cut short")


def _size(field: bytes) -> int:
    """Octal digits, or (GNU) a large number behind a first byte of 128."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() else -1


def _latent(data: bytes) -> NDArray[np.floating]:
    begins = 10 + int.from_bytes(data[8:10], "little")
    shape, dtype = _header(data[:begins])
    rest = data[begins:]
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise InvalidInput("its latent is not as long as its header says")
    values = np.frombuffer(rest, dtype).reshape(shape)
    if not np.isfinite(values).all():
        raise InvalidInput("its latent holds NaN or infinite values")
    return values


@lru_cache(maxsize=16)
def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Of a .npy file of version 1, as all small ones are; the latents of a shard share theirs."""
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1024)
    except Exception as error:  # NumPy lets those of the tokenizer through, and more
        raise InvalidInput("its latent is not a .npy file") from error
    if dtype not in (np.float16, np.float32) or fortran or len(shape) != 3 or any(n < 1 for n in shape):
        raise InvalidInput(f"a latent is [C, h, w] of float16 or float32, not {dtype} {shape}")
    return shape, dtype


def _label(data: bytes, as_json: bool) -> int:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("its label is not a number") from error
    if as_json and isinstance(value, dict):
        value = value.get("label")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise InvalidInput("its label is not a number from 0")
    return value
