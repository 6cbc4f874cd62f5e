"""API keys: who is let in, for what, how often; and how keys are made, changed and taken back."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers
from typer.testing import CliRunner

from saccade.backends import Backend
from saccade.cli import app
from saccade.client import AsyncClient
from saccade.errors import InvalidInput, ServerError
from server import keys
from server.keys import Bucket, Ring
from tests.server.house import Clock, House, files, png, running
from tests.server.process import Process, serving
from tests.server.test_refusals import assert_problem

NARROW, WIDE, SLOW = keys.new(), keys.new(), keys.new()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        keys.entry("narrow", NARROW, ("depth",), None, 10)
        + keys.entry("wide", WIDE, keys.SCOPES, None, 10)
        + keys.entry("slow", SLOW, ("models",), 6.0, 2)
    )
    return path


@asynccontextmanager
async def locked(backend: Backend, file: Path) -> AsyncIterator[House]:
    async with running(backend, keys_file=file) as house:
        yield house


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask(backend: Backend, file: Path, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    async def once() -> httpx.Response:
        async with locked(backend, file) as house:
            sent = files("depth") if method == "POST" else None
            return await house.client.request(method, path, headers=headers, files=sent)

    return asyncio.run(once())


@pytest.mark.parametrize(
    "headers", [{}, bearer("sk-wrong"), bearer(""), {"X-API-Key": ""}, {"Authorization": "Basic x"}]
)
def test_without_a_known_key_nobody_is_answered(backend: Backend, file: Path, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/depth"), ("GET", "/models"), ("GET", "/openapi.json"), ("GET", "/no-such-path")):
        response = ask(backend, file, method, path, headers)
        assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")


def test_probes_and_the_page_need_no_key(backend: Backend, file: Path) -> None:
    for path in ("/", "/livez", "/readyz", "/v2/health/live"):
        for headers in ({}, bearer("sk-wrong"), bearer(NARROW)):
            assert ask(backend, file, "GET", path, headers).status_code == 200


@pytest.mark.parametrize("headers", [bearer(NARROW), {"X-API-Key": NARROW}, {"Authorization": f"bearer  {NARROW}"}])
def test_a_key_opens_what_its_scopes_say(backend: Backend, file: Path, headers: dict[str, str]) -> None:
    assert ask(backend, file, "POST", "/depth", headers).status_code == 200
    assert ask(backend, file, "GET", "/openapi.json", headers).status_code == 200
    for method, path in (("POST", "/flow"), ("GET", "/metrics"), ("GET", "/jobs/x"), ("POST", "/mask")):
        assert_problem(ask(backend, file, method, path, headers), 403, "forbidden")
    assert ask(backend, file, "GET", "/v2", headers).json().keys() == {"error"}  # as that protocol wants it
    later = headers | {"Prefer": "respond-async"}
    assert "jobs" in assert_problem(ask(backend, file, "POST", "/depth", later), 403, "forbidden")["detail"]


def test_the_client_brings_its_key(backend: Backend, file: Path) -> None:
    async def both() -> ServerError:
        async with locked(backend, file) as house:
            door = house.client._transport
            async with AsyncClient("http://saccade", api_key=NARROW, transport=door) as client:
                assert (await client.depth(png())).task == "depth"
            async with AsyncClient("http://saccade", api_key="sk-wrong", transport=door) as stranger:
                with pytest.raises(ServerError) as refused:
                    await stranger.depth(png())
                return refused.value

    assert asyncio.run(both()).status == 401


def test_past_its_rate_a_key_is_told_when_to_come_back(backend: Backend, file: Path) -> None:
    async def often() -> list[httpx.Response]:
        async with locked(backend, file) as house:
            return [await house.client.get("/models", headers=bearer(SLOW)) for _ in range(3)]

    *good, late = asyncio.run(often())
    assert [response.status_code for response in good] == [200, 200]
    assert_problem(late, 429, "rate-limited")
    assert 8 <= int(late.headers["retry-after"]) <= 10


def test_a_bucket_fills_up_to_its_burst() -> None:
    clock = Clock()
    bucket = Bucket(60, 2, clock)
    assert [bucket.take() for _ in range(3)] == [0, 0, 1]
    clock.now = 1.0
    assert [bucket.take(), bucket.take()] == [0, 1]
    clock.now = 100.0
    assert [bucket.take() for _ in range(3)] == [0, 0, 1]


def test_every_task_needs_a_scope_of_its_own() -> None:
    none = Headers()
    assert keys.needed("/flow", none) == {"flow"}
    assert keys.needed("/v2/models/x/infer", none) == {"v2"}
    assert keys.needed("/jobs/abc/result", none) == {"jobs"}
    assert keys.needed("/depths", none) == set()
    twice = Headers(raw=[(b"prefer", b"wait=5"), (b"prefer", b"respond-async")])
    assert keys.needed("/depth", twice) == {"depth", "jobs"}
    assert not keys.is_open("/pages")
    assert keys.is_open("/page/style.css")


def test_the_file_is_followed_and_a_broken_one_changes_nothing(file: Path) -> None:
    ring = Ring(file)
    assert ring.find(NARROW)
    added = keys.new()
    file.write_text(keys.entry("narrow", added, ("depth",), None, 10))
    ring.look()
    assert ring.find(added)
    assert ring.find(NARROW) is ring.find(WIDE) is None
    file.write_text("not toml [")
    with pytest.raises(InvalidInput):
        ring.look()
    assert ring.find(added)


def test_a_change_elsewhere_gives_nobody_new_credit(file: Path) -> None:
    ring = Ring(file, Clock())
    slow = ring.find(SLOW)
    assert slow
    assert [ring.wait_s(slow) for _ in range(3)] == [0, 0, 10]
    file.write_text(file.read_text() + keys.entry("more", keys.new(), ("depth",), None, 10))
    ring.look()
    assert ring.wait_s(slow) == 10


@pytest.mark.parametrize(
    "text",
    [
        "[[keys]]\nname = 'a b'\nsha256 = '" + "0" * 64 + "'",
        "[[keys]]\nname = 'a'\nsha256 = 'sk-plain-text'",
        "[[keys]]\nname = 'a'\nsha256 = '" + "0" * 64 + "'\nscopes = ['all']",
        "[[keys]]\nname = 'a'\nsha256 = '" + "0" * 64 + "'\nrate_per_minute = 0",
        "[[keys]]\nname = 'a'\nkey = 'sk-x'",
        "keys = 3",
        "\xff",
    ],
)
def test_a_file_that_is_not_in_order_is_refused_without_its_content(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidInput, match="keys file") as caught:
        Ring(path)
    assert "sk-" not in str(caught.value)


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("".join(keys.entry("same", keys.new(), ("depth",), None, 10) for _ in range(2)))
    with pytest.raises(InvalidInput, match="same name"):
        Ring(path)


def test_the_command_makes_a_key_that_opens_the_server(toy_repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    with serving(toy_repository, keys_file=file, log_format="json") as server:
        said = CliRunner().invoke(
            app, ["keys", "new", "--name", "camera", "--scope", "depth", "--rate", "600", "--file", str(file)]
        )
        assert said.exit_code == 0, said.output
        key = re.findall(r"sk-[A-Za-z0-9_-]{43}", said.output)[0]
        assert key not in file.read_text()
        assert tomllib.loads(file.read_text())["keys"][0]["name"] == "camera"
        server.until(lambda: depth(server, key) == 200)
        assert depth(server, "sk-other") == 401
        assert key not in server.log.read_text()
        assert '"key": "camera"' in server.log.read_text()
        file.write_text("")
        server.until(lambda: depth(server, key) == 401)


def depth(server: Process, key: str) -> int:
    return httpx.post(server.url + "/depth", files=files("depth"), headers=bearer(key)).status_code


def test_a_missing_keys_file_is_one_plain_line(toy_repository: Path, tmp_path: Path) -> None:
    from tests.server.test_process import refusal

    refusal(toy_repository, tmp_path / "log", "keys file", keys_file=tmp_path / "nowhere.toml")
