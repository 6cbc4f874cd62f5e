"""A kept request as one that has just come in, from a caller who never leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from fastapi import Request
from starlette.types import Message, Scope

from server.jobs.records import Asked


def request(asked: Asked, owner: str, weight: float) -> Request:
    """`owner`: the name of the key that it came with, empty without one; `weight`: that key's."""
    headers = {"content-type": asked.content_type, "accept": asked.accept, "content-length": str(len(asked.body))}
    scope: Scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": f"/{asked.task}",
        "root_path": "",
        "query_string": asked.query,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items() if value],
        "state": {"request_id": asked.request_id, "key": owner or None, "weight": weight},
    }
    messages: Iterator[Message] = iter([{"type": "http.request", "body": asked.body, "more_body": False}])

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")

    return Request(scope, receive)
