"""Several files read and decoded at once: the results do not depend on how many threads there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from saccade.errors import InvalidInput

Item = TypeVar("Item")
Made = TypeVar("Made")


class Together:
    """`threads` threads, started when first needed; with one, the caller's own."""

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= 256:
            raise InvalidInput(f"there may be 1 to 256 threads, not {threads}", param="threads")
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def map(self, make: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
        """Made of each item, in their order. After an error, what has not begun does not begin."""
        if self.threads == 1:
            return [make(item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "data")
        begun = [self._pool.submit(make, item) for item in items]
        try:
            return [future.result() for future in begun]
        finally:
            for future in begun:
                future.cancel()
