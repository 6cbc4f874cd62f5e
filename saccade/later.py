"""Answers that are watched, and answers that come later: what both clients make of a server's events and jobs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np

from saccade.errors import BackendUnavailable, ServerError
from saccade.formats.pictures import open_picture
from saccade.pipeline import GLIMPSE_PX, Answer, Picture
from saccade.tasks import TaskName

Status = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Accepted:
    """The work has begun. `total_steps`: of all members."""

    task: TaskName
    steps: int
    ensemble_size: int
    total_steps: int
    request_id: str


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps are taken. `phase`: queue, encode, denoise, decode or ensemble."""

    done: int
    total: int
    phase: str


@dataclass(frozen=True)
class Preview:
    """What the first member takes for the answer after `step` of `steps`: a picture [H, W, 3] uint8, 256 px at most."""

    step: int
    steps: int
    picture: Picture


Update = Accepted | Progress | Preview | Answer
"""What a stream gives; the Answer is its last."""


@dataclass(frozen=True)
class Job:
    """A request that a server answers later. `problem`: of one that failed, its problem document."""

    id: str
    status: Status
    task: TaskName
    created: datetime
    started: datetime | None
    finished: datetime | None
    problem: dict[str, object] | None
    webhook: dict[str, object] | None

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Job:
        """Raises KeyError, TypeError or ValueError for what is no job."""
        times: dict[str, Any] = {
            name: None if document[name] is None else datetime.fromisoformat(document[name])
            for name in ("created", "started", "finished")
        }
        return cls(**{name: document[name] for name in ("id", "status", "task", "problem", "webhook")}, **times)


class OtherAnswer(ServerError):
    """A job's answer is there, and is none that the clients read: another format, or several answers. `data` is it."""

    def __init__(self, what: str, media_type: str, data: bytes, url: str) -> None:
        told = f"this job's answer is {what}: fetch it from {url}"
        super().__init__(200, {"title": "Another format", "detail": told})
        self.media_type, self.data = media_type, data


class Reader:
    """Turns the lines of a stream of events into updates; `answer` reads the JSON answer."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], Answer]) -> None:
        self._answer = answer
        self._name, self._data = "", ""

    def feed(self, line: str) -> Update | None:
        """The update that the line ends, if it ends one. Raises ServerError for a problem."""
        field, _, value = line.partition(": ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data = value
        if line or not self._name:
            return None
        name, self._name = self._name, ""
        return self._update(name, json.loads(self._data))

    def _update(self, name: str, data: dict[str, Any]) -> Update | None:
        match name:
            case "accepted":
                return Accepted(**data)
            case "progress":
                return Progress(**data)
            case "preview":
                picture = open_picture(base64.b64decode(data["image"]), max_pixels=GLIMPSE_PX**2, param="preview")
                return Preview(data["step"], data["steps"], np.asarray(picture.convert("RGB")))
            case "answer":
                return self._answer(data)
            case "problem":
                raise ServerError(int(data["status"]), data)
            case _:  # of a later version
                return None


def ended(url: str) -> BackendUnavailable:
    return BackendUnavailable(f"{url} ended the stream before the answer came")
