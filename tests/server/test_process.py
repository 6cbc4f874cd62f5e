"""The real server: sockets, signals, clients that leave."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests import toy
from tests.server.house import PROBLEM, files, png
from tests.server.process import Process, serving, spawn

pytestmark = pytest.mark.usefixtures("place")
EMBEDDED = pytest.mark.parametrize("place", ["embedded"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def heavy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a wide denoiser, so that a request can be long."""
    return toy.build(tmp_path_factory.mktemp("heavy") / "model_repository", width=256)


@pytest.fixture(scope="module")
def shared(place: None, toy_repository: Path) -> Iterator[Process]:
    with serving(toy_repository, max_upload_bytes=200_000) as process:
        yield process


def raw_request(path: str = "/depth", declared: int | None = None, body: bytes = b"{}") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: saccade", "Content-Type: application/json", "Connection: close"]
    return (
        "\r\n".join([*lines, f"Content-Length: {len(body) if declared is None else declared}", "", ""]).encode() + body
    )


def exchange(server: Process, data: bytes, shut: bool = False) -> bytes:
    """Send raw bytes, read until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = io.BytesIO()
        while chunk := connection.recv(65536):
            received.write(chunk)
        return received.getvalue()


def test_declared_length_over_the_limit_is_refused_and_closed(shared: Process) -> None:
    answer = exchange(shared, raw_request(declared=10**12))
    assert answer.startswith(b"HTTP/1.1 413")
    assert PROBLEM.encode() in answer
    assert b"connection: close" in answer.lower()


def test_chunked_body_without_end_is_refused_while_it_comes(shared: Process) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(65536)

    response = httpx.post(shared.url + "/depth", content=endless(), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.headers["content-type"]) == (413, PROBLEM)


def test_lengths_that_lie_do_not_hurt(shared: Process) -> None:
    exchange(shared, raw_request(declared=1000), shut=True)
    assert exchange(shared, raw_request(declared=1, body=b"{}")).startswith(b"HTTP/1.1 4")
    assert shared.alive()
    assert shared.counters()["saccade_pending_requests"] == 0


def test_leaving_frees_the_steps_at_once(heavy_repository: Path) -> None:
    with serving(heavy_repository, max_steps=1000) as server:
        request = httpx.Request(
            "POST",
            server.url + "/depth?steps=1000&ensemble_size=20&processing_resolution=256",
            files=files("depth", image=png(256, 256)),
        )
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"POST {request.url.raw_path.decode()} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            server.until(lambda: server.counters().get('saccade_rows_total{kind="denoise"}', 0) > 0)
        server.until(lambda: server.counters()["saccade_pending_requests"] == 0)
        server.until(lambda: server.counters()["saccade_running_rows"] == 0)
        counters = server.counters()
        assert counters["saccade_queue_rows"] == counters["saccade_pending_work"] == 0
        assert counters['saccade_cancelled_total{reason="disconnect",task="depth"}'] == 1
        assert counters['saccade_rows_total{kind="denoise"}'] < 20_000
        assert httpx.post(server.url + "/depth", files=files("depth")).status_code == 200


def test_sigterm_finishes_what_was_accepted(heavy_repository: Path) -> None:
    with serving(heavy_repository) as server, ThreadPoolExecutor(1) as pool:
        url = server.url + "/depth?steps=100&ensemble_size=4&processing_resolution=128"
        answer = pool.submit(httpx.post, url, files=files("depth", image=png(128, 128)), timeout=60)
        server.until(lambda: server.counters().get('saccade_rows_total{kind="denoise"}', 0) > 0)
        server.popen.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
        assert server.popen.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/livez")
        assert "Traceback" not in server.log.read_text()


def test_a_port_in_use_is_one_plain_line(shared: Process, toy_repository: Path, tmp_path: Path) -> None:
    refusal(toy_repository, tmp_path / "log", f"port {shared.port}", port=shared.port)


@EMBEDDED
def test_a_missing_repository_is_one_plain_line(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", tmp_path / "log", "model repository")


def refusal(repository: Path, log: Path, hint: str, **settings: object) -> None:
    with log.open("w") as stream:
        popen: subprocess.Popen[str] = spawn(repository, stream, **settings)
        assert popen.wait(60) != 0
    said = log.read_text()
    assert hint in said.splitlines()[-1]
    assert "Traceback" not in said


@EMBEDDED
def test_what_multiplies_is_told(toy_repository: Path) -> None:
    with serving(toy_repository, engine="onnxruntime", threads=2, ratios="4:3") as server:
        labels = 'engine="onnxruntime",model="toy",precision="fp32",sizes="",streams="1",threads="2"'
        told = f"saccade_engine_info{{{labels}}} 1.0"
        assert told in httpx.get(f"{server.url}/metrics").text
        assert "toy runs on onnxruntime in fp32, threads: 2, streams: 1" in server.log.read_text()


@EMBEDDED
def test_two_streams_answer_a_crowd_as_one_caller(toy_repository: Path) -> None:
    with serving(toy_repository, engine="openvino", threads=2, streams=2) as server:
        assert 'streams="2"' in httpx.get(f"{server.url}/metrics").text

        def ask(seed: int) -> bytes:
            form = {"seed": str(seed), "steps": "3", "ensemble_size": "2"}
            accept = {"accept": "image/png"}
            answer = httpx.post(f"{server.url}/depth", files=files("depth"), data=form, headers=accept, timeout=60)
            assert answer.status_code == 200
            return answer.content

        alone = [ask(seed) for seed in range(6)]
        with ThreadPoolExecutor(6) as crowd:
            assert list(crowd.map(ask, range(6))) == alone
        assert len(set(alone)) == 6
