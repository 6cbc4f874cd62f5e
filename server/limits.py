"""Bodies are counted as they arrive: no request, and not all of them together, may hold more than allowed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import problems
from server.guard import Guard
from server.problems import Problem

LINGER_S = 1.0
BODIES_AT_ONCE = 8
OVERHEAD_BYTES = 2**21


def body_limit(max_upload_bytes: int, max_clip_bytes: int = 0) -> int:
    """Two pictures, or all of a clip, in base64, and room for the rest of a form."""
    return 4 * -(-max(2 * max_upload_bytes, max_clip_bytes) // 3) + OVERHEAD_BYTES


class BodyLimit:
    """ASGI layer. `receive` raises Problem 413 past `limit` bytes (counted, whatever Content-Length says) and 429 when
    all requests together hold more than `BODIES_AT_ONCE` full bodies, and 503 when `guard` says that memory runs out.

    A response sent before the whole body came closes the connection, after reading on for a moment: closing at once
    would reset the connection, and a client that is still sending would never see the answer.
    """

    def __init__(self, app: ASGIApp, limit: int, guard: Guard) -> None:
        self.app, self.limit, self.guard = app, limit, guard
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = _Body(self, scope, receive, send)
        try:
            await self.app(scope, body.receive, body.send)
        finally:
            self.held -= body.received


class _Body:
    def __init__(self, owner: BodyLimit, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        self.declared = int(declared) if declared.isascii() and declared.isdigit() else 0
        self.whole = self.declared == 0 and "transfer-encoding" not in headers
        self.owner, self._receive, self._send = owner, receive, send
        self.received = 0

    async def receive(self) -> Message:
        if self.declared > self.owner.limit:
            raise self._too_large()
        message = await self._receive()
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            self.whole = not message.get("more_body", False)
        return message

    def _count(self, size: int) -> None:
        self.received += size
        self.owner.held += size
        if self.received > self.owner.limit:
            raise self._too_large()
        if self.owner.held > BODIES_AT_ONCE * self.owner.limit:
            raise Problem(problems.OVERLOADED, "Too many uploads at once. Try again shortly.", retry_after_s=2)
        if size:
            self.owner.guard.check(size)

    def _too_large(self) -> Problem:
        return Problem(
            problems.TOO_LARGE,
            f"The body is larger than {self.owner.limit} bytes, the most that the pictures may take. Send less.",
        )

    async def send(self, message: Message) -> None:
        if self.whole:
            return await self._send(message)
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
            return await self._send(message)
        if message.get("more_body", False):
            return await self._send(message)
        await self._send({**message, "more_body": True})
        await self._linger()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _linger(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (message := await self._receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
