"""Jobs through kill -9: real processes, one file; nothing lost, nothing answered twice."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import toy
from tests.server.house import files, png
from tests.server.process import Process, serving

pytestmark = pytest.mark.usefixtures("place")
COUNT = 8
OPTIONS = {"steps": 60, "processing_resolution": 128, "format": "npy"}


@pytest.fixture(scope="module")
def heavy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a wide denoiser, so that jobs take a moment."""
    return toy.build(tmp_path_factory.mktemp("heavy") / "model_repository", width=256)


def ask(server: Process, seed: int, **headers: str) -> httpx.Response:
    return httpx.post(
        server.url + "/depth",
        params=OPTIONS | {"seed": seed},
        files=files("depth", image=png(128, 128)),
        headers=headers,
        timeout=60,
    )


def submit(server: Process, seed: int) -> dict[str, Any]:
    response = ask(server, seed, **{"Prefer": "respond-async", "Idempotency-Key": f"picture-{seed}"})
    assert response.status_code == 202
    job: dict[str, Any] = response.json()
    return job


def documents(server: Process) -> dict[str, dict[str, Any]]:
    return {job["id"]: job for job in httpx.get(server.url + "/jobs", params={"limit": 100}).json()["jobs"]}


def result(server: Process, path: str) -> httpx.Response:
    """Once its events have ended."""
    httpx.get(f"{server.url}{path}/events", timeout=60)
    return httpx.get(f"{server.url}{path}/result")


def test_kill_9_with_jobs_in_the_queue(heavy_repository: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"jobs_file": tmp_path / "jobs.sqlite", "jobs_at_once": 1}
    with serving(heavy_repository, **settings) as server:
        made = [submit(server, seed) for seed in range(COUNT)]
        first = result(server, made[0]["links"]["self"]).content
        before = documents(server)
        server.popen.send_signal(signal.SIGKILL)
        server.popen.wait()
    done = {identity for identity, job in before.items() if job["status"] == "done"}
    assert 0 < len(done) < COUNT, "killed in the middle of it"

    with serving(heavy_repository, **settings) as server:
        repeated = [submit(server, seed) for seed in range(COUNT)]
        assert [job["id"] for job in repeated] == [job["id"] for job in made], "asking again makes no second job"
        results = [result(server, job["links"]["self"]) for job in made]
        assert [response.status_code for response in results] == [200] * COUNT
        assert results[0].content == first
        assert [response.content for response in results] == [ask(server, seed).content for seed in range(COUNT)]
        after = documents(server)
        assert after.keys() == before.keys()
        assert {job["status"] for job in after.values()} == {"done"}
        assert all(after[identity] == before[identity] for identity in done), "what was done is not done again"
        assert server.counters()['saccade_jobs_finished_total{status="done",task="depth"}'] <= COUNT - len(done)


def test_sigterm_leaves_the_queue_to_the_next_server(heavy_repository: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"jobs_file": tmp_path / "jobs.sqlite", "jobs_at_once": 1}
    with serving(heavy_repository, **settings) as server:
        made = [submit(server, seed) for seed in range(4)]
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) == 0
        assert "Traceback" not in server.log.read_text()
    with serving(heavy_repository, **settings) as server:
        assert [result(server, job["links"]["self"]).status_code for job in made] == [200] * 4


def test_a_second_server_on_the_same_file_ends_with_one_line(toy_repository: Path, tmp_path: Path) -> None:
    from tests.server.test_process import refusal

    with serving(toy_repository, jobs_file=tmp_path / "jobs.sqlite"):
        refusal(toy_repository, tmp_path / "log", "another server", jobs_file=tmp_path / "jobs.sqlite")
