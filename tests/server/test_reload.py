"""Models that change under the real server: a file as Kubernetes writes it, requests all the while, signals."""

from __future__ import annotations

import io
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from saccade.repository import Repository
from tests import toy
from tests.server.house import PICTURES, files
from tests.server.process import Process, serving
from tests.server.test_process import EMBEDDED, refusal

MODELS = ("red", "blue")
pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models whose answers differ: one is wider."""
    path = tmp_path_factory.mktemp("two") / "model_repository"
    for name, width in zip(MODELS, (16, 32), strict=True):
        toy.build(path, name=name, width=width)
    return path


class ConfigMap:
    """A directory that a kubelet keeps: the file is a link through `..data`, which is swapped for another at once."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.versions = path, 0
        path.mkdir()
        self.write(name)
        (path / "model").symlink_to("..data/model")

    @property
    def file(self) -> Path:
        return self.path / "model"

    def write(self, name: str) -> None:
        self.versions += 1
        version = self.path / f"..{self.versions}"
        version.mkdir()
        (version / "model").write_text(name)
        (self.path / "..tmp").symlink_to(version.name)
        (self.path / "..tmp").rename(self.path / "..data")


def maps_of(answers: list[httpx.Response], task: str, digest: str) -> list[NDArray[np.float64]]:
    mine = [a for a in answers if a.request.url.path == f"/{task}" and a.headers["saccade-digest"] == digest]
    return [np.load(io.BytesIO(answer.content)).astype(np.float64) for answer in mine]


def apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.abs(a - b).mean())


def serves(server: Process, name: str) -> bool:
    return bool(httpx.get(server.url + "/readyz").json().get("model") == name)


def test_no_request_is_lost_while_models_change(repository: Path, tmp_path: Path) -> None:
    wanted = ConfigMap(tmp_path / "config", "red")
    digests = {name: Repository(repository).card(name).digest for name in MODELS}
    stop = threading.Event()
    answers: list[httpx.Response] = []

    def load() -> None:
        with httpx.Client(base_url=server.url, timeout=30, headers={"Accept": "application/x-npy"}) as client:
            while not stop.is_set():
                for task in PICTURES:
                    answers.append(client.post(f"/{task}?steps=4&ensemble_size=3", files=files(task)))

    with serving(repository, model_file=wanted.file, batch_size=1) as server, ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(load) for _ in range(3)]
        for name in ("blue", "red", "blue"):
            wanted.write(name)
            server.until(lambda name=name: serves(server, name))
        stop.set()
        for done in loads:
            done.result()
        server.until(lambda: 'state="leaving"' not in httpx.get(server.url + "/metrics").text)
        counters = server.counters()
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) == 0

    assert Counter(answer.status_code for answer in answers) == {200: len(answers)}
    told = Counter((answer.headers["saccade-model"], answer.headers["saccade-digest"]) for answer in answers)
    assert set(told) == set(digests.items())
    for task in PICTURES:
        red, blue = (maps_of(answers, task, digests[name]) for name in MODELS)
        assert max(apart(red[0], other) for other in red) < 1e-3, "an answer is wholly one model's"
        assert max(apart(blue[0], other) for other in blue) < 1e-3
        assert apart(red[0], blue[0]) > 1e-2
    assert counters['saccade_model_loads_total{outcome="opened"}'] >= 2
    assert counters["saccade_pending_requests"] == counters["saccade_queue_rows"] == 0
    assert "Traceback" not in server.log.read_text()


@EMBEDDED
def test_a_signal_in_the_middle_of_a_move_is_a_clean_end(repository: Path, tmp_path: Path) -> None:
    wanted = ConfigMap(tmp_path / "config", "red")
    with serving(repository, model_file=wanted.file) as server:
        wanted.write("blue")
        server.until(lambda: "blue runs on" in server.log.read_text())
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


@EMBEDDED
@pytest.mark.parametrize(
    ("content", "hint"),
    [("", "the model file is empty"), ("green", "green"), ("../red", "not a model name"), (None, "is missing")],
)
def test_a_file_that_cannot_be_followed_at_start_is_one_plain_line(
    repository: Path, tmp_path: Path, content: str | None, hint: str
) -> None:
    file = tmp_path / "model"
    if content is not None:
        file.write_text(content)
    refusal(repository, tmp_path / "log", hint, model_file=file)


@EMBEDDED
def test_a_model_that_fails_its_trial_at_start_is_one_plain_line(tmp_path: Path) -> None:
    repository = toy.build(tmp_path / "model_repository", fault="nan")
    refusal(repository, tmp_path / "log", "non-finite")
