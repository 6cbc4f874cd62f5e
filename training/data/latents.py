"""Pre-encoded latents in WebDataset shards: plain tar files of NNNNNNNNN.npy and NNNNNNNNN.cls, read at any place.

The library `webdataset` reads them as well (`wds.WebDataset(...).decode()`): a sample is the two members of one name,
the latent [C, h, w] as NumPy wrote it (float16 or float32) and its label as digits. `about.json` beside them tells what
the latents are of, and how many lie in every shard.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from training.data.faults import Faults
from training.data.files import contents, naming
from training.data.order import Order
from training.data.shards import MAX_SHARD_SAMPLES, File, Shard

ABOUT = "about.json"
FORMAT = "saccade latents 1"
MAX_ABOUT_BYTES = 2**24
OPEN_SHARDS = 64  # each keeps a descriptor; what stays of the others is where their samples lie, 33 bytes each


class LatentWriter:
    """Write shards into `folder`, each aside and then renamed, so that what bears its name is whole.

    `about` goes into about.json (the codec, the size of the pictures, names of the classes: JSON values). Writing goes
    on after the last whole shard: `done` samples are there already, the caller begins with the next. Close it, or use
    it in a `with`, to write the last shard and about.json; after an error, what was not a whole shard is dropped.
    """

    def __init__(self, folder: Path, about: dict[str, Any], per_shard: int = 10_000, dtype: str = "float16") -> None:
        if dtype not in ("float16", "float32"):
            raise InvalidInput(f"latents are kept as float16 or float32, not as {dtype}", param="dtype")
        if not 1 <= per_shard <= MAX_SHARD_SAMPLES:
            raise InvalidInput(f"a shard holds 1 to {MAX_SHARD_SAMPLES} samples, not {per_shard}", param="per_shard")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.about, self.per_shard, self.dtype = folder, dict(about), per_shard, np.dtype(dtype)
        self.counts: list[int] = []
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0
        self._go_on()

    @property
    def done(self) -> int:
        """Samples written so far, those of an earlier run included."""
        return sum(self.counts) + self._in_shard

    def add(self, latent: NDArray[np.floating], label: int) -> None:
        """One sample, [C, h, w] and its class. Raises InvalidInput for what is not finite, or of another shape than the
        first."""
        values = np.asarray(latent)
        if values.ndim != 3 or not np.isfinite(values).all():
            raise InvalidInput(f"a latent is [C, h, w] of finite numbers, not {values.shape}")
        with np.errstate(over="ignore"):
            kept = np.ascontiguousarray(values.astype(self.dtype))
        if not np.isfinite(kept).all():
            raise InvalidInput("a latent goes past what float16 can hold: write float32")
        if not 0 <= int(label) < 2**31:
            raise InvalidInput(f"labels are counted from 0, not {label}")
        shape = self.about.setdefault("shape", list(values.shape))
        if list(values.shape) != list(shape):
            raise InvalidInput(f"this latent is {list(values.shape)}, those before it are {list(shape)}")
        if self._tar is None and self.counts and self.counts[-1] < self.per_shard:
            raise InvalidInput(f"{self.folder} was finished: its last shard is not full")
        if self._tar is None:
            self._tar = tarfile.open(  # noqa: SIM115 (open until the shard is full)
                self._path(len(self.counts), ".part"), "w", format=tarfile.USTAR_FORMAT
            )
        name = f"{self.done:09d}"
        array = io.BytesIO()
        np.save(array, kept, allow_pickle=False)
        for suffix, data in (("npy", array.getvalue()), ("cls", str(int(label)).encode())):
            member = tarfile.TarInfo(f"{name}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._in_shard += 1
        if self._in_shard == self.per_shard:
            self._finish_shard()

    def close(self) -> None:
        if self._in_shard:
            self._finish_shard()

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._path(len(self.counts), ".part").unlink(missing_ok=True)

    def _go_on(self) -> None:
        if not (self.folder / ABOUT).exists():
            return
        found = _read_about(self.folder)
        mine = {**self.about, "dtype": self.dtype.name, "per_shard": self.per_shard}
        if other := sorted(key for key in mine if key in found and found[key] != json.loads(json.dumps(mine[key]))):
            raise InvalidInput(f"{self.folder} holds latents of another kind: {', '.join(other)} differ")
        self.about = {**found, **self.about}
        self.counts = [int(n) for n in found["counts"]]

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        number = len(self.counts)
        _rename(self._path(number, ".part"), self._path(number))
        self.counts.append(self._in_shard)
        self._tar, self._in_shard = None, 0
        about = {**self.about, "format": FORMAT, "dtype": self.dtype.name, "per_shard": self.per_shard}
        aside = self.folder / f"{ABOUT}.part"
        aside.write_text(json.dumps({**about, "counts": self.counts}, indent=1))
        _rename(aside, self.folder / ABOUT)

    def _path(self, number: int, suffix: str = "") -> Path:
        return self.folder / f"shard-{number:06d}.tar{suffix}"


class Latents:
    """Shards of latents, gone through in epochs, each in its own order over all shards.

    Shards that `LatentWriter` did not write are read as well if their members are NAME.npy with NAME.cls (or NAME.json
    with a number, or {"label": number}); without about.json they are counted by reading their headers once.
    """

    def __init__(self, folder: Path, seed: int = 0, broken_share: float = 0.0, shuffle: bool = True) -> None:
        if not folder.is_dir():
            raise InvalidInput(f"there is no folder {folder}")
        self.folder = folder
        self.paths = sorted(folder.glob("*.tar"))
        if not self.paths:
            raise InvalidInput(f"{folder} holds no shard (*.tar): write some with `saccade encode`")
        self.about: dict[str, Any] = _read_about(folder) if (folder / ABOUT).exists() else {}
        self._shards: dict[int, Shard] = {}
        self._files: OrderedDict[int, File] = OrderedDict()
        self._broken: dict[int, str] = {}
        self._lock = threading.Lock()
        counts = self.about.get("counts") or [len(self._shard(n)[0]) for n in range(len(self.paths))]
        if len(counts) != len(self.paths):
            raise InvalidInput(f"{folder}: {ABOUT} tells of {len(counts)} shards, there are {len(self.paths)}")
        self._ends = np.cumsum(counts)
        self.faults = Faults(f"latents in {folder.name}", len(self), broken_share)
        self.order = Order(len(self), seed, shuffle)
        self.shape: tuple[int, ...] = self._first_shape()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, step: int, part: int, count: int, parts: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Part `part` of `parts` of a step, `count` samples each: latents [B, C, h, w] float32, labels [B] int64."""
        if not 0 <= part < parts:
            raise InvalidInput(f"there is no part {part} of {parts}")
        return self.at((step * parts + part) * count, count)

    def at(self, first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Samples `first` .. `first` + `count`, counted over all epochs."""
        latents = np.empty((count, *self.shape), np.float32)
        labels = np.empty(count, np.int64)
        for row, index in enumerate(self.order.at(first, count)):
            latents[row], labels[row] = self.faults.read(int(index), self.read, self.name)
        return latents, labels

    def read(self, index: int) -> tuple[NDArray[np.floating], int]:
        """One sample by its place in the shards."""
        shard, row = self._place(index)
        spans, file = self._shard(shard)
        latent, label = spans.read(file, row)
        if hasattr(self, "shape") and latent.shape != self.shape:
            raise InvalidInput(f"it is {latent.shape}, the first one is {self.shape}")
        return latent, label

    def name(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self.paths[shard].name} sample {row}"

    def _first_shape(self) -> tuple[int, ...]:
        told = self.about.get("shape")
        if isinstance(told, list) and len(told) == 3 and all(isinstance(n, int) and 0 < n < 2**20 for n in told):
            return tuple(told)
        return tuple(self.faults.read(0, self.read, self.name)[0].shape)

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard - 1] if shard else 0)

    def _shard(self, number: int) -> tuple[Shard, File]:
        with self._lock:
            if number in self._broken:
                raise InvalidInput(self._broken[number])
            if number not in self._files:
                self._files[number] = File(self.paths[number])
            self._files.move_to_end(number)
            if len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)
            if number not in self._shards:
                try:
                    self._shards[number] = Shard(self.paths[number], self._files[number])
                except InvalidInput as error:
                    self._broken[number] = str(error)
                    raise
            return self._shards[number], self._files[number]


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    with naming(path):
        about = json.loads(contents(path, MAX_ABOUT_BYTES))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise InvalidInput(f"does not tell of latents in the form {FORMAT!r}")
        counts = about.get("counts")
        if not isinstance(counts, list) or not all(type(n) is int and 0 < n <= MAX_SHARD_SAMPLES for n in counts):
            raise InvalidInput("its counts are not numbers of samples")
        return about


def _rename(aside: Path, path: Path) -> None:
    """Make it last before it gets its name, and the name after."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
