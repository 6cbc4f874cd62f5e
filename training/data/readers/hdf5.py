"""HDF5 files with bounds: what a dataset would take in memory is known before a byte of it is read."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import numpy as np

from saccade.errors import InvalidInput, NotInstalled
from training.data.files import MAX_FILE_BYTES, naming

MAX_BYTES = 2**28


def read(path: Path, name: str, row: int | None = None, most: int = MAX_FILE_BYTES) -> np.ndarray:
    """The dataset `name` at the file's root, or one row of it, as plain numbers.

    Raises OSError for a file that is not there, NotInstalled without h5py, and InvalidInput for one that is larger than
    `most` bytes or not HDF5, and for a dataset that is missing, not of numbers, too large, or lies in another file.
    """
    with naming(path), _open(path, most) as file:
        dataset = _dataset(file, name)
        shape = dataset.shape if row is None else dataset.shape[1:]
        if row is not None and not 0 <= row < (dataset.shape[0] if dataset.shape else 0):
            raise InvalidInput(f"{name} has {dataset.shape[:1]} rows, not one numbered {row}")
        chunk = math.prod(dataset.chunks or (1,))
        if max(math.prod(shape), chunk) * dataset.dtype.itemsize > MAX_BYTES:
            raise InvalidInput(f"{name} is {shape}, more than {MAX_BYTES} bytes")
        out: np.ndarray = dataset[()] if row is None else dataset[row]
        return out


def shape(path: Path, name: str, most: int = MAX_FILE_BYTES) -> tuple[int, ...]:
    """Of the dataset `name`; errors as `read`."""
    with naming(path), _open(path, most) as file:
        return tuple(int(n) for n in _dataset(file, name).shape)


def _open(path: Path, most: int) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise NotInstalled("HDF5 files need the package h5py: pip install 'saccade[train]'") from error
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInput("is not a plain file")
    if status.st_size > most:
        raise InvalidInput(f"{status.st_size} bytes are more than the {most} that such a file may have")
    return h5py.File(path, "r")


def _dataset(file: Any, name: str) -> Any:
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise InvalidInput(f"there is no {name} in it")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.shape is None or found.dtype.kind not in "fiub":
        raise InvalidInput(f"{name} is not an array of numbers")
    if found.external or found.is_virtual:
        raise InvalidInput(f"{name} lies in another file")
    return found
