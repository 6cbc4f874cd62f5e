"""Every kind of refusal: its status, its problem document, and a server that stays up."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from saccade.backends import Backend
from saccade.card import Card
from saccade.errors import BackendUnavailable, ModelError
from tests.server.house import PROBLEM, Failing, House, Wrapped, files, mask, png, running, save

URN = "urn:saccade:problem:"
B64 = base64.b64encode(png()).decode()


def assert_problem(response: httpx.Response, status: int, slug: str, param: str | None = None) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM), response.text
    document: dict[str, Any] = response.json()
    assert document["type"] == URN + slug
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document.get("param") == param, document
    return document


def send(backend: Backend, method: str, path: str, **request: Any) -> httpx.Response:
    """One request; afterwards the server must still answer a good one."""

    async def once() -> httpx.Response:
        async with running(backend, max_upload_bytes=200_000, max_clip_bytes=200_000, max_pixels=1_000_000) as house:
            response = await house.client.request(method, path, **request)
            assert (await house.ask("depth")).status_code == 200
            assert house.service.admission.requests == 0
            return response

    return asyncio.run(once())


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "status", "slug"),
    [
        (bomb(60_000, 60_000), 413, "too-large"),
        (png()[:200], 422, "invalid-input"),
        (png()[:8], 422, "invalid-input"),
        (b"", 422, "invalid-input"),
        (b"just some text", 415, "unsupported-media-type"),
        (b"%PDF-1.7 not a picture", 415, "unsupported-media-type"),
        (bytes(200_001), 413, "too-large"),
        (png(1, 1), 422, "invalid-input"),
        (png(600, 2), 422, "invalid-input"),
    ],
    ids=["bomb", "truncated", "magic-only", "empty", "text", "pdf", "heavy", "one-pixel", "ribbon"],
)
def test_bad_pictures(backend: Backend, data: bytes, status: int, slug: str) -> None:
    assert_problem(send(backend, "POST", "/depth", files=files("depth", image=data)), status, slug, "image")
    in_json = {"image": base64.b64encode(data).decode()}
    assert_problem(send(backend, "POST", "/depth", json=in_json), status, slug, "image")


def test_mismatched_sizes(backend: Backend) -> None:
    for task, name, data in (("flow", "next_image", png(40, 40)), ("amodal", "mask", mask(59, 40))):
        response = send(backend, "POST", f"/{task}", files=files(task, **{name: data}))
        assert "60x40" in assert_problem(response, 422, "invalid-input", name)["detail"]


def test_empty_mask(backend: Backend) -> None:
    black = save(Image.new("L", (60, 40)))
    assert_problem(send(backend, "POST", "/amodal", files=files("amodal", mask=black)), 422, "invalid-input", "mask")


@pytest.mark.parametrize(
    ("task", "option", "value", "param"),
    [
        ("depth", "steps", "0", "steps"),
        ("depth", "steps", "101", "steps"),
        ("depth", "steps", "many", "steps"),
        ("depth", "steps", "", "steps"),
        ("depth", "steps", "1.5", "steps"),
        ("depth", "steps", "\u0663", "steps"),
        ("depth", "ensemble_size", "21", "ensemble_size"),
        ("depth", "seed", "-1", "seed"),
        ("depth", "seed", str(2**63), "seed"),
        ("depth", "processing_resolution", "1025", "processing_resolution"),
        ("depth", "reduction", "best", "reduction"),
        ("flow", "reduction", "aligned_median", "reduction"),
        ("amodal", "reduction", "aligned_median", "reduction"),
        ("depth", "spacing", "odd", "spacing"),
        ("depth", "timestep_spacing", "odd", "spacing"),
        ("depth", "match_input_resolution", "yes", "match_input_resolution"),
        ("depth", "output_uncertainty", "True", "output_uncertainty"),
        ("depth", "format", "flo", "format"),
        ("depth", "format", "tiff", "format"),
        ("amodal", "format", "flo", "format"),
        ("depth", "render", "object", "render"),
        ("flow", "render", "object", "render"),
        ("depth", "encoding", "gif", "encoding"),
        ("depth", "step", "3", "step"),
        ("depth", "image", "x", "image"),
    ],
)
def test_impossible_options(backend: Backend, task: str, option: str, value: str, param: str) -> None:
    response = send(backend, "POST", f"/{task}", files=files(task), params={option: value})
    assert_problem(response, 422, "invalid-input", param)


@pytest.mark.parametrize(
    ("task", "options", "param", "hint"),
    [
        ("depth", {"output_uncertainty": "true"}, "output_uncertainty", "ensemble_size"),
        ("depth", {"output_uncertainty": "true", "ensemble_size": "2", "format": "png"}, "output_uncertainty", "npz"),
        ("depth", {"output_uncertainty": "true", "ensemble_size": "2", "render": "color"}, "output_uncertainty", "npz"),
        ("depth", {"render": "color", "format": "npy"}, "render", "png"),
        ("depth", {"format": "png", "encoding": "npy"}, "encoding", "json"),
        ("depth", {"spacing": "leading", "timestep_spacing": "trailing"}, "spacing", "once"),
    ],
)
def test_impossible_combinations(backend: Backend, task: str, options: dict[str, str], param: str, hint: str) -> None:
    response = send(backend, "POST", f"/{task}", files=files(task), params=options)
    assert hint in assert_problem(response, 422, "invalid-input", param)["detail"]


def test_unknown_option_names_the_nearest(backend: Backend) -> None:
    response = send(backend, "POST", "/depth", files=files("depth"), data={"ensemble": "3"})
    assert "ensemble_size" in assert_problem(response, 422, "invalid-input", "ensemble")["detail"]


def test_two_values_for_one_option(backend: Backend) -> None:
    form = send(backend, "POST", "/depth?steps=2", files=files("depth"), data={"steps": "3"})
    assert_problem(form, 422, "invalid-input", "steps")
    assert_problem(send(backend, "POST", "/depth?steps=2&steps=3", files=files("depth")), 422, "invalid-input", "steps")
    body = f'{{"image": "{B64}", "steps": 2, "steps": 3}}'
    response = send(backend, "POST", "/depth", content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "invalid-input", "steps")
    assert send(backend, "POST", "/depth?steps=2", files=files("depth"), data={"steps": "2"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "slug", "param"),
    [
        (b"", 400, "malformed-request", None),
        (b"{", 400, "malformed-request", None),
        (b"\xff\xfe\xfd", 400, "malformed-request", None),
        (b"[" * 100_000, 400, "malformed-request", None),
        (b'{"image": "", "steps": ' + b"[" * 950 + b"]" * 950 + b"}", 400, "malformed-request", None),
        (b'{"image": "", "steps": ' + b'{"a":' * 490 + b"1" + b"}" * 491, 400, "malformed-request", None),
        (b'{"image": "", "steps": [' + b"{}," * 1000 + b"1]}", 400, "malformed-request", None),
        (b'{"image": "", "steps": ' + b"[" * 150 + b"]" * 150 + b"}", 422, "invalid-input", "steps"),
        (b'{"image": NaN}', 400, "malformed-request", None),
        (b'{"steps": ' + b"9" * 5000 + b"}", 400, "malformed-request", None),
        (b"[]", 422, "invalid-input", None),
        (b"{}", 422, "invalid-input", "image"),
        (b'{"image": 3}', 422, "invalid-input", "image"),
        (b'{"image": "!!!"}', 422, "invalid-input", "image"),
        (b'{"image": "data:image/png;base64,AAAA"}', 422, "invalid-input", "image"),
        (json.dumps({"image": B64, "steps": "2"}).encode(), 422, "invalid-input", "steps"),
        (json.dumps({"image": B64, "steps": True}).encode(), 422, "invalid-input", "steps"),
        (json.dumps({"image": B64, "steps": None}).encode(), 422, "invalid-input", "steps"),
        (json.dumps({"image": B64, "steps": [1]}).encode(), 422, "invalid-input", "steps"),
        (json.dumps({"image": B64, "steps": {"a": 1}}).encode(), 422, "invalid-input", "steps"),
        (json.dumps({"image": B64, "output_uncertainty": 1}).encode(), 422, "invalid-input", "output_uncertainty"),
        (json.dumps({"image": B64, "\ud800": 1}).encode(), 422, "invalid-input", "\ud800"),
        (json.dumps({"image": B64, "mask": B64}).encode(), 422, "invalid-input", "mask"),
    ],
)
def test_bad_json(backend: Backend, body: bytes, status: int, slug: str, param: str | None) -> None:
    response = send(backend, "POST", "/depth", content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, status, slug, param)


def test_json_values_are_told_as_json(backend: Backend) -> None:
    for value, told in ((None, "null"), (True, "true"), ({"a": [1]}, "an array or object"), ("2" * 99, "'2222")):
        document = assert_problem(
            send(backend, "POST", "/depth", json={"image": B64, "steps": value}), 422, "invalid-input", "steps"
        )
        assert f"not {told}" in document["detail"]


def test_a_huge_name_is_told_short(backend: Backend) -> None:
    response = send(backend, "POST", "/depth", json={"image": B64, "steps_" * 40_000: 1})
    assert_problem(response, 422, "invalid-input", ("steps_" * 11)[:64])
    assert len(response.content) < 1000


def test_base64_may_be_wrapped(backend: Backend) -> None:
    wrapped = "\r\n\t ".join(B64[i : i + 76] for i in range(0, len(B64), 76))
    assert send(backend, "POST", "/depth", json={"image": wrapped}).status_code == 200


def multipart(*parts: bytes, end: bytes = b"--x--\r\n") -> dict[str, Any]:
    content = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + end
    return {"content": content, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}


FILE = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + png()


@pytest.mark.parametrize(
    ("request_", "status", "slug", "param"),
    [
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "malformed-request", None),
        (multipart(end=b"x"), 400, "malformed-request", None),
        (multipart(b"Content-Disposition: form-data\r\n\r\nx"), 400, "malformed-request", None),
        (multipart(b"nonsense"), 400, "malformed-request", None),
        (multipart(*[FILE] * 130), 400, "malformed-request", None),
        (multipart(*[b'Content-Disposition: form-data; name="a"\r\n\r\n1'] * 50), 400, "malformed-request", None),
        (multipart(b'Content-Disposition: form-data; name="steps"\r\n\r\n' + b"1" * 20_000), 400,
         "malformed-request", None),
        (multipart(b"X: " + b"y" * 100_000 + b"\r\n\r\n1"), 400, "malformed-request", None),
        (multipart(FILE.replace(b"image", b"video"), FILE.replace(b"image", b"video")), 422, "invalid-input", "video"),
        (multipart(FILE, end=b""), 400, "malformed-request", None),
        (multipart(), 422, "invalid-input", "image"),
        (multipart(b'Content-Disposition: form-data; name="image"\r\n\r\nabc'), 422, "invalid-input", "image"),
        (multipart(FILE, FILE.replace(b'"image"', b'"steps"')), 422, "invalid-input", "steps"),
        (multipart(FILE.replace(b'"image"', b'"img"')), 422, "invalid-input", "img"),
    ],
)  # fmt: skip
def test_bad_multipart(backend: Backend, request_: dict[str, Any], status: int, slug: str, param: str | None) -> None:
    assert_problem(send(backend, "POST", "/depth", **request_), status, slug, param)


@pytest.mark.parametrize("charset", ["punycode", "idna", "undefined", "hex", "nonsense"])
def test_a_charset_of_the_form_breaks_nothing(backend: Backend, charset: str) -> None:
    request = multipart(FILE, b'Content-Disposition: form-data; name="steps"\r\n\r\n\xff.')
    request["headers"]["Content-Type"] += f"; charset={charset}"
    assert send(backend, "POST", "/depth", **request).status_code in (400, 422)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "image/png"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": ";;;"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_unread_bodies(backend: Backend, headers: dict[str, str]) -> None:
    response = send(backend, "POST", "/depth", content=png(), headers=headers)
    assert_problem(response, 415, "unsupported-media-type")


def test_not_acceptable_lists_what_there_is(backend: Backend) -> None:
    response = send(backend, "POST", "/depth", files=files("depth"), headers={"Accept": "text/html, application/x-flo"})
    assert "application/x-npy" in assert_problem(response, 406, "not-acceptable")["detail"]


@pytest.mark.parametrize("accept", ["text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "*", "image/gif, */*;q=.2"])
def test_the_accept_headers_of_java(backend: Backend, accept: str) -> None:
    response = send(backend, "POST", "/depth", files=files("depth"), headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")


def test_head_is_get_without_the_body(backend: Backend) -> None:
    for path in ("/", "/models", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert send(backend, "HEAD", path).status_code == 200
    assert_problem(send(backend, "POST", "/livez"), 405, "method-not-allowed")


def test_unknown_paths_and_methods(backend: Backend) -> None:
    assert_problem(send(backend, "GET", "/nothing"), 404, "not-found")
    assert_problem(send(backend, "POST", "/depth/", files=files("depth")), 404, "not-found")
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        response = send(backend, method, "/depth")
        assert_problem(response, 405, "method-not-allowed")
        assert response.headers["allow"] == "POST"


def test_body_too_large_however_it_is_declared(backend: Backend) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield bytes(65536)

    json_type = {"Content-Type": "application/json"}
    for headers in (json_type, json_type | {"Content-Length": "10"}, json_type | {"Content-Length": str(10**12)}):
        sent = 0
        response = send(backend, "POST", "/depth", content=limited(endless(), 64), headers=headers)
        assert_problem(response, 413, "too-large")
        assert response.headers["connection"] == "close"


async def limited(chunks: AsyncIterator[bytes], count: int) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield chunk
        count -= 1
        if not count:
            return


def test_native_size_is_refused_beyond_the_largest_resolution(backend: Backend) -> None:
    async def both() -> tuple[httpx.Response, httpx.Response]:
        async with running(backend, max_processing_resolution=64) as house:
            large = await house.client.post("/depth?processing_resolution=0", files=files("depth", image=png(200, 100)))
            return large, await house.ask("depth", processing_resolution=0)

    large, small = asyncio.run(both())
    assert_problem(large, 422, "invalid-input", "processing_resolution")
    assert small.status_code == 200


def test_faults_of_the_server_tell_nothing_but_an_id(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing(backend)

    async def fail(house: House, error: Exception | None) -> httpx.Response:
        failing.error = error
        return await house.ask("depth", ensemble_size=2)

    async def all_faults() -> list[httpx.Response]:
        async with running(failing) as house:
            faults = [RuntimeError("secret /etc/path"), ModelError("secret shape"), BackendUnavailable("draining")]
            return [await fail(house, fault) for fault in (*faults, None)]

    *internal, unavailable, good = asyncio.run(all_faults())
    for response in internal:
        document = assert_problem(response, 500, "internal")
        assert "secret" not in response.text
        assert document["instance"].removeprefix("urn:uuid:") in caplog.text
    assert_problem(unavailable, 503, "unavailable")
    assert int(unavailable.headers["retry-after"]) >= 1
    assert good.status_code == 200


def test_16_bit_and_rotated_pictures_are_no_reason_to_refuse(backend: Backend) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(out, "JPEG", exif=exif)
    response = send(backend, "POST", "/depth", files=files("depth", image=out.getvalue()))
    assert response.json()["shape"] == [60, 40]
    wide = save(Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27))
    assert send(backend, "POST", "/depth", files=files("depth", image=wide)).json()["shape"] == [40, 60]


def test_too_many_members(backend: Backend) -> None:
    response = send(backend, "POST", "/depth", json={"image": B64} | {f"option{n}": n for n in range(50)})
    assert_problem(response, 400, "malformed-request")


def test_uploads_together_are_bounded(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.limits.BODIES_AT_ONCE", 1e-5)
    response = send_only(backend, files=files("depth"))
    assert_problem(response, 429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1


def send_only(backend: Backend, **request: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with running(backend) as house:
            return await house.client.post("/depth", **request)

    return asyncio.run(once())


def test_a_task_that_the_model_lacks(backend: Backend) -> None:
    class DepthOnly(Wrapped):
        @property
        def card(self) -> Card:
            return self.inner.card.model_copy(update={"tasks": {"depth": self.inner.card.tasks["depth"]}})

    async def ask() -> httpx.Response:
        async with running(DepthOnly(backend)) as house:
            assert (await house.ask("depth")).status_code == 200
            return await house.ask("flow")

    assert_problem(asyncio.run(ask()), 422, "invalid-input", "task")
