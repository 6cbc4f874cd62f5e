"""POST /mask: clicks become an outline, and nothing that a stranger sends does harm."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from saccade.backends import Backend
from saccade.errors import InvalidInput
from saccade.formats import read_mask
from saccade.metrics import iou
from server.cutout import cut_out
from server.hints import Hints
from tests.server.house import PROBLEM, House, png, running, save

EXAMPLES = Path(__file__).parents[2] / "examples"
CUP = (EXAMPLES / "occluded.jpg").read_bytes()
SEEN = read_mask((EXAMPLES / "occluded_mask.png").read_bytes())
ON_CUP = [[180, 150, 1], [120, 230, 1], [250, 110, 1], [400, 330, 0]]
AROUND_CUP = [70, 15, 485, 392]


def ask(backend: Backend, *requests: dict[str, Any], **settings: Any) -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        async with running(backend, **settings) as house:
            return [await post(house, **request) for request in requests]

    return asyncio.run(all_of_them())


async def post(house: House, image: bytes = CUP, **hints: Any) -> httpx.Response:
    data = {name: value if isinstance(value, str) else json.dumps(value) for name, value in hints.items()}
    return await house.client.post("/mask", files={"image": ("picture", image)}, data=data)


def decoded(response: httpx.Response) -> np.ndarray:
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png"), response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def test_clicks_and_a_box_find_what_is_seen_of_the_cup(backend: Backend) -> None:
    boxed_hints = {"box": AROUND_CUP, "points": [[400, 330, 0]]}
    clicked, boxed, again = ask(backend, {"points": ON_CUP}, boxed_hints, {"points": ON_CUP})
    mask = decoded(clicked)
    assert mask.shape == SEEN.shape
    assert set(np.unique(mask)) == {0, 255}
    assert iou(mask > 0, SEEN) > 0.85
    assert iou(decoded(boxed) > 0, SEEN) > 0.85
    assert again.content == clicked.content


def test_the_mask_is_one_that_amodal_takes(backend: Backend) -> None:
    async def both() -> httpx.Response:
        async with running(backend) as house:
            mask = (await post(house, points=ON_CUP)).content
            return await house.client.post("/amodal", files={"image": ("a", CUP), "mask": ("b", mask)})

    assert asyncio.run(both()).status_code == 200


def test_json_asks_for_the_same(backend: Backend) -> None:
    async def both() -> tuple[bytes, bytes]:
        async with running(backend) as house:
            body = {"image": base64.b64encode(CUP).decode(), "points": ON_CUP}
            return (await house.client.post("/mask", json=body)).content, (await post(house, points=ON_CUP)).content

    from_json, from_form = asyncio.run(both())
    assert from_json == from_form


@pytest.mark.parametrize(
    ("hints", "param"),
    [
        ({}, "points"),
        ({"points": []}, "points"),
        ({"points": [[1, 1, 0]]}, "points"),
        ({"points": [[1, 1]]}, "points"),
        ({"points": [[1, 1, 2]]}, "points"),
        ({"points": [[1, 1, 0.5]]}, "points"),
        ({"points": [[-1, 1, 1]]}, "points"),
        ({"points": [[1, True, 1]]}, "points"),
        ({"points": [[600, 1, 1]]}, "points"),
        ({"points": "[[NaN, 1, 1]]"}, "points"),
        ({"points": "[[1e400, 1, 1]]"}, "points"),
        ({"points": "[" * 10_000}, "points"),
        ({"points": "1" * 5000}, "points"),
        ({"points": [[5, 5, 1]] * 33}, "points"),
        ({"points": {"x": 1}}, "points"),
        ({"box": [10, 10, 10, 40]}, "box"),
        ({"box": [40, 40, 10, 10]}, "box"),
        ({"box": [0, 0, 601, 400]}, "box"),
        ({"box": "here"}, "box"),
        ({"boxes": [0, 0, 10, 10]}, "boxes"),
    ],
)
def test_what_says_nothing_is_refused(backend: Backend, hints: dict[str, Any], param: str) -> None:
    (response,) = ask(backend, hints)
    assert (response.status_code, response.headers["content-type"]) == (422, PROBLEM), response.text
    assert response.json()["param"] == param


@pytest.mark.parametrize(("image", "status"), [(b"", 422), (b"hello", 415), (CUP[:4000], 422), (png()[:60], 422)])
def test_what_is_no_picture_is_refused(backend: Backend, image: bytes, status: int) -> None:
    (response,) = ask(backend, {"image": image, "points": [[1, 1, 1]]})
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM)


def test_limits_hold_here_too(backend: Backend) -> None:
    small, large = ask(backend, {"points": ON_CUP}, {"image": bytes(20_000)}, max_pixels=1000, max_upload_bytes=10_000)
    assert (small.status_code, large.status_code) == (413, 413)


def test_a_full_queue_says_when_to_come_again(backend: Backend) -> None:
    async def refused() -> httpx.Response:
        async with running(backend, queue_limit=10) as house:
            with house.service.admission.admit(10):
                return await post(house, points=ON_CUP)

    response = asyncio.run(refused())
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


def test_a_server_without_opencv_says_so(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def both() -> tuple[httpx.Response, Any]:
        async with running(backend) as house:
            return await post(house, points=ON_CUP), (await house.client.get("/")).json()

    assert asyncio.run(both())[1]["features"] == {"mask": True}
    monkeypatch.setitem(sys.modules, "cv2", None)
    response, index = asyncio.run(both())
    assert (response.status_code, response.headers["content-type"]) == (501, PROBLEM)
    assert "saccade[video]" in response.json()["detail"]
    assert index["features"] == {"mask": False}


def test_work_stops_when_nobody_waits() -> None:
    asked = 0

    def gone() -> bool:
        nonlocal asked
        asked += 1
        return True

    picture = np.asarray(Image.open(io.BytesIO(CUP)).convert("RGB"))
    cut_out(picture, Hints(points=((180, 150, True),)), gone)
    assert asked == 1


def test_a_plain_wall_has_nothing_that_stands_out(backend: Backend) -> None:
    wall = save(Image.new("RGB", (60, 40), (90, 90, 90)))
    (response,) = ask(backend, {"image": wall, "box": [10, 10, 30, 30]})
    assert response.status_code in (200, 422)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_picture_and_any_hints_give_a_mask_or_a_reason(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(2, 90)), data.draw(st.integers(2, 60))
    levels = data.draw(st.sampled_from([1, 2, 256]))
    picture = np.random.default_rng(width).integers(0, levels, (height, width, 3), np.uint8)
    place = st.tuples(st.integers(0, width - 1), st.integers(0, height - 1), st.booleans())
    points = data.draw(st.lists(place, max_size=6))
    box = data.draw(st.none() | st.tuples(_edges(width), _edges(height)))
    framed = None if box is None else (box[0][0], box[1][0], box[0][1], box[1][1])
    if framed is None and not any(inside for _, _, inside in points):
        points.append((0, 0, True))
    with suppress(InvalidInput):
        mask = cut_out(picture, Hints(tuple(points), framed))
        assert mask.shape == (height, width)
        assert mask.dtype == np.bool_


def _edges(length: int) -> st.SearchStrategy[Sequence[int]]:
    return st.lists(st.integers(0, length), min_size=2, max_size=2).map(sorted).filter(lambda e: e[1] - e[0] >= 2)
