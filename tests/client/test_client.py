"""`Client` and `AsyncClient` against a real server, and against scripted ones where a server has to misbehave."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from saccade import render
from saccade.client import AsyncClient, Client, Retries
from saccade.errors import BackendUnavailable, InvalidInput, ServerError
from saccade.local import Local
from saccade.pipeline import Answer
from tests.client.conftest import Scene

EMBEDDED = pytest.mark.parametrize("url", ["embedded"], indirect=True, scope="session")  # Triton rounds otherwise
TASKS = ("depth", "flow", "amodal")
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def pictures(scene: Scene) -> dict[str, tuple[Path, ...]]:
    return {"depth": (scene.image,), "flow": (scene.image, scene.next_image), "amodal": (scene.image, scene.mask)}


@pytest.fixture
def answer(local: Local, scene: Scene) -> Answer:
    return local.depth(scene.image)


def same(one: Answer, other: Answer) -> bool:
    """Everything but the time it took."""
    maps = [(a.prediction, a.uncertainty, a.completed) for a in (one, other)]
    equal = all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and np.array_equal(a, b)))
        for a, b in zip(*maps, strict=True)
    )
    return equal and (one.task, one.options, one.model, one.digest) == (
        other.task,
        other.options,
        other.model,
        other.digest,
    )


@EMBEDDED
@pytest.mark.parametrize("task", TASKS)
def test_server_and_process_give_the_same_answer_to_the_last_bit(
    task: str, url: str, local: Local, pictures: dict[str, tuple[Path, ...]]
) -> None:
    choices = {"steps": 3, "ensemble_size": 3, "seed": 5, "output_uncertainty": True}
    with Client(url) as client:
        theirs = getattr(client, task)(*pictures[task], **choices)
    ours = getattr(local, task)(*pictures[task], **choices)
    assert same(theirs, ours)
    assert theirs.uncertainty is not None
    assert set(theirs.timings_ms) == set(ours.timings_ms)


@pytest.mark.parametrize("task", TASKS)
def test_both_clients_give_the_same_answer(task: str, url: str, pictures: dict[str, tuple[Path, ...]]) -> None:
    async def ask() -> Answer:
        async with AsyncClient(url) as client:
            return await getattr(client, task)(*pictures[task], seed=2)

    with Client(url) as client:
        assert same(getattr(client, task)(*pictures[task], seed=2), asyncio.run(ask()))


def test_shapes_and_types(url: str, scene: Scene) -> None:
    with Client(url) as client:
        depth = client.depth(scene.image)
        flow = client.flow(scene.image, scene.next_image)
        amodal = client.amodal(scene.image, scene.mask)
    assert (depth.prediction.shape, depth.prediction.dtype) == ((48, 64), np.float32)
    assert (depth.prediction.min(), depth.prediction.max()) == (0, 1)
    assert (flow.prediction.shape, flow.prediction.dtype) == ((48, 64, 2), np.float32)
    assert (amodal.prediction.shape, amodal.prediction.dtype) == ((48, 64), np.bool_)
    assert amodal.prediction[10:30, 20:40].all()
    assert amodal.completed is not None
    assert (amodal.completed.shape, amodal.completed.dtype) == ((48, 64, 4), np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 4},
        {"ensemble_size": 2},
        {"reduction": "mean"},
        {"seed": 2**63 - 1},
        {"spacing": "leading"},
        {"processing_resolution": 32},
        {"match_input_resolution": False},
        {"output_uncertainty": True, "ensemble_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_arrives(options: dict[str, object], url: str, scene: Scene) -> None:
    with Client(url) as client:
        plain, turned = client.depth(scene.image), client.depth(scene.image, **options)  # type: ignore[arg-type]
    assert turned.options == replace(plain.options, **options)  # type: ignore[arg-type]


def test_none_is_the_models_default(url: str, scene: Scene) -> None:
    with Client(url) as client:
        assert same(client.depth(scene.image, steps=None, reduction=None), client.depth(scene.image))


@EMBEDDED
def test_a_picture_is_the_same_however_it_is_held(url: str, local: Local, scene: Scene) -> None:
    with Image.open(scene.image) as opened:
        array = np.array(opened)
        held = [str(scene.image), scene.image.read_bytes(), opened, array, array[::-1, ::-1][::-1, ::-1]]
        with Client(url) as client:
            expected = client.depth(scene.image)
            for image in held:
                assert same(client.depth(image), expected)
                assert same(local.depth(image), expected)


def test_masks_may_be_boolean_arrays(url: str, scene: Scene) -> None:
    with Image.open(scene.mask) as file:
        mask = np.array(file) > 0
    with Client(url) as client:
        assert same(client.amodal(scene.image, mask), client.amodal(scene.image, scene.mask))


@pytest.mark.parametrize("mode", ["CMYK", "F", "I;16", "LA", "P"])
def test_images_of_other_modes_are_sent_as_their_files_would_be(mode: str, local: Local, scene: Scene) -> None:
    with Image.open(scene.image) as opened:
        grey = np.array(opened.convert("L"))
    wide = {"F": grey.astype(np.float32), "I;16": grey.astype(np.uint16) * 257}
    image = Image.fromarray(wide[mode]) if mode in wide else Image.fromarray(grey).convert("RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode in ("CMYK", "F") else "PNG")
    assert same(local.depth(image), local.depth(file.getvalue()))


def test_a_photo_that_lies_on_its_side_is_turned(url: str, local: Local, scene: Scene, tmp_path: Path) -> None:
    with Image.open(scene.image) as upright:
        exif = upright.getexif()
        exif[0x0112] = 6
        upright.save(tmp_path / "side.jpg", exif=exif)
    with Client(url) as client, Image.open(tmp_path / "side.jpg") as image:
        answer = client.depth(tmp_path / "side.jpg")
        assert answer.prediction.shape == (64, 48)
        assert same(client.depth(image), answer)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("nowhere.png", "cannot read nowhere.png"),
        (np.zeros((4, 4)), "must be uint8"),
        (np.zeros((4, 4, 2), np.uint8), "must be uint8"),
        (np.zeros((0, 4), np.uint8), "must be uint8"),
        (Image.new("HSV", (4, 4)), "mode HSV"),
        (7, "not int"),
    ],
    ids=["missing", "float", "channels", "empty", "mode", "type"],
)
def test_what_is_no_picture_is_refused_before_anything_is_sent(image: object, said: str) -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(InvalidInput, match=said) as refused:
        client.flow(np.zeros((4, 4), np.uint8), image)  # type: ignore[arg-type]
    assert refused.value.param == "next_image"


def test_unknown_options_are_a_mistake_of_the_program() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(TypeError, match="step"):
        client.depth(np.zeros((4, 4), np.uint8), step=3)  # type: ignore[call-arg]


def test_a_refusal_carries_the_servers_problem(url: str, scene: Scene) -> None:
    with Client(url) as client:
        with pytest.raises(ServerError) as text:
            client.depth(b"this is no picture")
        with pytest.raises(ServerError) as steps:
            client.depth(scene.image, steps=0)
    assert (text.value.status, text.value.problem["param"]) == (415, "image")
    assert (steps.value.status, steps.value.problem["param"]) == (422, "steps")
    assert str(steps.value.problem["detail"]) in str(steps.value)


def test_models(url: str, local: Local) -> None:
    async def ask() -> object:
        async with AsyncClient(url + "/") as client:
            return await client.models()

    with Client(url) as client:
        assert client.models() == local.models() == asyncio.run(ask())


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(address) as client, pytest.raises(BackendUnavailable, match=address):
            client.models()


@pytest.mark.parametrize("url", ["photo.jpg", "ftp://example.org", "http://host:port"])
def test_what_is_no_url(url: str) -> None:
    with Client(url) as client, pytest.raises(InvalidInput, match="not a URL"):
        client.models()


def test_a_server_that_is_too_slow() -> None:
    def late(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("late", request=request)

    with (
        Client("http://saccade", timeout=3, transport=httpx.MockTransport(late)) as client,
        pytest.raises(BackendUnavailable, match="within 3 s"),
    ):
        client.models()


def test_headers_are_sent() -> None:
    def guarded(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.headers["authorization"] == "Bearer x" else 401, json={"models": []})

    with Client(
        "http://saccade", headers={"Authorization": "Bearer x"}, transport=httpx.MockTransport(guarded)
    ) as client:
        assert client.models() == []


@pytest.mark.parametrize("task", TASKS)
def test_several_pictures_are_refused_before_anything_is_sent(
    task: str, local: Local, pictures: dict[str, tuple[Path, ...]]
) -> None:
    script = Script(busy(500))
    several = [[pictures[task][0]] * 2, *pictures[task][1:]]
    told = pytest.raises(InvalidInput, match=r"image must be .* not list; several: use depths\(\) or flows\(\)")
    with Client("http://saccade", transport=httpx.MockTransport(script)) as client:
        with told:
            getattr(client, task)(*several)
        with told:
            client.submit(task, several[0])  # type: ignore[arg-type]
        with told:
            client.stream(task, several[0])  # type: ignore[arg-type]
    with told:
        getattr(local, task)(*several)

    async def ask(method: str, *given: object) -> None:
        async with AsyncClient("http://saccade", transport=httpx.MockTransport(script)) as client:
            await getattr(client, method)(*given)

    with told:
        asyncio.run(ask(task, *several))
    with told:
        asyncio.run(ask("submit", task, several[0]))
    assert script.asked == 0


class Script:
    """Gives the responses in their order, the last one for ever, and counts."""

    def __init__(self, *responses: httpx.Response) -> None:
        self.responses = list(responses)
        self.asked = 0

    def __call__(self, _: httpx.Request) -> httpx.Response:
        self.asked += 1
        given = self.responses[0] if len(self.responses) == 1 else self.responses.pop(0)
        return httpx.Response(given.status_code, headers=given.headers, content=given.content)


def busy(status: int, retry_after: str | None = None) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, json={"title": "Busy", "detail": "later"}, headers=headers)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the blocking client would have slept, in seconds."""
    slept: list[float] = []
    monkeypatch.setattr("saccade.client.time.sleep", slept.append)
    return slept


def test_busy_servers_are_asked_again_as_they_wish(waits: list[float], answer: Answer, scene: Scene) -> None:
    done = httpx.Response(200, json=render.document(answer, "npy"))
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    script = Script(busy(429, "7"), busy(503, date), busy(503), busy(429, "soon"), done)
    with Client("http://saccade", transport=httpx.MockTransport(script)) as client:
        assert same(client.depth(scene.image), answer)
    assert script.asked == 5
    assert waits[0] == 7
    assert 15 < waits[1] <= 20
    assert all(0 < wait < 10 for wait in waits[2:])


def test_the_async_client_asks_again_too(answer: Answer, scene: Scene) -> None:
    script = Script(busy(429, "0"), busy(503, "0"), httpx.Response(200, json=render.document(answer, "npy")))

    async def ask() -> Answer:
        async with AsyncClient("http://saccade", transport=httpx.MockTransport(script)) as client:
            return await client.depth(scene.image)

    assert same(asyncio.run(ask()), answer)
    assert script.asked == 3


def test_patience_ends(waits: list[float], scene: Scene) -> None:
    script = Script(busy(503, "1"))
    client = Client("http://saccade", transport=httpx.MockTransport(script), retries=Retries(most=2))
    with client, pytest.raises(ServerError) as refused:
        client.depth(scene.image)
    assert refused.value.status == 503
    assert (script.asked, waits) == (3, [1, 1])


def test_nobody_waits_for_an_hour(waits: list[float]) -> None:
    script = Script(busy(429, "3600"))
    with Client("http://saccade", transport=httpx.MockTransport(script)) as client, pytest.raises(ServerError):
        client.models()
    assert (script.asked, waits) == (1, [])


@pytest.mark.parametrize("status", [400, 422, 500])
def test_other_refusals_are_final(status: int, waits: list[float]) -> None:
    script = Script(busy(status, "0"))
    with Client("http://saccade", transport=httpx.MockTransport(script)) as client, pytest.raises(ServerError):
        client.models()
    assert (script.asked, waits) == (1, [])


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, html="<p>Welcome to my page</p>"),
        httpx.Response(200, json=["depth"]),
        httpx.Response(200, json={"task": "depth"}),
        httpx.Response(200, json={"task": "depth", "prediction": {"data": "!"}}),
        httpx.Response(404, html="<p>Not here</p>"),
        httpx.Response(302, headers={"location": "http://elsewhere"}),
    ],
    ids=["page", "list", "other", "base64", "missing", "redirect"],
)
def test_servers_of_other_kinds_are_told_apart(response: httpx.Response, scene: Scene) -> None:
    with Client("http://saccade", transport=httpx.MockTransport(Script(response))) as client:
        with pytest.raises(ServerError, match="does not answer as a Saccade server"):
            client.depth(scene.image)
        with pytest.raises(ServerError):
            client.models()
