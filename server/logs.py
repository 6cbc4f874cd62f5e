"""Every request has an id and a line in the log, which is text for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saccade.tasks import TASKS

HEADER = "X-Request-ID"
ACCEPTABLE = re.compile(r"[A-Za-z0-9._-]{1,128}")
QUIET_PATHS = ("/livez", "/readyz", "/metrics")
PATH_CHARACTERS = 200
CLIENT_CLOSED_REQUEST = 499
current_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being answered, wherever its code runs."""
current_trace: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""The trace that the request is part of, where traces are made."""
access = logging.getLogger("server.access")


def state(scope: Scope) -> dict[str, Any]:
    """What the layers tell each other of one request: `request_id`, `key` (the name of the caller's key, or None)."""
    found: dict[str, Any] = scope.setdefault("state", {})
    return found


class RequestIds:
    """ASGI layer: every answer has X-Request-ID, the caller's own where it is one that a log can hold."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER, "")
        identity = given if ACCEPTABLE.fullmatch(given) else uuid.uuid4().hex
        state(scope)["request_id"] = identity

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = identity
            await send(message)

        token = current_id.set(identity)
        try:
            await self.app(scope, receive, named)
        finally:
            current_id.reset(token)


class AccessLog:
    """ASGI layer: one line for each request when its answer has ended. Probes and scrapes are told in debug only.

    Neither query nor headers are written: they may hold what is nobody's business.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), CLIENT_CLOSED_REQUEST

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            _write(scope, status, (time.perf_counter() - began) * 1e3)


def _write(scope: Scope, status: int, milliseconds: float) -> None:
    path = str(scope["path"])
    level = logging.DEBUG if path in QUIET_PATHS and status < 500 else logging.INFO
    if not access.isEnabledFor(level):
        return
    task = path.removeprefix("/")
    fields = {
        "method": scope["method"],
        "path": path[:PATH_CHARACTERS],
        "task": task if task in TASKS else None,
        "status": status,
        "ms": round(milliseconds, 1),
        "key": state(scope).get("key"),
    }
    told = json.dumps(fields["path"])[1:-1]  # a path is a stranger's text: no line breaks, no terminal's escapes
    by = f" key {fields['key']}" if fields["key"] else ""
    access.log(level, "%s %s %d %.1f ms%s", fields["method"], told, status, milliseconds, by, extra={"fields": fields})


class Text(logging.Formatter):
    """A line for people; the request's id stands at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(of)s")

    def format(self, record: logging.LogRecord) -> str:
        identity = current_id.get()
        record.of = f" [{identity}]" if identity else ""
        return super().format(record)


class Json(logging.Formatter):
    """A JSON object in one line: time, level, logger, message, request_id, trace_id, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identity := current_id.get():
            line["request_id"] = identity
        if trace := current_trace.get():
            line["trace_id"] = trace
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def install(level: str, kind: Literal["text", "json"]) -> None:
    """Log to stderr from here on."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if kind == "json" else Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
