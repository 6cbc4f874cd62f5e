"""Which model ought to serve: what the settings say, or a file that may change at any time."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

NAME_BYTES = 256
logger = logging.getLogger(__name__)


class WantedModel:
    """The name of the model that ought to serve; None: whichever is the only one.

    With a `file` it is the file's content, looked at again and again, and `name` is what holds until that says
    something. A change counts once two looks in a row have found it, for the file may have been half written at the
    first. A file that is missing, empty or no name changes nothing; `fault` tells of it.
    """

    def __init__(self, file: Path | None, name: str | None) -> None:
        self.file, self.name = file, name
        self.fault: str | None = None
        self._last: str | None = None
        self._looks = 0

    @property
    def known(self) -> bool:
        """False until a file has held a name for the first time, where no other name was given."""
        return self.file is None or self.name is not None

    async def look(self) -> None:
        if self.file is not None:
            self._see(*await asyncio.to_thread(_read, self.file))

    def _see(self, found: str | None, fault: str | None) -> None:
        if found is not None and (self._looks == 0 or not self.known or found == self._last):
            self.name = found
        if fault is not None and fault != self.fault:
            logger.warning("%s: %s", fault, self.file)
        self._last, self.fault = found, fault
        self._looks += 1


def _read(file: Path) -> tuple[str | None, str | None]:
    """The name in the file, or what is wrong with it."""
    try:
        if not file.is_file():
            return None, "the model file is missing"
        with file.open("rb") as stream:
            name = stream.read(NAME_BYTES + 1).decode().strip()
    except (OSError, UnicodeError) as error:
        return None, f"the model file cannot be read ({type(error).__name__})"
    if not name:
        return None, "the model file is empty"
    if len(name.split()) > 1 or len(name) >= NAME_BYTES:
        return None, "the model file does not hold one name"
    return name, None
