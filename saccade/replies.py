"""What a server's replies say, as what the clients give: answers, jobs, cards, or ServerError."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
from pydantic import ValidationError

from saccade.card import Card
from saccade.dial import Plan
from saccade.errors import ServerError
from saccade.formats import read_npy
from saccade.formats.pictures import open_picture
from saccade.later import Job, OtherAnswer, Reader, Update
from saccade.metres import Metres
from saccade.pipeline import Answer, Resolved
from saccade.sequence import Seen
from saccade.tasks import TaskName

MAX_ANSWER_PIXELS = 2**28


def read(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer. Raises ServerError for a refusal, and for what no Saccade server says."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise strange(response)
    if not response.is_success:
        raise ServerError(response.status_code, document)
    return document


def strange(response: httpx.Response) -> ServerError:
    said = response.reason_phrase if not response.is_success else "Unexpected answer"
    return ServerError(
        response.status_code,
        {"title": said, "detail": f"{response.request.url} does not answer as a Saccade server of this version does"},
    )


def answer(response: httpx.Response) -> Answer:
    document = read(response)
    try:
        return answer_of(document)
    except (KeyError, TypeError, ValueError) as error:
        raise strange(response) from error


def answer_of(document: Mapping[str, Any]) -> Answer:
    task: TaskName = document["task"]
    prediction = _array(document["prediction"])
    uncertainty, completed = document["uncertainty"], document["completed"]
    return Answer(
        task,
        prediction.astype(np.bool_) if task == "amodal" else prediction,
        None if uncertainty is None else _array(uncertainty),
        None if completed is None else _rgba(completed),
        Resolved(**document["options"]),
        document["model"],
        document["digest"],
        document["timings_ms"],
        Metres(**document["metres"]) if "metres" in document else None,
        Plan(**document["plan"]) if "plan" in document else None,
    )


def reader(response: httpx.Response) -> Reader:
    """Of a request's events, or of a job's, whose answer may be one that somebody asked for in another form."""
    job, events, _ = response.request.url.path.rpartition("/events")
    url = str(response.request.url.copy_with(path=f"{job}/result"))

    def read_event(document: Mapping[str, Any]) -> Answer:
        if events and (other := _other(document, url)) is not None:
            raise other
        return answer_of(document)

    return Reader(read_event)


def _other(document: Mapping[str, Any], url: str) -> OtherAnswer | None:
    if "media_type" in document:
        kind = document["media_type"]
        return OtherAnswer(kind, kind, base64.b64decode(document["data"], validate=True), url)
    if "answers" in document:
        what = "several (application/json)"
    elif document["prediction"]["encoding"] != "npy":
        what = "application/json with its maps as PNG"
    else:
        return None
    return OtherAnswer(what, "application/json", json.dumps(document).encode(), url)


def seen(response: httpx.Response) -> Seen:
    """Several answers; a server gives one picture its one."""
    document = read(response)
    try:
        answers = [answer_of(answer) for answer in document.get("answers", [document])]
        return Seen(answers, document.get("shots"), document.get("fps"))
    except (KeyError, TypeError, ValueError) as error:
        raise strange(response) from error


def update(reader: Reader, line: str, response: httpx.Response) -> Update | None:
    try:
        return reader.feed(line)
    except (KeyError, TypeError, ValueError) as error:
        raise strange(response) from error


def taken(response: httpx.Response) -> Job:
    if response.status_code == httpx.codes.OK:
        detail = "This server keeps no jobs, and answered at once. Ask it with depth, flow or amodal."
        raise ServerError(response.status_code, {"title": "No job", "detail": detail})
    return job(response)


def job(response: httpx.Response) -> Job:
    document = read(response)
    try:
        return Job.read(document)
    except (KeyError, TypeError, ValueError) as error:
        raise strange(response) from error


def jobs(response: httpx.Response) -> list[Job]:
    document = read(response)
    try:
        return [Job.read(job) for job in document["jobs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise strange(response) from error


def done(response: httpx.Response) -> None:
    if not response.is_success:
        read(response)


def cards(response: httpx.Response) -> list[Card]:
    document = read(response)
    try:
        return [Card.model_validate(card) for card in document["models"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise strange(response) from error


def _array(coded: Mapping[str, Any]) -> Any:
    return read_npy(base64.b64decode(coded["data"], validate=True))


def _rgba(coded: Mapping[str, Any]) -> Any:
    data = base64.b64decode(coded["data"], validate=True)
    return np.asarray(open_picture(data, max_pixels=MAX_ANSWER_PIXELS, param="completed").convert("RGBA"))
