"""A gateway whose Triton comes late, and whose model comes later still."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from saccade.repository import Repository
from tests import toy
from tests.server.house import PROBLEM, files
from tests.server.process import Process, started
from tests.triton.server import Tritons, TritonServer

pytestmark = pytest.mark.triton


@pytest.fixture
def triton(tmp_path: Path, tritons: Tritons) -> Iterator[TritonServer]:
    """A server of this test's own, not started, over a repository that may be written to."""
    server = TritonServer(toy.build(tmp_path / "model_repository", name="first"), tmp_path / "triton")
    yield server
    server.close()


def served(gateway: Process) -> str:
    return str(httpx.get(gateway.url + "/readyz").json().get("model"))


def test_a_gateway_waits_for_its_triton(triton: TritonServer) -> None:
    with started(triton.repository, backend="triton", triton_url=triton.url) as gateway:
        for answer in (
            httpx.post(gateway.url + "/depth", files=files("depth")),
            httpx.get(gateway.url + "/models"),
            httpx.get(gateway.url + "/readyz"),
        ):
            assert (answer.status_code, answer.headers["content-type"]) == (503, PROBLEM)
            assert answer.json()["type"] == "urn:saccade:problem:unavailable"
            assert 1 <= int(answer.headers["retry-after"]) <= 5
        triton.start()
        gateway.until(lambda: served(gateway) == "first")
        assert httpx.post(gateway.url + "/depth", files=files("depth")).status_code == 200
        gateway.popen.send_signal(signal.SIGTERM)
        assert gateway.popen.wait(30) == 0
        assert "Traceback" not in gateway.log.read_text()


def test_a_gateway_that_never_found_its_triton_ends_cleanly(triton: TritonServer) -> None:
    with started(triton.repository, backend="triton", triton_url=triton.url) as gateway:
        gateway.popen.send_signal(signal.SIGTERM)
        assert gateway.popen.wait(30) == 0
        assert "Traceback" not in gateway.log.read_text()


def test_a_model_that_came_after_triton_had_started_takes_over(triton: TritonServer, tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_text("first")
    triton.start()
    gateway_settings = {"backend": "triton", "triton_url": triton.url, "model_file": file}
    with started(triton.repository, **gateway_settings) as gateway, ThreadPoolExecutor(1) as pool:
        gateway.until(lambda: served(gateway) == "first")
        file.write_text("second")
        gateway.until(lambda: httpx.get(gateway.url + "/readyz").json()["fault"] is not None)
        assert served(gateway) == "first"
        asking = pool.submit(ask_often, gateway, 60)
        toy.build(triton.repository, name="second", width=32)
        gateway.until(lambda: served(gateway) == "second")
        file.write_text("first")
        gateway.until(lambda: served(gateway) == "first")
        digests = {Repository(triton.repository).card(name).digest for name in ("first", "second")}
        answers = asking.result()
        answers += ask_often(gateway, 1)
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["saccade-digest"] for answer in answers} <= digests
    assert answers[-1].headers["saccade-model"] == "first"


def ask_often(gateway: Process, times: int) -> list[httpx.Response]:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        return [client.post("/depth", files=files("depth")) for _ in range(times)]
