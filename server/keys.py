"""Who may ask: API keys of a file, hashed, each with its scopes and its rate. Without a file everybody may.

An entry of the file has `name` (shown in logs; owns its jobs), `sha256` of the key in hex, `scopes` (left out: every
one), `rate_per_minute` (left out: as many as it likes), `burst` (asked at once before the rate holds) and `weight` (its
share of a busy server, against that of the other keys; left out: 1).
`saccade keys new` makes one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import shutil
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from saccade.errors import InvalidInput
from server import problems
from server.logs import state
from server.problems import Problem

ScopeName = Literal["depth", "flow", "amodal", "jobs", "models", "v2", "metrics"]
SCOPES: tuple[ScopeName, ...] = get_args(ScopeName)
NEEDED: dict[str, ScopeName] = {
    "/depth": "depth",
    "/flow": "flow",
    "/amodal": "amodal",
    "/mask": "amodal",
    "/jobs": "jobs",
    "/models": "models",
    "/v2": "v2",
    "/metrics": "metrics",
}
"""What a path and everything under it needs; any key will do for what is neither here nor open."""
OPEN = ("/livez", "/readyz", "/page", "/v2/health")
"""Asked without a key, with everything under them: probes, and the page's own files."""
MARK = "sk-"
LONGEST_KEY = 256
LOOK_S = 1.0
MOST_FILE_BYTES = 2**22
logger = logging.getLogger(__name__)


class Key(BaseModel):
    """One entry of the file. A key has 256 random bits, so that a plain digest tells nothing about it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[ScopeName, ...] = SCOPES
    rate_per_minute: float | None = Field(None, gt=0)
    burst: int = Field(10, ge=1)
    weight: float = Field(1.0, ge=0.01, le=100)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...] = ()


class Bucket:
    """Lets `burst` requests through at once, and then `per_minute`."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst, self._clock = per_minute / 60, burst, clock
        self._tokens, self._at = float(burst), clock()

    def take(self) -> float:
        """0 if one may pass now, else the seconds until one may."""
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.per_second)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self.per_second
        self._tokens -= 1
        return 0.0


class Ring:
    """The keys of a file, looked at every second: a key that is taken out is refused from then on.

    Raises InvalidInput for a file that is not in order; one that breaks later leaves the keys as they were.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self._clock = file, clock
        self._keys: dict[str, Key] = {}
        self._buckets: dict[str, tuple[Key, Bucket]] = {}
        self._seen: tuple[int, ...] | None = None
        self._fault: str | None = None
        self.look()

    def look(self) -> None:
        """Read the file if it has changed. Raises InvalidInput."""
        seen = _stamp(self.file)
        if seen == self._seen:
            return
        self._keys = {key.sha256: key for key in read(self.file)}
        self._seen = seen
        self._buckets = {key.name: self._bucket(key) for key in self._keys.values() if key.rate_per_minute}
        logger.info("%d API keys are in force", len(self._keys))

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await asyncio.to_thread(self.look)
                self._fault = None
            except InvalidInput as error:
                if str(error) != self._fault:
                    logger.error("the keys stay as they were: %s", error)
                self._fault = str(error)

    def find(self, given: str) -> Key | None:
        return self._keys.get(digest(given)) if 0 < len(given) <= LONGEST_KEY else None

    def weight_of(self, name: str) -> float:
        """Of the key of that name; 1 where there is none any more."""
        return next((key.weight for key in self._keys.values() if key.name == name), 1.0)

    def wait_s(self, key: Key) -> float:
        """0 if the key may ask now, else the seconds until it may."""
        found = self._buckets.get(key.name)  # once: `look` puts others in their place from its own thread
        return 0.0 if found is None else found[1].take()

    def _bucket(self, key: Key) -> tuple[Key, Bucket]:
        """The key's own; a change of another one does not fill it up again."""
        before = self._buckets.get(key.name)
        if before is not None and before[0] == key:
            return before
        return key, Bucket(key.rate_per_minute or 0, key.burst, self._clock)


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError as error:
        raise InvalidInput(f"the keys file cannot be read ({type(error).__name__})", param="keys_file") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def read(file: Path) -> tuple[Key, ...]:
    """The keys of a TOML file. Raises InvalidInput that names the entry at fault, never what it holds."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_FILE_BYTES + 1)
        if len(data) > MOST_FILE_BYTES:
            raise InvalidInput("the keys file is too large", param="keys_file")
        found = _File.model_validate(tomllib.loads(data.decode())).keys
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInput(f"the keys file is not in order at {where}: {first['msg']}", param="keys_file") from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the keys file cannot be read ({type(error).__name__})", param="keys_file") from error
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in found]
        if len(set(values)) < len(values):
            raise InvalidInput(f"two keys have the same {field}", param="keys_file")
    return found


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new() -> str:
    """A key of 256 random bits."""
    return MARK + secrets.token_urlsafe(32)


def entry(
    name: str,
    key: str,
    scopes: Sequence[str] | None,
    rate_per_minute: float | None,
    burst: int,
    weight: float = 1.0,
) -> str:
    """The key's lines of the file; `scopes` None: every one. Raises InvalidInput."""
    facts: dict[str, object] = {"name": name, "sha256": digest(key), "burst": burst, "weight": weight}
    facts["rate_per_minute"] = rate_per_minute
    try:
        made = Key.model_validate(facts | {"scopes": tuple(SCOPES if scopes is None else scopes)})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"{first['loc'][0]}: {first['msg']}", param=str(first["loc"][0])) from error
    quoted = ", ".join(f'"{scope}"' for scope in made.scopes)
    lines = ["[[keys]]", f'name = "{made.name}"', f'sha256 = "{made.sha256}"', f"scopes = [{quoted}]"]
    lines += [] if rate_per_minute is None else [f"rate_per_minute = {rate_per_minute:g}", f"burst = {burst}"]
    lines += [] if weight == 1 else [f"weight = {weight:g}"]
    return "\n".join([*lines, ""])


def add(file: Path, lines: str) -> None:
    """Put an entry at the end of the file, which is made where it is missing. Raises InvalidInput or OSError."""
    before = file.read_text() if file.exists() else ""
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(f"{before.rstrip()}\n\n{lines}" if before.strip() else lines)
    try:
        read(beside)
        if before:
            shutil.copymode(file, beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def is_open(path: str) -> bool:
    return path == "/" or any(_under(path, known) for known in OPEN)


def needed(path: str, headers: Headers) -> set[ScopeName]:
    """The scopes that a request must have; what answers later is fetched as a job."""
    wanted = {scope for known, scope in NEEDED.items() if _under(path, known)}
    later = "respond-async" in ",".join(headers.getlist("prefer")).lower()
    return wanted | ({"jobs"} if later else set())


def _under(path: str, known: str) -> bool:
    return path == known or path.startswith(known + "/")


class Keys:
    """ASGI layer: 401 without a key that is known, 403 without the scope, 429 past the rate; else state["key"] and its
    state["weight"]."""

    def __init__(self, app: ASGIApp, ring: Ring) -> None:
        self.app, self.ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check(scope)
        except Problem as problem:
            extra = {"WWW-Authenticate": 'Bearer realm="saccade"'} if problem.kind is problems.UNAUTHORIZED else None
            return await problems.response(problem, extra)(scope, receive, send)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path, headers = str(scope["path"]), Headers(scope=scope)
        given = _given(headers)
        key = None if given is None else self.ring.find(given)
        if key is not None:
            state(scope)["key"] = key.name
            state(scope)["weight"] = key.weight
        if is_open(path):
            return
        if key is None:
            raise Problem(problems.UNAUTHORIZED, f"{_said(given)} Send one as Authorization: Bearer {MARK}...")
        if lacking := sorted(needed(path, headers) - set(key.scopes)):
            raise Problem(problems.FORBIDDEN, f"This key lacks the scope {' and '.join(lacking)}. Ask its issuer.")
        if wait_s := self.ring.wait_s(key):
            raise Problem(problems.RATE_LIMITED, "This key has asked too often. Ask less often.", retry_after_s=wait_s)


def _given(headers: Headers) -> str | None:
    if (given := headers.get("x-api-key")) is not None:
        return given.strip()
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else None


def _said(given: str | None) -> str:
    return "This needs an API key." if given is None else "This API key is not known."
