"""Everything that goes wrong, as RFC 9457 application/problem+json with a stable `type`."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saccade.errors import (
    BackendTimeout,
    BackendUnavailable,
    InvalidInput,
    MetresUndetermined,
    NotInstalled,
    PictureTooLarge,
    SaccadeError,
    UnreadablePicture,
    UnsupportedPicture,
)
from server.drain import Drain

MEDIA_TYPE = "application/problem+json"
CLIENT_CLOSED_REQUEST = 499
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """`slug` ends the stable type URN; `meaning` is for the documentation."""

    slug: str
    status: int
    title: str
    meaning: str

    @property
    def type(self) -> str:
        return f"urn:saccade:problem:{self.slug}"


MALFORMED = Kind(
    "malformed-request", 400, "Malformed request", "The body is not the multipart or JSON it claims to be."
)
UNAUTHORIZED = Kind("unauthorized", 401, "Unauthorized", "The server wants an API key that it knows.")
FORBIDDEN = Kind("forbidden", 403, "Forbidden", "The API key lacks the scope that the path needs.")
NOT_FOUND = Kind("not-found", 404, "Not found", "There is nothing at this path.")
METHOD = Kind("method-not-allowed", 405, "Method not allowed", "The path exists; `Allow` lists its methods.")
NOT_DONE = Kind("not-done", 409, "Not done yet", "The job has no result yet; its events say when.")
GONE = Kind("gone", 410, "Gone", "The job was cancelled, or its result was kept for its time.")
NOT_ACCEPTABLE = Kind("not-acceptable", 406, "Not acceptable", "None of the accepted media types can be produced.")
SLOW_UPLOAD = Kind("upload-timeout", 408, "Upload took too long", "The body did not arrive in time.")
MATCHES = Kind("matches", 412, "Answer not changed", "`If-None-Match` names the answer that this would be.")
TOO_LARGE = Kind("too-large", 413, "Too large", "The body, a file or a picture's pixel count exceeds its limit.")
UNSUPPORTED = Kind(
    "unsupported-media-type", 415, "Unsupported media type", "The body or a picture is of an unread type."
)
INVALID = Kind("invalid-input", 422, "Invalid input", "A field or option cannot be used; `param` names it.")
KEY_REUSED = Kind(
    "idempotency-key-reused", 422, "Idempotency key reused", "The same key came before with another request."
)
METRES = Kind(
    "metres-undetermined", 422, "Metres undetermined", "The `known_depths` cannot determine a scale and a shift."
)
OVERLOADED = Kind(
    "overloaded", 429, "Too much work pending", "The queue is full; try again after `Retry-After` seconds."
)
RATE_LIMITED = Kind(
    "rate-limited", 429, "Asked too often", "The key is past its rate; try again after `Retry-After` seconds."
)
LOW_MEMORY = Kind(
    "low-memory", 503, "Too little memory", "The work would not fit into memory now; try again after `Retry-After`."
)
INTERNAL = Kind("internal", 500, "Internal error", "A fault of the server; `instance` is the id of its log entry.")
INTERRUPTED = Kind("interrupted", 500, "Interrupted", "The server ended again and again while the job ran.")
NOT_INSTALLED = Kind("not-installed", 501, "Not installed", "This server lacks a package that the request needs.")
UNAVAILABLE = Kind(
    "unavailable", 503, "Unavailable", "The model cannot answer now, or did not in time: try again later."
)
BACKEND_TIMEOUT = Kind(
    "backend-timeout", 504, "Backend took too long", "What runs the model did not answer in time: try again later."
)
LEAVING = Kind("leaving", 503, "Shutting down", "The server ends before the answer is ready: ask again, or another.")
TIMEOUT = Kind("timeout", 503, "Took too long", "The answer was not ready in time, and its work was withdrawn.")
REFUSED = Kind("refused", 400, "Request refused", "The request was refused for another reason.")
KINDS = (
    *(MALFORMED, NOT_FOUND, METHOD, NOT_ACCEPTABLE, SLOW_UPLOAD, TOO_LARGE, UNSUPPORTED, INVALID, OVERLOADED),
    *(METRES, NOT_INSTALLED, MATCHES),
    *(UNAUTHORIZED, FORBIDDEN, RATE_LIMITED, LOW_MEMORY, LEAVING),
    *(NOT_DONE, GONE, KEY_REUSED, INTERRUPTED),
    *(INTERNAL, UNAVAILABLE, BACKEND_TIMEOUT, TIMEOUT, REFUSED),
)
_BY_STATUS = {400: MALFORMED, 404: NOT_FOUND, 405: METHOD, 413: TOO_LARGE, 415: UNSUPPORTED, 422: INVALID}


class Problem(Exception):
    """Raised anywhere below a route; becomes a problem document."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.param, self.retry_after_s = kind, detail, param, retry_after_s
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client left before its answer was ready."""


def response(problem: Problem, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    kind = problem.kind
    body: dict[str, Any] = {"type": kind.type, "title": kind.title, "status": kind.status, "detail": problem.detail}
    body |= {"param": problem.param} if problem.param is not None else {}
    extra = problem.headers | dict(headers or {})
    if problem.retry_after_s is not None:
        extra["Retry-After"] = str(max(1, math.ceil(problem.retry_after_s)))
    # Escaped to ASCII: a stranger's text may hold lone surrogates.
    return Response(json.dumps(body | members), kind.status, extra, MEDIA_TYPE)


def from_saccade(error: SaccadeError) -> Problem | None:
    """The caller's problem that the error stands for; None if the fault is the server's."""
    if isinstance(error, BackendUnavailable):
        kind = BACKEND_TIMEOUT if isinstance(error, BackendTimeout) else UNAVAILABLE
        return Problem(kind, str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, NotInstalled):
        return Problem(NOT_INSTALLED, str(error))
    if not isinstance(error, InvalidInput):
        return None
    kinds = {PictureTooLarge: TOO_LARGE, UnsupportedPicture: UNSUPPORTED, UnreadablePicture: INVALID}
    kinds[MetresUndetermined] = METRES
    return Problem(kinds.get(type(error), INVALID), str(error), param=error.param)


def internal(error: BaseException) -> Response:
    """500 that tells the caller an id and nothing else; the log has the rest under that id."""
    identity = uuid.uuid4()
    logger.error("internal error %s", identity, exc_info=error)
    problem = Problem(INTERNAL, "The server failed. Report the instance id to its operator.")
    return response(problem, instance=identity.urn)


def refusal(error: Exception) -> Response:
    """What the caller is told of any error."""
    problem = error if isinstance(error, Problem) else None
    if isinstance(error, SaccadeError):
        problem = from_saccade(error)
    return internal(error) if problem is None else response(problem)


def install(app: FastAPI) -> None:
    app.add_exception_handler(Problem, _refusal)
    app.add_exception_handler(SaccadeError, _refusal)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)


async def _refusal(_: Request, error: Exception) -> Response:
    return refusal(error)


async def _http(request: Request, raised: Exception) -> Response:
    error = cast(HTTPException, raised)
    kind = _BY_STATUS.get(error.status_code, REFUSED)
    details = {
        404: "There is nothing at this path. See / for what there is.",
        405: f"{request.method} is not possible here; use {(error.headers or {}).get('Allow', 'another method')}.",
    }
    return response(Problem(kind, details.get(error.status_code, str(error.detail))), error.headers)


async def _validation(_: Request, error: Exception) -> Response:
    first = cast(RequestValidationError, error).errors()[0]
    return response(Problem(INVALID, str(first["msg"]), param=str(first["loc"][-1])))


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


class LastResort:
    """ASGI layer: whatever nobody foresaw becomes a 500 problem, logged once; what a drain cuts off, a 503."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self.drain.leaving:
                raise
            if not started:
                problem = Problem(LEAVING, "The server is shutting down. Ask again.", retry_after_s=5)
                await response(problem)(scope, receive, send)
        except Exception as error:
            answer = internal(error)
            if not started:
                await answer(scope, receive, send)
