"""Memory that runs out kills the process and with it every request: so what would not fit is refused before.

Of all that would kill or starve it the nearest counts: the control group (v2 or v1, and the groups around it), the
address space allowed to the process, the machine, and the operator's own limit.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from server import problems
from server.problems import Problem

READ_EVERY_S = 0.02
TRIM_EVERY_S = 5.0
RETRY_AFTER_S = 5.0
UNLIMITED = 2**60
"""What version 1 of control groups says for no limit is a number of about this size."""
logger = logging.getLogger(__name__)


class Reading(NamedTuple):
    """Bytes; `source` is a word for the log."""

    source: str
    used: int
    limit: int


Source = Callable[[], Reading | None]


class Guard:
    """Keeps `share` of the nearest limit: admits what fits under it beside what is used and what is promised.

    What is promised (`hold`) counts in full until it is given back, though a part of it is already used: the error is
    on the safe side. Raises Problem 503 with Retry-After.
    """

    def __init__(
        self, sources: Sequence[Source], share: float = 0.9, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.share, self._sources, self._clock = share, sources, clock
        self.held = 0
        self.refused: Callable[[], None] = lambda: None  # told of every refusal
        self._nearest = Reading("none", 0, UNLIMITED)
        self._read_at = self._trimmed_at = self._told_at = float("-inf")

    @property
    def nearest(self) -> Reading:
        """The limit that leaves the least room; read at most every 20 ms."""
        now = self._clock()
        if now - self._read_at >= READ_EVERY_S:
            found = [reading for source in self._sources if (reading := source()) is not None]
            self._nearest = min(found, key=self._left, default=self._nearest)
            self._read_at = now
        return self._nearest

    @property
    def room(self) -> int:
        """Bytes that are free and not promised; below 0 where there is none."""
        return self._left(self.nearest) - self.held

    @property
    def exhausted(self) -> bool:
        return self._left(self.nearest) <= 0 and not (self._trim() and self._left(self.nearest) > 0)

    def check(self, more: int = 0) -> None:
        """Raises Problem if `more` bytes do not fit now."""
        if self.room >= more or (self._trim() and self.room >= more):
            return
        self.refused()
        self._tell(more)
        raise Problem(
            problems.LOW_MEMORY,
            "The server has too little memory for this now. Try again later, or send smaller or fewer pictures.",
            retry_after_s=RETRY_AFTER_S,
        )

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Promise `size` bytes to the block. Raises Problem: 503 if they do not fit now, 413 if they never will."""
        if size > self.nearest.limit * self.share:
            told = "This takes more memory than the server may use. Send smaller or fewer pictures, or ask for less."
            raise Problem(problems.TOO_LARGE, told)
        self.check(size)
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    def _left(self, reading: Reading) -> int:
        return int(reading.limit * self.share) - reading.used

    def _trim(self) -> bool:
        """Give what the allocator keeps back to the system, now and then; whether it was tried."""
        now = self._clock()
        if now - self._trimmed_at < TRIM_EVERY_S:
            return False
        self._trimmed_at, self._read_at = now, float("-inf")
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc has it, others do without
            ctypes.CDLL(None).malloc_trim(0)
        return True

    def _tell(self, more: int) -> None:
        now = self._clock()
        if now - self._told_at < TRIM_EVERY_S:
            return
        self._told_at = now
        logger.warning(
            "refused for want of memory: %s uses %d of %d MiB, %d promised, %d asked for",
            *(self._nearest.source, self._nearest.used >> 20, self._nearest.limit >> 20, self.held >> 20, more >> 20),
        )


def opened(limit_bytes: int | None, share: float) -> Guard:
    """A guard of this process; `limit_bytes` is the operator's own limit for its resident memory."""
    guard = Guard(sources(limit_bytes), share)
    nearest = guard.nearest
    logger.info("memory: %s has %d MiB, %d in use", nearest.source, nearest.limit >> 20, nearest.used >> 20)
    return guard


def sources(limit_bytes: int | None, root: Path = Path("/")) -> list[Source]:
    """Every limit that there is under `root`."""
    found: list[Source] = [lambda: _machine(root), lambda: _address_space(root)]
    found += [_group(folder) for folder in _groups(root)]
    if limit_bytes is not None:
        own = limit_bytes
        found.append(lambda: _ours(root, own))
    return found


def _ours(root: Path, limit: int) -> Reading | None:
    used = _kilobytes(root / "proc/self/status", "VmRSS")
    return None if used is None else Reading("memory_limit_bytes", used, limit)


def _address_space(root: Path) -> Reading | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = None if limit == resource.RLIM_INFINITY else _kilobytes(root / "proc/self/status", "VmSize")
    return None if used is None else Reading("address space", used, limit)


def _machine(root: Path) -> Reading | None:
    total, available = (_kilobytes(root / "proc/meminfo", name) for name in ("MemTotal", "MemAvailable"))
    return None if total is None or available is None else Reading("machine", total - available, total)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that hold this process's memory, the innermost first."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = top / path.lstrip("/")
        if not folder.is_dir():  # the path is the host's, the mount is the container's
            folder = top
        while folder.is_relative_to(top):
            yield folder
            folder = folder.parent


def _group(folder: Path) -> Source:
    """Used is what cannot be dropped at once: without the file pages that nobody has touched lately."""

    def read() -> Reading | None:
        for limit, usage, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, used = _text(folder / limit), _text(folder / usage)
            if most.isdigit() and used.isdigit() and int(most) < UNLIMITED:
                return Reading("control group", max(0, int(used) - _field(folder / "memory.stat", idle)), int(most))
        return None

    return read


def _field(file: Path, name: str) -> int:
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _kilobytes(file: Path, name: str) -> int | None:
    """Bytes of a line such as `VmRSS:   1234 kB`."""
    for line in _text(file).splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _text(file: Path) -> str:
    """Empty where there is no such file."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
