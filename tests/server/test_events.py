"""Server-sent events: what is told, in which order, and that watching changes no answer."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from PIL import Image

from saccade.backends import Backend
from saccade.errors import ModelError
from saccade.tasks import TASKS
from server.events import Events, spread, wanted
from tests.server.house import Failing, Gated, files, png, running, until
from tests.server.process import Process
from tests.server.test_refusals import assert_problem

STREAM = "text/event-stream"


@dataclass(frozen=True)
class Told:
    id: int
    name: str
    data: Any


def parse(text: str) -> list[Told]:
    """The events of a stream, by the rules of the standard that we use."""
    events = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert set(fields) == {"id", "event", "data"}
        events.append(Told(int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return events


def watch(backend: Backend, task: str, **options: Any) -> list[Told]:
    async def once() -> httpx.Response:
        async with running(backend) as house:
            return await house.ask(task, STREAM, **options)

    response = asyncio.run(once())
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    return parse(response.text)


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "timings_ms"}


@pytest.mark.parametrize("task", TASKS)
def test_the_whole_story(backend: Backend, task: str) -> None:
    events = watch(backend, task, steps=6, ensemble_size=2, previews=3)
    ids = [event.id for event in events]
    assert ids == sorted(set(ids))
    assert (events[0].name, events[-1].name) == ("accepted", "answer")
    assert events[0].data == {
        "request_id": events[0].data["request_id"],
        "task": task,
        "steps": 6,
        "ensemble_size": 2,
        "total_steps": 12,
    }
    progress = [event.data for event in events if event.name == "progress"]
    done = [each["done"] for each in progress]
    assert done == sorted(done)
    assert {each["total"] for each in progress} == {12}
    assert progress[-1]["phase"] in ("decode", "ensemble")
    assert progress[-1]["done"] == 12
    previews = [event.data for event in events if event.name == "preview"]
    assert [(preview["step"], preview["steps"]) for preview in previews] == [(2, 6), (4, 6), (6, 6)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("options", [{}, {"format": "png", "render": "color"}, {"format": "npy"}])
def test_the_answer_is_the_one_that_nobody_watches(backend: Backend, task: str, options: dict[str, str]) -> None:
    async def both() -> tuple[httpx.Response, httpx.Response]:
        async with running(backend) as house:
            asked = {"steps": 3, "ensemble_size": 2, "seed": 7, **options}
            return await house.ask(task, **asked), await house.ask(task, STREAM, **asked)

    plain, streamed = asyncio.run(both())
    answer = parse(streamed.text)[-1].data
    if not options:
        assert timeless(answer) == timeless(plain.json())
        return
    assert base64.b64decode(answer["data"]) == plain.content
    assert answer["media_type"] == plain.headers["content-type"]
    assert answer["headers"]["saccade-digest"] == plain.headers["saccade-digest"]


@pytest.mark.parametrize("task", TASKS)
def test_previews_are_small_pictures_of_the_whole(backend: Backend, task: str) -> None:
    async def ask() -> httpx.Response:
        async with running(backend) as house:
            large = {name: png(600, 300, seed) for seed, name in enumerate(files(task))}
            return await house.client.post(f"/{task}?steps=2", files=files(task, **large), headers={"Accept": STREAM})

    previews = [event.data for event in parse(asyncio.run(ask()).text) if event.name == "preview"]
    assert [preview["step"] for preview in previews] == [1, 2]
    for preview in previews:
        picture = Image.open(io.BytesIO(base64.b64decode(preview["image"])))
        assert picture.size == (preview["width"], preview["height"]) == (256, 128)
        assert (picture.format, preview["media_type"]) == ("PNG", "image/png")


def test_the_last_preview_is_the_answer_of_one_member(backend: Backend) -> None:
    events = watch(backend, "depth", steps=3, format="png", render="color")
    last = [event.data for event in events if event.name == "preview"][-1]
    assert (
        Image.open(io.BytesIO(base64.b64decode(last["image"]))).tobytes()
        == Image.open(io.BytesIO(base64.b64decode(events[-1].data["data"]))).tobytes()
    )


def test_no_previews_when_none_are_wanted(backend: Backend) -> None:
    assert "preview" not in {event.name for event in watch(backend, "depth", steps=5, previews=0)}


@pytest.mark.parametrize(
    ("previews", "steps", "shown"),
    [(0, 9, set()), (1, 9, {9}), (4, 10, {3, 5, 8, 10}), (20, 3, {1, 2, 3}), (4, 1, {1})],
)
def test_previews_are_spread_and_end_with_the_last(previews: int, steps: int, shown: set[int]) -> None:
    assert spread(previews, steps) == shown


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("text/event-stream, */*;q=0.1", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("*/*", False),
        ("text/*", False),
        ("", False),
    ],
)
def test_events_are_sent_to_those_who_name_them(accept: str, streams: bool) -> None:
    assert wanted(accept) is streams


def test_what_is_refused_at_the_door_is_a_plain_refusal(backend: Backend) -> None:
    async def ask() -> list[httpx.Response]:
        gate = Gated(backend)
        async with running(gate, queue_limit=8) as house:
            bad = [await house.ask("depth", STREAM, steps=0), await house.ask("depth", STREAM, previews=21)]
            bad.append(await house.client.post("/depth", files={"image": b"no picture"}, headers={"Accept": STREAM}))
            gate.shut()
            first = asyncio.create_task(house.ask("depth", steps=100))
            await until(lambda: gate.rows)
            bad.append(await house.ask("depth", STREAM, steps=100))
            gate.open()
            assert (await first).status_code == 200
            return bad

    steps, previews, picture, full = asyncio.run(ask())
    assert_problem(steps, 422, "invalid-input", "steps")
    assert_problem(previews, 422, "invalid-input", "previews")
    assert_problem(picture, 415, "unsupported-media-type", "image")
    assert_problem(full, 429, "overloaded")


def test_what_fails_later_is_the_last_event(backend: Backend) -> None:
    async def ask() -> list[httpx.Response]:
        failing, slow = Failing(backend), Gated(backend)
        failing.error = ModelError("NaN in secret place")
        async with running(slow, request_timeout_s=0.3) as house:
            slow.shut()
            late = await house.ask("depth", STREAM)
            slow.open()
        failing.error = None
        async with running(failing) as house:
            failing.error = ModelError("NaN in secret place")
            return [late, await house.ask("depth", STREAM)]

    late, fault = (parse(response.text) for response in asyncio.run(ask()))
    assert [(event.name, event.data["status"]) for event in (late[-1], fault[-1])] == [
        ("problem", 503),
        ("problem", 500),
    ]
    assert late[0].name == fault[0].name == "accepted"
    assert "secret" not in json.dumps(fault[-1].data)


def test_a_slow_reader_costs_no_memory() -> None:
    async def story() -> list[str]:
        events = Events()
        for done in range(10_000):
            events.publish("progress", json.dumps({"done": done}), merges="denoise")
        events.publish("preview", "{}")
        events.publish("progress", "{}", merges="denoise")
        return [event.data for event in events.since(0)]

    assert asyncio.run(story()) == ['{"done": 9999}', "{}", "{}"]


def test_a_reader_that_leaves_takes_the_work_along(server: Process) -> None:
    request = httpx.Request(
        "POST",
        server.url + "/depth?steps=100&ensemble_size=20&processing_resolution=512",
        files=files("depth"),
        headers={"Accept": STREAM},
    )
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"POST {request.url.raw_path.decode()} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        seen = b""
        while b"event: preview" not in seen and b"event: progress" not in seen:
            seen += connection.recv(65536)
    server.until(lambda: server.counters()["saccade_pending_requests"] == 0)
    counters = server.counters()
    assert counters["saccade_queue_rows"] == counters["saccade_pending_work"] == 0
    assert counters['saccade_cancelled_total{reason="disconnect",task="depth"}'] == 1
    assert "Traceback" not in server.log.read_text()


def test_events_come_while_the_answer_is_sought(server: Process) -> None:
    options = {"steps": "30", "ensemble_size": "4", "processing_resolution": "256"}
    with httpx.stream(
        "POST", server.url + "/depth", files=files("depth"), data=options, headers={"Accept": STREAM}, timeout=60
    ) as response:
        pieces = list(response.iter_raw())
    assert len(pieces) > 5, "not sent all at once"
    assert parse(b"".join(pieces).decode())[-1].name == "answer"
