"""Every file an answer can become, parsed back by readers that are not ours."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import OpenEXR
import pytest
from numpy.typing import NDArray
from PIL import Image

from saccade.backends import Backend
from tests.server.house import HEIGHT, PICTURES, WIDTH, files, png, running

TASKS = ("depth", "flow", "amodal")


def ask(backend: Backend, task: str, accept: str | None = None, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with running(backend) as house:
            return await house.ask(task, accept, **options)

    response = asyncio.run(once())
    assert response.status_code == 200, response.text
    return response


def truth(backend: Backend, task: str, **options: Any) -> NDArray[Any]:
    """The prediction by way of NPY, which loses nothing."""
    return np.load(io.BytesIO(ask(backend, task, format="npy", **options).content))


def cv(data: bytes) -> NDArray[Any]:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_npy_has_the_shape_and_range_of_each_task(backend: Backend) -> None:
    depth, flow, mask = (truth(backend, task) for task in TASKS)
    assert (depth.shape, depth.dtype) == ((HEIGHT, WIDTH), np.float32)
    assert 0 <= depth.min() < 0.05
    assert 0.95 < depth.max() <= 1
    assert (flow.shape, flow.dtype) == ((HEIGHT, WIDTH, 2), np.float32)
    assert (mask.shape, mask.dtype) == ((HEIGHT, WIDTH), np.bool_)
    visible = np.asarray(Image.open(io.BytesIO(PICTURES["amodal"]["mask"]))) > 0
    assert mask[visible].all()


def test_depth_png_is_16_bit_grey(backend: Backend) -> None:
    levels = cv(ask(backend, "depth", "image/png").content)
    assert (levels.shape, levels.dtype) == ((HEIGHT, WIDTH), np.uint16)
    np.testing.assert_allclose(levels / 65535, truth(backend, "depth"), atol=1e-5)


def test_flow_png_is_kittis(backend: Backend) -> None:
    bgr = cv(ask(backend, "flow", "image/png").content)
    assert (bgr.shape, bgr.dtype) == ((HEIGHT, WIDTH, 3), np.uint16)
    assert (bgr[..., 0] == 1).all()
    flow = (bgr[..., :0:-1].astype(np.float64) - 2**15) / 64
    np.testing.assert_allclose(flow, truth(backend, "flow"), atol=0.5 / 64 + 1e-6)


def test_amodal_png_is_a_mask_of_0_and_255(backend: Backend) -> None:
    levels = cv(ask(backend, "amodal", "image/png").content)
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(levels, truth(backend, "amodal") * np.uint8(255))


@pytest.mark.parametrize("task", TASKS)
def test_colour_pictures(backend: Backend, task: str) -> None:
    picture = Image.open(io.BytesIO(ask(backend, task, render="color").content))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (WIDTH, HEIGHT))
    assert len(picture.getcolors(WIDTH * HEIGHT) or []) > 2


def test_amodal_colours_keep_the_picture_outside_the_object(backend: Backend) -> None:
    shown = np.asarray(Image.open(io.BytesIO(ask(backend, "amodal", render="color").content)))
    outside = ~truth(backend, "amodal")
    image = np.asarray(Image.open(io.BytesIO(PICTURES["amodal"]["image"])))
    np.testing.assert_array_equal(shown[outside], image[outside])
    assert (shown[~outside] != image[~outside]).any()


def test_object_is_the_completed_object_on_nothing(backend: Backend) -> None:
    rgba = np.asarray(Image.open(io.BytesIO(ask(backend, "amodal", render="object").content)))
    visible = np.asarray(Image.open(io.BytesIO(PICTURES["amodal"]["mask"]))) > 0
    image = np.asarray(Image.open(io.BytesIO(PICTURES["amodal"]["image"])))
    np.testing.assert_array_equal(rgba[..., 3] > 0, truth(backend, "amodal"))
    np.testing.assert_array_equal(rgba[visible, :3], image[visible])


def test_flo(backend: Backend) -> None:
    data = ask(backend, "flow", "application/x-flo").content
    assert (data[:4], np.frombuffer(data, "<i4", 2, 4).tolist()) == (b"PIEH", [WIDTH, HEIGHT])
    flow = np.frombuffer(data, "<f4", offset=12).reshape(HEIGHT, WIDTH, 2)
    np.testing.assert_array_equal(flow, truth(backend, "flow"))


def test_pfm(backend: Backend) -> None:
    depth = cv(ask(backend, "depth", "image/x-portable-floatmap").content)
    np.testing.assert_array_equal(depth, truth(backend, "depth"))
    bgr = cv(ask(backend, "flow", format="pfm").content)
    np.testing.assert_array_equal(bgr[..., :0:-1], truth(backend, "flow"))


@pytest.mark.parametrize(("task", "channels"), [("depth", "Z"), ("flow", "UV"), ("amodal", "A")])
def test_exr(backend: Backend, tmp_path: Path, task: str, channels: str) -> None:
    path = tmp_path / "answer.exr"
    path.write_bytes(ask(backend, task, "image/x-exr", ensemble_size=2, output_uncertainty="true").content)
    with OpenEXR.File(str(path), separate_channels=True) as file:
        found = {name: channel.pixels for name, channel in file.channels().items()}
    expected = np.atleast_3d(truth(backend, task, ensemble_size=2))
    assert set(found) == {*channels, "uncertainty"}
    np.testing.assert_array_equal(np.stack([found[name] for name in channels], -1), expected.astype(np.float32))


@pytest.mark.parametrize("task", TASKS)
def test_npz_carries_the_uncertainty(backend: Backend, task: str) -> None:
    wanted = {"ensemble_size": 3, "output_uncertainty": "true"}
    found = np.load(io.BytesIO(ask(backend, task, "application/x-npz", **wanted).content))
    assert set(found) == {"prediction", "uncertainty"}
    assert found["uncertainty"].shape == (HEIGHT, WIDTH)
    assert found["uncertainty"].max() > 0
    np.testing.assert_array_equal(found["prediction"], truth(backend, task, ensemble_size=3))


@pytest.mark.parametrize("task", TASKS)
def test_json_maps_by_scale_and_offset(backend: Backend, task: str) -> None:
    wanted = {"ensemble_size": 2, "output_uncertainty": "1", "seed": 7}
    document = ask(backend, task, **wanted).json()
    raw = cv(base64.b64decode(document["prediction"]["data"]))
    values = raw * document["prediction"]["scale"] + document["prediction"]["offset"]
    exact = np.load(io.BytesIO(ask(backend, task, **wanted, format="npz").content))
    tolerance = 0.5 / 64 + 1e-6 if task == "flow" else 1e-5
    np.testing.assert_allclose(values[..., :0:-1] if task == "flow" else values, exact["prediction"], atol=tolerance)
    spread = document["uncertainty"]
    levels = cv(base64.b64decode(spread["data"]))
    np.testing.assert_allclose(levels * spread["scale"], exact["uncertainty"], atol=spread["scale"])
    assert (document["completed"] is not None) == (task == "amodal")


@pytest.mark.parametrize("task", TASKS)
def test_json_with_npy_maps_is_exact(backend: Backend, task: str) -> None:
    document = ask(backend, task, encoding="npy").json()
    found = np.load(io.BytesIO(base64.b64decode(document["prediction"]["data"])))
    np.testing.assert_array_equal(found, truth(backend, task))


def test_json_says_what_was_done(backend: Backend) -> None:
    response = ask(backend, "depth", steps=3, ensemble_size=2, reduction="mean", seed=5, spacing="leading")
    document = response.json()
    assert document["options"] == {
        "steps": 3,
        "ensemble_size": 2,
        "reduction": "mean",
        "seed": 5,
        "spacing": "leading",
        "processing_resolution": 64,
        "match_input_resolution": True,
        "output_uncertainty": False,
    }
    assert (document["task"], document["model"], document["digest"]) == ("depth", "toy", backend.card.digest)
    assert document["shape"] == [HEIGHT, WIDTH]
    timings = document["timings_ms"]
    assert set(timings) == {"queue", "encode", "denoise", "decode", "ensemble", "total"}
    assert timings["total"] >= timings["encode"] + timings["denoise"] + timings["decode"] > 0


def test_headers_say_what_was_done(backend: Backend) -> None:
    headers = ask(backend, "flow", "application/x-flo", steps=2, ensemble_size=3, seed=9).headers
    named = {name: value for name, value in headers.items() if name.startswith("saccade-")}
    assert named == {
        "saccade-model": "toy",
        "saccade-digest": backend.card.digest,
        "saccade-steps": "2",
        "saccade-ensemble-size": "3",
        "saccade-reduction": "mean",
        "saccade-seed": "9",
        "saccade-complete": "true",
        "saccade-units": "pixels of the input, u right, v down",
    }
    phases = [entry.split(";dur=")[0] for entry in headers["server-timing"].split(", ")]
    assert phases == ["queue", "encode", "denoise", "decode", "ensemble", "total"]


def test_answer_can_keep_the_processed_size(backend: Backend) -> None:
    document = ask(backend, "depth", match_input_resolution="false", processing_resolution=30).json()
    assert document["shape"] == [20, 30]


def test_json_body_and_form_fields_answer_as_the_query_does(backend: Backend) -> None:
    options = {"steps": 3, "timestep_spacing": "linspace", "format": "png"}
    body = {"image": base64.b64encode(png()).decode(), **options}

    async def three_ways() -> list[bytes]:
        async with running(backend) as house:
            answers = [
                await house.client.post("/depth", json=body),
                await house.client.post("/depth", files=files("depth"), data=options),
                await house.ask("depth", "image/png", steps=3, spacing="linspace"),
                await house.client.post("/depth?steps=3", files=files("depth"), data=options),
            ]
            return [answer.raise_for_status().content for answer in answers]

    assert len(set(asyncio.run(three_ways()))) == 1


def test_wrapped_base64_and_wrong_part_types_are_read(backend: Backend) -> None:
    async def both() -> list[bytes]:
        async with running(backend) as house:
            wrapped = base64.encodebytes(png()).decode()
            lying = {"image": ("image.txt", png(), "text/plain")}
            answers = [
                await house.client.post("/depth?format=npy", json={"image": wrapped}),
                await house.client.post("/depth?format=npy", files=lying),
            ]
            return [answer.raise_for_status().content for answer in answers]

    one, other = asyncio.run(both())
    assert one == other


@pytest.mark.parametrize(
    ("task", "accept", "options", "expected"),
    [
        ("depth", None, {}, "application/json"),
        ("depth", "", {}, "application/json"),
        ("depth", "*/*", {}, "application/json"),
        ("depth", "*/*", {"render": "color"}, "image/png"),
        ("depth", "image/*", {}, "image/png"),
        ("depth", "image/png;q=0.5, application/x-npy;q=0.9", {}, "application/x-npy"),
        ("depth", "application/json;q=0, */*;q=0.1", {}, "image/png"),
        ("depth", "text/html, image/png;q=0.2", {}, "image/png"),
        ("depth", "image/png;q=nonsense, application/x-npy", {}, "application/x-npy"),
        ("depth", "image/png", {"format": "npy"}, "application/x-npy"),
        ("flow", "image/*;q=0.1, application/x-flo", {}, "application/x-flo"),
        ("flow", "application/x-flo, application/x-npz", {"output_uncertainty": "true", "ensemble_size": 2},
         "application/x-npz"),
        ("amodal", "image/*", {"render": "object"}, "image/png"),
    ],
)  # fmt: skip
def test_accept(backend: Backend, task: str, accept: str | None, options: dict[str, Any], expected: str) -> None:
    response = ask(backend, task, accept, **options)
    assert response.headers["content-type"] == expected
    assert response.headers["vary"] == "Accept"


def test_same_seed_same_bytes_alone_and_in_company(backend: Backend) -> None:
    wanted = {"format": "png", "seed": 3, "steps": 3, "ensemble_size": 3}

    async def alone_then_together() -> tuple[list[bytes], bytes]:
        async with running(backend) as house:
            alone = await house.ask("depth", **wanted)
            company = [house.ask(task, seed=seed, steps=4) for seed in range(4) for task in TASKS]
            same = [house.ask("depth", **wanted) for _ in range(4)]
            answers = await asyncio.gather(*same, *company)
            other = await house.ask("depth", **(wanted | {"seed": 4}))
            return [answer.content for answer in [alone, *answers[:4]]], other.content

    same, other = asyncio.run(alone_then_together())
    assert set(same) == {same[0]}
    assert other != same[0]
