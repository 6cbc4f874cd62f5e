"""Request ids and log lines, as an operator and a caller see them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from saccade.backends import Backend
from tests.server.house import Failing, House, files, running
from tests.server.process import Process, serving


def test_every_answer_has_an_id_its_own_or_the_callers(backend: Backend) -> None:
    async def all_kinds(house: House) -> list[httpx.Response]:
        client = house.client
        return [
            await client.get("/livez"),
            await client.get("/nothing"),
            await client.put("/depth"),
            await client.post("/depth", content=b"x"),
            await client.get("/v2/models/none"),
            await house.ask("depth"),
        ]

    async def ask() -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with running(backend) as house:
            own = [
                await house.client.get("/livez", headers={"X-Request-ID": name})
                for name in ("mine-1._Z", "x" * 128, "x" * 129, "a b", "a\tb", "")
            ]
            return await all_kinds(house), own

    answers, own = asyncio.run(ask())
    made = [response.headers["x-request-id"] for response in answers]
    assert all(re.fullmatch("[0-9a-f]{32}", identity) for identity in made)
    assert len(set(made)) == len(made)
    told = [response.headers["x-request-id"] for response in own]
    assert told[:2] == ["mine-1._Z", "x" * 128]
    assert all(re.fullmatch("[0-9a-f]{32}", identity) for identity in told[2:])


def test_a_fault_of_the_server_has_the_id_too(backend: Backend) -> None:
    failing = Failing(backend)

    async def ask() -> httpx.Response:
        async with running(failing) as house:
            failing.error = RuntimeError("boom")
            return await house.ask("depth")

    response = asyncio.run(ask())
    assert response.status_code == 500
    assert response.headers["x-request-id"]


@pytest.fixture
def told(toy_repository: Path) -> list[dict[str, Any]]:
    """The JSON log of a server that was asked a few things."""
    with serving(toy_repository, log_format="json") as server:
        ask_all(server)
        server.until(lambda: "forged" in server.log.read_text())
        server.popen.terminate()
        assert server.popen.wait(30) == 0
        return [json.loads(line) for line in server.log.read_text().splitlines()]


def ask_all(server: Process) -> None:
    named = {"X-Request-ID": "trace-me"}
    assert httpx.post(server.url + "/depth?seed=7654321", files=files("depth"), headers=named).status_code == 200
    assert httpx.get(server.url + "/forged%0a2026-01-01%20INFO%20root:%20all%20is%20well%1b[31m").status_code == 404


def test_the_json_log_is_json_and_tells_of_every_request(told: list[dict[str, Any]]) -> None:
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in told)
    requests = [line for line in told if line["logger"] == "server.access"]
    (depth,) = (line for line in requests if line["path"] == "/depth")
    assert depth["request_id"] == "trace-me"
    assert (depth["method"], depth["task"], depth["status"], depth["key"]) == ("POST", "depth", 200, None)
    assert depth["ms"] > 0
    assert "7654321" not in json.dumps(told)
    assert not [line for line in requests if line["path"] in ("/livez", "/readyz")]


def test_a_path_cannot_forge_a_line_of_the_text_log(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        async with running(backend) as house:
            await house.client.get("/forged%0aline%1b[31m")

    with caplog.at_level(logging.INFO, "server.access"):
        asyncio.run(ask())
    (message,) = (record.getMessage() for record in caplog.records if record.name == "server.access")
    assert message.startswith("GET /forged\\nline\\u001b[31m 404")
