"""SIGTERM loses nothing that was accepted, and the process ends within a bound whatever hangs."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.house import files
from tests.server.process import PROGRAM, Process, serving
from tests.server.test_refusals import assert_problem

HANGING = f"""
import os, pathlib, time
from saccade.backends.embedded import Embedded

compute, gate = Embedded._compute, pathlib.Path(os.environ["SACCADE_MODEL_REPOSITORY"]).parent / "hang"

def hang(self, *call):
    while gate.exists():
        time.sleep(0.01)
    return compute(self, *call)

Embedded._compute = hang
{PROGRAM}
"""
"""A server whose engine hangs, in its thread, while the file `hang` lies beside the repository."""


@pytest.fixture
def gate(toy_repository: Path) -> Path:
    path = toy_repository.parent / "hang"
    path.unlink(missing_ok=True)
    return path


class Callers:
    """Callers that ask and ask, each time over a new connection, until they are told to stop."""

    def __init__(self, server: Process) -> None:
        self.server = server
        self.stop = threading.Event()
        self.answers: list[int | str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                response = httpx.post(self.server.url + "/depth?steps=20", files=files("depth"), timeout=60)
                self.answers.append(response.status_code)
            except httpx.ConnectError:  # not accepted, and told so at once
                return
            except httpx.TransportError as error:
                self.answers.append(repr(error))


def test_a_signal_under_load_loses_no_request(toy_repository: Path) -> None:
    with serving(toy_repository) as server, ThreadPoolExecutor(9) as pool:
        callers = Callers(server)
        running = [pool.submit(callers.run) for _ in range(8)]
        server.until(lambda: len(callers.answers) > 20)
        callers.stop.set()
        server.popen.send_signal(signal.SIGTERM)
        for caller in running:
            caller.result()
        assert set(callers.answers) == {200}
        assert server.popen.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


def test_before_it_closes_it_says_so(toy_repository: Path) -> None:
    with serving(toy_repository, drain_delay_s=3) as server, httpx.Client(base_url=server.url) as kept:
        assert "connection" not in kept.get("/livez").headers
        server.popen.send_signal(signal.SIGTERM)
        server.until(lambda: httpx.get(server.url + "/readyz").status_code == 503)
        assert "shutting down" in httpx.get(server.url + "/readyz").json()["detail"]
        answer = kept.post("/depth", files=files("depth"))
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert server.popen.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/livez")


def test_what_hangs_is_told_and_left_behind(toy_repository: Path, gate: Path) -> None:
    bounds = {"program": HANGING, "drain_timeout_s": 1, "drain_delay_s": 0}
    with serving(toy_repository, **bounds) as server, ThreadPoolExecutor(1) as pool:
        gate.touch()
        waiting = pool.submit(httpx.post, server.url + "/depth", files=files("depth"), timeout=60)
        server.until(lambda: server.counters()["saccade_running_rows"] > 0)
        server.popen.send_signal(signal.SIGTERM)
        assert_problem(waiting.result(), 503, "leaving")
        assert int(waiting.result().headers["retry-after"]) >= 1
        assert server.popen.wait(30) == 1
        assert "left behind" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()
