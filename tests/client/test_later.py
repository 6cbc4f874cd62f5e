"""Watching an answer come, and leaving a request with the server: both clients, and the command, on a real server."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from saccade.client import AsyncClient, Client, Retries
from saccade.errors import BackendUnavailable, InvalidInput, ServerError
from saccade.later import Accepted, Job, OtherAnswer, Preview, Progress, Update
from saccade.pipeline import Answer
from tests.client.conftest import Scene
from tests.client.test_client import same
from tests.server.process import serving

TASKS = ("depth", "flow", "amodal")


@pytest.fixture(scope="module")
def url(toy_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(toy_repository, jobs_file=tmp_path_factory.mktemp("jobs") / "jobs.sqlite") as server:
        yield server.url


@pytest.fixture
def pictures(scene: Scene) -> dict[str, dict[str, Path]]:
    return {
        "depth": {"image": scene.image},
        "flow": {"image": scene.image, "next_image": scene.next_image},
        "amodal": {"image": scene.image, "mask": scene.mask},
    }


def ask(client: Client, task: str, pictures: dict[str, Path], **choices: object) -> Answer:
    return getattr(client, task)(*pictures.values(), **choices)  # type: ignore[no-any-return]


@pytest.mark.parametrize("task", TASKS)
def test_watching(task: str, url: str, pictures: dict[str, dict[str, Path]]) -> None:
    with Client(url) as client:
        updates = list(client.stream(task, **pictures[task], steps=4, ensemble_size=2, seed=3, previews=2))  # type: ignore[arg-type]
        plain = ask(client, task, pictures[task], steps=4, ensemble_size=2, seed=3)
    first, last = updates[0], updates[-1]
    assert isinstance(first, Accepted)
    assert (first.task, first.steps, first.ensemble_size, first.total_steps) == (task, 4, 2, 8)
    assert isinstance(last, Answer)
    assert same(last, plain)
    previews = [update for update in updates if isinstance(update, Preview)]
    assert [preview.step for preview in previews] == [2, 4]
    assert all((p.picture.shape, p.picture.dtype) == ((48, 64, 3), np.uint8) for p in previews)
    assert [update.done for update in updates if isinstance(update, Progress)][-1] == 8


@pytest.mark.parametrize("task", TASKS)
def test_leaving_it_with_the_server(task: str, url: str, pictures: dict[str, dict[str, Path]]) -> None:
    with Client(url) as client:
        job = client.submit(task, **pictures[task], seed=5)  # type: ignore[arg-type]
        answer = client.result(job)
        assert same(answer, ask(client, task, pictures[task], seed=5))
        known = client.job(job.id)
        assert (known.id, known.status, known.task, known.problem) == (job.id, "done", task, None)
        assert known.started is not None
        assert known.created <= known.started
        assert job.id in {other.id for other in client.jobs()}
        assert client.submit(task, **pictures[task], idempotency_key=f"{task}-1").id == (  # type: ignore[arg-type]
            client.submit(task, **pictures[task], idempotency_key=f"{task}-1").id  # type: ignore[arg-type]
        )
        client.cancel(job)
        with pytest.raises(ServerError, match="404"):
            client.job(job)


def test_the_same_to_await(url: str, pictures: dict[str, dict[str, Path]]) -> None:
    async def story() -> tuple[list[Update], Answer, Job, list[Job]]:
        async with AsyncClient(url) as client:
            updates = [update async for update in client.stream("depth", **pictures["depth"], seed=9)]
            job = await client.submit("depth", **pictures["depth"], seed=9)
            answer = await client.result(job)
            found = await client.job(job)
            jobs = await client.jobs()
            await client.cancel(job)
            return updates, answer, found, jobs

    updates, answer, job, jobs = asyncio.run(story())
    assert isinstance(updates[-1], Answer)
    assert same(updates[-1], answer)
    assert job in jobs
    assert job.status == "done"


def test_refusals_are_errors(url: str, scene: Scene) -> None:
    with Client(url) as client:
        with pytest.raises(ServerError, match="steps"):
            next(client.stream("depth", scene.image, steps=1000))
        with pytest.raises(ServerError, match="secret"):
            client.submit("depth", scene.image, webhook="https://example.org/")
        with pytest.raises(ServerError, match="404"):
            client.result("0" * 32)
        with pytest.raises(InvalidInput, match="id of a job"):
            client.job("../models")
        failed = client.submit("flow", scene.image, np.zeros((9, 9), np.uint8))
        with pytest.raises(ServerError, match="resize"):
            client.result(failed)


@pytest.mark.parametrize(
    ("options", "told", "media_type"),
    [
        ({"format": "png"}, "image/png", "image/png"),
        ({}, "application/json with its maps as PNG", "application/json"),
        ({"twice": "yes"}, r"several \(application/json\)", "application/json"),
    ],
    ids=["png", "png16", "several"],
)
def test_an_answer_of_another_format_is_told_and_kept(
    options: dict[str, str], told: str, media_type: str, url: str, scene: Scene, tmp_path: Path
) -> None:
    files = [("image", scene.image.read_bytes())] * (2 if options.pop("twice", None) else 1)
    left = httpx.post(f"{url}/depth", files=files, data=options, headers={"prefer": "respond-async"})
    identity = left.json()["id"]
    with (
        Client(url) as client,
        pytest.raises(OtherAnswer, match=f"answer is {told}: fetch it from {url}/jobs/{identity}/result") as found,
    ):
        client.result(identity)
    kept = httpx.get(f"{url}/jobs/{identity}/result")
    assert found.value.media_type == media_type == kept.headers["content-type"]
    assert found.value.data == kept.content
    other = command(url, "job", identity, "-o", "other.npy", folder=tmp_path)
    assert (other.returncode, other.stdout) == (1, "")
    assert f"/jobs/{identity}/result" in other.stderr
    name = f"kept.{media_type.removeprefix('image/').removeprefix('application/')}"
    assert command(url, "job", identity, "-o", name, folder=tmp_path).returncode == 0
    assert (tmp_path / name).read_bytes() == kept.content


def stream_of(*chunks: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(
        200, content="".join(chunks).encode(), headers={"content-type": "text/event-stream"}
    )


def test_events_of_later_versions_and_comments_are_passed_over() -> None:
    known = 'id: 3\nevent: progress\ndata: {"done": 1, "total": 2, "phase": "denoise"}\n\n'
    handler = stream_of(": still here\n\n", "id: 1\nevent: confetti\ndata: {}\n\n", known)
    with Client("http://saccade", transport=httpx.MockTransport(handler)) as client:
        updates = client.stream("depth", np.zeros((4, 4), np.uint8))
        assert next(updates) == Progress(1, 2, "denoise")
        with pytest.raises(BackendUnavailable, match="ended the stream"):
            next(updates)


@pytest.mark.parametrize("data", ["{", "[]", '{"steps": 1}'])
def test_what_is_no_event_of_ours(data: str) -> None:
    transport = httpx.MockTransport(stream_of(f"id: 1\nevent: accepted\ndata: {data}\n\n"))
    with Client("http://saccade", transport=transport) as client, pytest.raises(ServerError, match="of this version"):
        next(client.stream("depth", np.zeros((4, 4), np.uint8)))


def test_waiting_for_a_result_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.client.time.sleep", lambda _: None)
    transport = httpx.MockTransport(stream_of(": nothing\n\n"))
    with (
        Client("http://saccade", transport=transport, retries=Retries(2)) as client,
        pytest.raises(BackendUnavailable, match="ended the stream"),
    ):
        client.result("0" * 32)


def test_a_server_without_jobs_says_so(toy_repository: Path, scene: Scene) -> None:
    with serving(toy_repository) as server, Client(server.url) as client:
        with pytest.raises(ServerError, match="keeps no jobs"):
            client.submit("depth", scene.image)
        with pytest.raises(ServerError, match="keeps no jobs"):
            client.jobs()


def command(url: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SACCADE_")}
    return subprocess.run(
        [sys.executable, "-m", "saccade", *arguments, "--url", url],
        cwd=folder,
        env=kept | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )


def test_the_command(url: str, scene: Scene, tmp_path: Path) -> None:
    left = command(url, "depth", str(scene.image), "--later", "--seed", "4", folder=tmp_path)
    assert left.returncode == 0, left.stderr
    identity = left.stdout.strip()
    assert re.fullmatch("[0-9a-f]{32}", identity)
    fetched = command(url, "job", identity, "-o", "later.npy", folder=tmp_path)
    assert fetched.returncode == 0, fetched.stderr
    assert command(url, "depth", str(scene.image), "--seed", "4", "-o", "now.npy", folder=tmp_path).returncode == 0
    assert (tmp_path / "later.npy").read_bytes() == (tmp_path / "now.npy").read_bytes()
    listed = command(url, "jobs", folder=tmp_path)
    assert identity in listed.stdout
    assert command(url, "job", identity, "--cancel", folder=tmp_path).returncode == 0
    gone = command(url, "job", identity, folder=tmp_path)
    assert (gone.returncode, gone.stdout) == (2, "")
    assert "no such job" in gone.stderr
