"""Missing and broken files: named, counted, skipped up to a share of the dataset; then a clear stop."""

from __future__ import annotations

import errno
import logging
import math
import threading
from collections.abc import Callable
from typing import TypeVar

from saccade.errors import InvalidInput

log = logging.getLogger(__name__)

T = TypeVar("T")
NAMED = 5  # in the message of the stop
LOGGED = 20  # one line each; the rest are only counted
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the machine, not of the file


class TooManyFaults(InvalidInput):
    """More of a dataset is missing or broken than was allowed."""


class Faults:
    """Of one dataset of `length` samples: up to `share` of them (rounded up) may be missing or broken.

    What stands in for a broken sample is the next whole one by index, so a batch depends on the files alone and not on
    what was read before. Counts are of this process; each of several processes keeps its own.
    """

    def __init__(self, dataset: str, length: int, share: float = 0.01) -> None:
        if not 0 <= share <= 1:
            raise InvalidInput(f"a share of broken files lies between 0 and 1, not at {share}", param="share")
        if length < 1:
            raise InvalidInput(f"{dataset}: no samples were found")
        self.dataset, self.length = dataset, length
        self.allowed = math.ceil(share * length)
        self.reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def read(self, index: int, read: Callable[[int], T], name: Callable[[int], str] = str) -> T:
        """What `read` makes of `index`, or of the first whole sample after it (around the end to the beginning).

        Raises TooManyFaults.
        """
        for step in range(self.length):
            at = (index + step) % self.length
            if at in self.reasons:
                continue
            try:
                return read(at)
            except InvalidInput as error:
                reason = str(error)
            except OSError as error:
                if error.errno in _OURS:
                    raise InvalidInput(f"{self.dataset}: the machine ran short: {error.strerror}") from error
                reason = error.strerror or type(error).__name__
            self._record(at, _named(name(at), " ".join(reason.split())[:300]))
        raise TooManyFaults(f"{self.dataset}: not one of {self.length} samples can be read. {self.summary()}")

    def summary(self) -> str:
        """One line: how many, of how many, and the first of them by index."""
        with self._lock:
            first = [reason for _, reason in sorted(self.reasons.items())[:NAMED]]
            count = len(self.reasons)
        return f"{count} of {self.length} samples are missing or broken" + (": " + "; ".join(first) if first else "")

    def _record(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.reasons:
                return
            self.reasons[index] = reason
            count = len(self.reasons)
        if count <= LOGGED:
            log.warning("%s: skipped %s", self.dataset, reason)
        if count > self.allowed:
            raise TooManyFaults(f"{self.dataset}: {self.summary()}. At most {self.allowed} were allowed; see to them.")


def _named(name: str, reason: str) -> str:
    """A reason that begins with the file's own name is not told it twice."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{reason}".lstrip("/") if reason.startswith(file) else f"{name}: {reason}"
