"""What is kept of a job, and what its caller is told."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from python_multipart.multipart import parse_options_header

from saccade.tasks import TaskName

Status = Literal["queued", "running", "done", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "running")
ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Asked:
    """A request as it came: all that answering it takes."""

    task: TaskName
    query: bytes
    content_type: str
    accept: str
    body: bytes
    request_id: str

    def fingerprint(self) -> str:
        """The same for the same request, though a client that repeats it draws another multipart boundary."""
        kind, parameters = parse_options_header(self.content_type)
        boundary = parameters.pop(b"boundary", b"")
        body = self.body.replace(boundary, b"") if len(boundary) > 7 else self.body
        digest = hashlib.sha256()
        for part in (self.task.encode(), self.query, kind, self.accept.encode(), body):
            digest.update(len(part).to_bytes(8) + part)
        return digest.hexdigest()


@dataclass(frozen=True)
class Result:
    """The response that a caller who had waited would have got."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Record:
    """A job without its blobs. Times are seconds since 1970.

    `number` orders jobs by their coming; `owner` is the name of a key, empty without keys; `kept` whether the result is
    still there; `webhook_status` pending, delivered or failed.
    """

    number: int
    id: str
    owner: str
    task: TaskName
    status: Status
    created: float
    started: float | None
    finished: float | None
    attempts: int
    kept: bool
    problem: str | None
    fingerprint: str
    webhook: str | None
    webhook_status: str | None
    webhook_tries: int

    @property
    def unfinished(self) -> bool:
        return self.status in UNFINISHED

    @property
    def path(self) -> str:
        return f"/jobs/{self.id}"


def document(record: Record) -> dict[str, Any]:
    """The job as JSON. Members that do not apply yet are null."""
    told: dict[str, Any] = {
        "id": record.id,
        "status": record.status,
        "task": record.task,
        "created": _iso(record.created),
        "started": _iso(record.started),
        "finished": _iso(record.finished),
        "problem": None if record.problem is None else json.loads(record.problem),
        "webhook": None,
        "links": {
            "self": record.path,
            "events": f"{record.path}/events",
            "result": f"{record.path}/result",
            "cancel": record.path,
        },
    }
    if record.webhook is not None:
        told["webhook"] = {"status": record.webhook_status or "waiting", "tries": record.webhook_tries}
    return told


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
