"""Several pictures, videos and known depths in one request: the answers, the files they come in, and the refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import threading
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from saccade.backends import Backend
from saccade.formats import read_npy, read_png
from saccade.formats.video import Clip, read_video, write_mp4
from server import several
from tests.formats.test_video import frames, recorded
from tests.server.house import HEIGHT, PROBLEM, WIDTH, Gated, House, mask, png, running, until

IMAGES = [png(seed=seed) for seed in range(3)]
KNOWN = [[5, 5, 1.0], [50, 30, 3.0], [30, 20, 2.0]]
Parts = list[tuple[str, tuple[str | None, bytes]]]


def parts(name: str, files: list[bytes]) -> Parts:
    return [(name, (f"{index}.png", data)) for index, data in enumerate(files)]


def inside(backend: Backend, ask: Callable[[House], Awaitable[Any]], **settings: Any) -> Any:
    async def once() -> Any:
        async with running(backend, **settings) as house:
            return await ask(house)

    return asyncio.run(once())


def post(backend: Backend, path: str, files: Parts, accept: str = "*/*", **options: Any) -> httpx.Response:
    return inside(
        backend, lambda house: house.client.post(path, files=files, params=options, headers={"Accept": accept})
    )


def maps(document: dict[str, Any]) -> list[np.ndarray]:
    return [read_npy(base64.b64decode(answer["prediction"]["data"])) for answer in document["answers"]]


def alone(backend: Backend, path: str, files: Parts, **options: Any) -> np.ndarray:
    return read_npy(post(backend, path, files, format="npy", **options).content)


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return recorded(tmp_path_factory.mktemp("clip"), 4)


def test_each_of_several_pictures_gets_the_answer_it_gets_alone(backend: Backend) -> None:
    response = post(backend, "/depth", parts("image", IMAGES), encoding="npy", seed=3)
    assert response.status_code == 200, response.text
    assert response.headers["Saccade-Seed"] == "3"
    document = response.json()
    assert (document["shots"], document["fps"]) == (None, None)
    for image, found in zip(IMAGES, maps(document), strict=True):
        np.testing.assert_array_equal(found, alone(backend, "/depth", parts("image", [image]), seed=3))


def test_frames_of_flow_give_the_motion_between_neighbours(backend: Backend) -> None:
    found = maps(post(backend, "/flow", parts("image", IMAGES), encoding="npy").json())
    assert len(found) == 2
    pair = [*parts("image", IMAGES[1:2]), *parts("next_image", IMAGES[2:])]
    np.testing.assert_array_equal(found[1], alone(backend, "/flow", pair))


def test_amodal_takes_as_many_masks_as_pictures(backend: Backend) -> None:
    files = [*parts("image", IMAGES[:2]), *parts("mask", [mask(), mask()])]
    response = post(backend, "/amodal", files, render="color")
    assert response.headers["Content-Type"] == "application/zip"
    pair = [*parts("image", IMAGES[1:2]), *parts("mask", [mask()])]
    assert unzipped(response.content)["0001.png"] == post(backend, "/amodal", pair, render="color").content


@pytest.mark.parametrize("listed", [("mask",), ("image",), ("mask", "image")])
def test_one_picture_and_a_list_of_one_go_together(backend: Backend, listed: tuple[str, ...]) -> None:
    data = {name: base64.b64encode(file).decode() for name, file in (("mask", mask()), ("image", IMAGES[0]))}
    body = {name: [value] if name in listed else value for name, value in data.items()}
    answer = inside(backend, lambda house: house.client.post("/amodal", json=body))
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["answers"]) == 1
    refused = inside(backend, lambda house: house.client.post("/amodal", json=data | {"mask": [data["mask"]] * 2}))
    assert (refused.status_code, refused.json()["param"]) == (422, "mask")


def test_json_takes_lists(backend: Backend) -> None:
    body = {"image": [base64.b64encode(data).decode() for data in IMAGES], "encoding": "npy", "steps": 1}
    listed = inside(backend, lambda house: house.client.post("/depth", json=body))
    sent = post(backend, "/depth", parts("image", IMAGES), encoding="npy", steps=1)
    np.testing.assert_array_equal(maps(listed.json()), maps(sent.json()))
    body["image"] = body["image"][:1]
    assert len(inside(backend, lambda house: house.client.post("/depth", json=body)).json()["answers"]) == 1


@pytest.mark.parametrize("wanted", [{"format": "png"}, {"accept": "application/zip"}])
def test_files_come_in_a_zip_with_an_index(backend: Backend, wanted: dict[str, str]) -> None:
    response = post(backend, "/depth", parts("image", IMAGES), **wanted)
    assert response.headers["Content-Type"] == "application/zip"
    files = unzipped(response.content)
    assert list(files) == ["0000.png", "0001.png", "0002.png", "index.json"]
    assert files["0001.png"] == post(backend, "/depth", parts("image", IMAGES[1:2]), format="png").content
    index = json.loads(files["index.json"])
    assert index["files"] == ["0000.png", "0001.png", "0002.png"]
    assert index["options"]["steps"] == 2
    assert response.content == post(backend, "/depth", parts("image", IMAGES), **wanted).content


@pytest.mark.parametrize("task", ["depth", "flow"])
def test_an_mp4_shows_the_answers_in_colours(backend: Backend, clip: bytes, task: str) -> None:
    for wanted in ({"format": "mp4"}, {"accept": "video/mp4"}):
        response = post(backend, f"/{task}", parts("video", [clip]), **wanted)
        assert response.headers["Content-Type"] == "video/mp4"
        found = read_video(response.content)
        assert (found.frames.shape, found.fps) == ((4 - (task == "flow"), 48, 64, 3), 10)


def test_a_video_is_asked_about_frame_by_frame(backend: Backend, clip: bytes) -> None:
    document = post(backend, "/flow", parts("video", [clip]), encoding="npy", frames_stride=2).json()
    assert (len(document["answers"]), document["fps"]) == (1, 5)
    stills = parts("image", [_png(frame) for frame in frames(4)[::2]])
    np.testing.assert_array_equal(maps(document), maps(post(backend, "/flow", stills, encoding="npy").json()))
    assert len(post(backend, "/depth", parts("video", [clip]), frames_limit=2).json()["answers"]) == 2


def test_a_video_of_depth_has_one_scale_unless_told_otherwise(backend: Backend, clip: bytes) -> None:
    steady = post(backend, "/depth", parts("video", [clip]), encoding="npy").json()
    assert steady["shots"][0] == 0
    for first, end in zip(steady["shots"], [*steady["shots"][1:], 4], strict=True):
        shot = np.stack(maps(steady)[first:end])
        assert (shot.min(), shot.max()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    free = post(backend, "/depth", parts("video", [clip]), encoding="npy", steady="false").json()
    assert free["shots"] is None
    still = parts("image", [_png(frames(4)[2])])
    np.testing.assert_array_equal(maps(free)[2], alone(backend, "/depth", still))


def test_known_depths_give_metres(backend: Backend) -> None:
    one = parts("image", IMAGES[:1])
    relative = alone(backend, "/depth", one)
    known = [[x, y, 2 + 5 * float(relative[y, x])] for x, y in [(3, 4), (50, 9), (30, 33), (11, 25), (44, 20)]]
    known[0][2] = 300.0
    document = post(backend, "/depth", one, known_depths=json.dumps(known), encoding="npy").json()
    assert document["units"] == "metres"
    facts = document["metres"]
    assert (facts["inliers"], facts["points"]) == (4, 5)
    assert (facts["scale"], facts["shift"]) == (pytest.approx(5, rel=1e-3), pytest.approx(2, rel=1e-3))
    np.testing.assert_allclose(read_npy(base64.b64decode(document["prediction"]["data"])), 2 + 5 * relative, rtol=1e-3)
    response = post(backend, "/depth", one, known_depths=json.dumps(known), format="png")
    assert response.headers["Saccade-Units"] == "metres"
    np.testing.assert_allclose(read_png(response.content) / 1000, 2 + 5 * relative, atol=2e-3)
    levels = post(backend, "/depth", one, known_depths=json.dumps([[x, y, 50 * m] for x, y, m in known])).json()
    raw = read_png(base64.b64decode(levels["prediction"]["data"]))
    np.testing.assert_allclose(raw * levels["prediction"]["scale"], 50 * (2 + 5 * relative), rtol=2e-3)


def test_known_depths_come_as_a_field_a_file_and_json(backend: Backend) -> None:
    relative = alone(backend, "/depth", parts("image", IMAGES[:1]))
    ys, xs = np.divmod(np.arange(0, HEIGHT * WIDTH, 3), WIDTH)
    known = [[int(x), int(y), round(1 + float(relative[y, x]), 6)] for x, y in zip(xs, ys, strict=True)] * 6
    text = json.dumps(known)
    assert len(text) > 2**16
    one = parts("image", IMAGES[:1])
    body = {"image": base64.b64encode(IMAGES[0]).decode(), "known_depths": known}

    async def ask(house: House) -> list[httpx.Response]:
        field = await house.client.post("/depth", files=one, data={"known_depths": text})
        file = await house.client.post("/depth", files=[*one, ("known_depths", ("points.json", text.encode()))])
        return [field, file, await house.client.post("/depth", json=body)]

    for response in inside(backend, ask):
        assert response.status_code == 200, response.text
        assert response.json()["metres"]["points"] == len(known)


def test_the_first_frame_gives_metres_to_a_steady_clip(backend: Backend) -> None:
    still = [_png(np.full((HEIGHT, WIDTH, 3), level, np.uint8)) for level in (100, 101, 102)]
    relative = maps(post(backend, "/depth", parts("image", still), encoding="npy", steady="true").json())[0]
    known = json.dumps([[x, y, 1 + 4 * float(relative[y, x])] for x, y in [(3, 4), (50, 9), (30, 33)]])
    document = post(backend, "/depth", parts("image", still), encoding="npy", steady="true", known_depths=known).json()
    np.testing.assert_allclose(maps(document)[0], 1 + 4 * relative, rtol=2e-3)
    assert len({json.dumps(answer["metres"]) for answer in document["answers"]}) == 1


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ([[5, 5, 1.0]], "1 given"),
        ([[5, 5, 1.0], [WIDTH, 5, 2.0]], "outside the picture"),
        ([[5, 5, 1.0], [5, 5, 3.0]], "one predicted depth"),
        ([[5, 5, 1.0], [50, 30, -3.0]], "over 0"),
    ],
)
def test_points_that_determine_nothing(backend: Backend, known: list[list[float]], reason: str) -> None:
    response = post(backend, "/depth", parts("image", IMAGES[:1]), known_depths=json.dumps(known))
    assert (response.status_code, response.headers["Content-Type"]) == (422, PROBLEM)
    problem = response.json()
    assert (problem["type"], problem["param"]) == ("urn:saccade:problem:metres-undetermined", "known_depths")
    assert reason in problem["detail"]


NAN = "[[1, 2, NaN], [3, 4, 5]]"
REFUSED: dict[str, tuple[str, Parts, dict[str, Any], int, str]] = {
    "a list of no points": ("/depth", parts("image", IMAGES[:1]), {"known_depths": "[[1, 2]]"}, 422, "known_depths"),
    "points that are no numbers": ("/depth", parts("image", IMAGES[:1]), {"known_depths": NAN}, 422, "known_depths"),
    "points of several": ("/depth", parts("image", IMAGES), {"known_depths": json.dumps(KNOWN)}, 422, "known_depths"),
    "points of flow": ("/flow", parts("image", IMAGES), {"known_depths": json.dumps(KNOWN)}, 422, "known_depths"),
    "steady alone": ("/depth", parts("image", IMAGES[:1]), {"steady": "true"}, 422, "steady"),
    "steady in two sizes": ("/depth", parts("image", [png(), png(WIDTH, 50)]), {"steady": "true"}, 422, "image"),
    "flow in two sizes": ("/flow", parts("image", [png(), png(WIDTH, 50)]), {}, 422, "next_image"),
    "frames of pictures": ("/depth", parts("image", IMAGES), {"frames_limit": 2}, 422, "frames_limit"),
    "an mp4 of one": ("/depth", parts("image", IMAGES[:1]), {"format": "mp4"}, 422, "format"),
    "an mp4 with uncertainty": ("/depth", parts("image", IMAGES),
                                {"format": "mp4", "output_uncertainty": "true", "ensemble_size": 2}, 422,
                                "output_uncertainty"),
    "frames and a next one": ("/flow", [*parts("image", IMAGES), *parts("next_image", IMAGES[:1])], {}, 422,
                              "next_image"),
    "fewer masks": ("/amodal", [*parts("image", IMAGES), *parts("mask", [mask(), mask()])], {}, 422, "mask"),
    "a video of amodal": ("/amodal", [*parts("image", IMAGES[:1]), *parts("video", [b"x"])], {}, 422, "video"),
    "a video and a picture": ("/depth", [*parts("image", IMAGES[:1]), *parts("video", [b"x"])], {}, 422, "video"),
    "no video": ("/depth", parts("video", [IMAGES[0]]), {}, 415, "video"),
    "a broken video": ("/depth", parts("video", [b"\0\0\0\x18ftypisom" + bytes(500)]), {}, 422, "video"),
    "too many": ("/depth", parts("image", IMAGES * 3), {}, 413, "image"),
    "one bad among them": ("/depth", parts("image", [*IMAGES, b"\x89PNG\r\n\x1a\nno"]), {}, 422, "image"),
    "a picture too large for many": ("/depth", parts("image", [png(400, 300), png(400, 300)]), {}, 413, "image"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_do(backend: Backend, name: str) -> None:
    path, files, options, status, param = REFUSED[name]

    async def ask(house: House) -> httpx.Response:
        return await house.client.post(path, files=files, params=options)

    response = inside(backend, ask, max_frames=8, max_clip_pixels=200_000)
    assert (response.status_code, response.headers["Content-Type"]) == (status, PROBLEM), response.text
    assert response.json()["param"] == param


def test_nothing_but_what_several_come_as_is_acceptable(backend: Backend) -> None:
    response = post(backend, "/depth", parts("image", IMAGES), accept="image/png")
    assert response.status_code == 406
    assert "application/zip" in response.json()["detail"]


def test_a_long_video_wants_a_word_on_which_frames(backend: Backend, tmp_path: Path) -> None:
    data = write_mp4(frames(6), 10)

    async def ask(house: House) -> list[httpx.Response]:
        asked = ({}, {"frames_limit": 4}, {"frames_stride": 2})
        return [await house.client.post("/depth", files=parts("video", [data]), params=options) for options in asked]

    refused, limited, strided = inside(backend, ask, max_frames=4)
    assert (refused.status_code, refused.json()["param"]) == (422, "video")
    assert "frames_stride" in refused.json()["detail"]
    assert (len(limited.json()["answers"]), len(strided.json()["answers"])) == (4, 3)


def test_all_frames_count_at_the_door(backend: Backend, clip: bytes) -> None:
    async def ask(house: House) -> tuple[float, float]:
        gated.shut()
        one = asyncio.create_task(house.client.post("/depth", files=parts("image", IMAGES[:1])))
        await until(lambda: gated.rows)
        single = house.service.admission.pending
        one.cancel()
        await until(lambda: not house.service.admission.requests)
        gated.rows = 0
        many = asyncio.create_task(house.client.post("/depth", files=parts("image", [IMAGES[0]] * 3)))
        await until(lambda: gated.rows)
        triple = house.service.admission.pending
        many.cancel()
        await until(lambda: not house.service.admission.requests)
        return single, triple

    gated = Gated(backend)
    single, triple = inside(gated, ask)
    assert triple == pytest.approx(3 * single)


def test_who_leaves_cancels_every_frame(backend: Backend, clip: bytes) -> None:
    async def ask(house: House) -> None:
        gated.shut()
        asking = asyncio.create_task(house.client.post("/depth", files=parts("video", [clip])))
        await until(lambda: gated.rows)
        asking.cancel()
        await until(lambda: not house.service.admission.requests)
        gated.open()
        await until(lambda: not house.model.stepping.waiting and not house.model.stepping.running)

    gated = Gated(backend)
    inside(gated, ask)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Videos are read only once it is set."""
    go = threading.Event()

    def read(*_: object, **__: object) -> Clip:
        assert go.wait(20)
        return Clip(np.stack(frames(2)), 10)

    monkeypatch.setattr(several, "read_video", read)
    yield go
    go.set()


def test_pictures_never_wait_behind_videos(backend: Backend, slow: threading.Event) -> None:
    async def ask(house: House) -> None:
        def sending() -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(house.client.post("/depth", files=parts("video", [b"x"])))

        videos = [sending() for _ in range(10)]
        await until(lambda: house.service.clips.full)
        refused = await sending()
        assert (refused.status_code, refused.json()["type"]) == (429, "urn:saccade:problem:overloaded")
        assert int(refused.headers["Retry-After"]) >= 1
        assert house.service.guard.held == 2 * 3 * house.service.settings.max_clip_pixels
        assert (await house.ask("depth")).status_code == 200
        assert (await house.counters())['saccade_rejected_total{task="depth"}'] == 1
        slow.set()
        assert [answer.status_code for answer in await asyncio.gather(*videos)] == [200] * 10
        assert house.service.guard.held == 0

    inside(backend, ask, threads=1)


def test_a_decoder_keeps_its_place_when_its_caller_leaves(backend: Backend, slow: threading.Event) -> None:
    async def ask(house: House) -> None:
        asking = asyncio.create_task(house.client.post("/depth", files=parts("video", [b"x"])))
        await until(lambda: house.service.guard.held)
        asking.cancel()
        await asyncio.wait([asking])
        assert house.service.guard.held
        slow.set()
        await until(lambda: not house.service.guard.held)

    inside(backend, ask)


def test_a_video_sent_as_a_picture_is_told_where_it_belongs(backend: Backend, clip: bytes) -> None:
    refused = post(backend, "/depth", parts("image", [clip]))
    assert refused.status_code == 415
    assert "send it as `video`" in refused.json()["detail"]
    pair = [*parts("image", [clip]), *parts("mask", [mask()])]
    assert "video" not in post(backend, "/amodal", pair).json()["detail"]


def _png(frame: np.ndarray) -> bytes:
    from saccade.formats import write_png

    return write_png(np.ascontiguousarray(frame))


def test_without_opencv_videos_are_refused_and_pictures_answered(
    backend: Backend, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    for files, options in ((parts("video", [clip]), {}), (parts("image", IMAGES), {"format": "mp4"})):
        response = post(backend, "/depth", files, **options)
        assert (response.status_code, response.headers["Content-Type"]) == (501, PROBLEM)
        assert response.json()["type"] == "urn:saccade:problem:not-installed"
        assert "saccade[video]" in response.json()["detail"]
    assert post(backend, "/depth", parts("image", IMAGES)).status_code == 200


def test_a_job_and_a_stream_of_a_video_end_as_who_waits_is_answered(
    backend: Backend, clip: bytes, tmp_path: Path
) -> None:
    files, options = parts("video", [clip]), {"format": "npz", "steps": 1}

    async def ask(house: House) -> tuple[httpx.Response, httpx.Response, str, httpx.Response]:
        plain = await house.client.post("/depth", files=files, params=options)
        taken = await house.client.post("/depth", files=files, params=options, headers={"Prefer": "respond-async"})
        events = await house.client.get(f"{taken.headers['location']}/events")
        result = await house.client.get(f"{taken.headers['location']}/result")
        broken = await house.client.post(
            "/depth", files=parts("video", [clip[:200]]), headers={"Prefer": "respond-async"}
        )
        return plain, result, events.text, broken

    plain, result, told, broken = inside(backend, ask, jobs_file=tmp_path / "jobs.sqlite")
    assert (result.status_code, result.headers["Content-Type"]) == (200, "application/zip")
    assert result.content == plain.content
    accepted, *_, answer = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: ")]
    assert accepted["total_steps"] == 4
    assert base64.b64decode(answer["data"]) == plain.content
    assert broken.status_code == 422
