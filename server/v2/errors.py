"""Refusals under /v2 in the shape that the protocol's clients read: {"error": "..."}."""

from __future__ import annotations

import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import problems

ROOT = "/v2"


def is_v2(path: str) -> bool:
    return path == ROOT or path.startswith(ROOT + "/")


class ProtocolErrors:
    """The outermost ASGI layer: a problem document that leaves under /v2, whoever raised it, becomes {"error": ...}.

    Its status and other headers stay as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_v2(scope["path"]):
            return await self.app(scope, receive, send)
        await self.app(scope, receive, _Translated(send).send)


class _Translated:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_problem(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._translate(self._start)

    async def _translate(self, start: Message) -> None:
        body = json.dumps({"error": _told(self._body)}).encode() if self._body else b""
        headers = MutableHeaders(scope=start)
        headers["content-type"] = "application/json"
        if self._body:  # the answer to HEAD has none, and tells the length of what it would be
            headers["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _is_problem(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith(problems.MEDIA_TYPE)


def _told(body: bytes) -> str:
    """The detail, and the id of the log entry where there is one."""
    problem = json.loads(body)
    instance = problem.get("instance")
    return str(problem["detail"]) + (f" ({instance})" if instance else "")
