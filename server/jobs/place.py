"""Where jobs are kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from saccade.errors import SaccadeError
from server.jobs.store import Store
from server.settings import Settings

OFF = Path("off")
SECRET_CHARACTERS = 16
logger = logging.getLogger(__name__)


def opened(settings: Settings) -> Store | None:
    """The store that the settings want, or None where jobs are off.

    A file that was asked for must be had (raises SaccadeError); the default one is done without if it cannot be.
    """
    if settings.jobs_file == OFF:
        return None
    if settings.jobs_file is not None:
        return _open(settings.jobs_file, settings)
    if settings.port == 0:
        return None  # the server that comes after this one would not know the file as its own
    try:
        return _open(default_folder(os.environ) / f"jobs-{settings.port}.sqlite", settings)
    except SaccadeError as error:
        logger.warning("%s; requests are answered at once, or not at all: set jobs_file", error)
        return None


def secret(file: Path | None) -> str | None:
    """What webhooks are signed with; None where there are none. Raises SaccadeError for a file that is no secret."""
    if file is None:
        return None
    try:
        found = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SaccadeError(
            f"webhook_secret_file cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if len(found) < SECRET_CHARACTERS:
        raise SaccadeError(f"webhook_secret_file must hold at least {SECRET_CHARACTERS} characters")
    return found


def default_folder(environment: Mapping[str, str]) -> Path:
    """systemd's, else the user's for state."""
    if given := environment.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if given := environment.get("XDG_STATE_HOME"):
        return Path(given) / "saccade"
    try:
        return Path.home() / ".local" / "state" / "saccade"
    except RuntimeError as error:
        raise SaccadeError("there is no home folder to keep jobs in") from error


def _open(file: Path, settings: Settings) -> Store:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SaccadeError(f"jobs cannot be kept in {file}: {error.strerror or error}") from error
    return Store(file, limit=settings.jobs_limit, max_bytes=settings.jobs_max_bytes, keep_s=settings.jobs_keep_s)
