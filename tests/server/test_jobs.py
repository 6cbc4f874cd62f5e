"""Jobs: answers for those who do not wait, the same to the byte, kept and bounded."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from saccade.backends import Backend
from saccade.errors import BackendUnavailable, SaccadeError
from saccade.tasks import TASKS
from server import events, keys
from server.jobs import place, replay, runner
from server.jobs.records import Asked, Result
from server.jobs.runner import Jobs
from server.jobs.store import Store
from server.settings import Settings
from tests.server.house import Failing, Gated, House, files, png, running, until
from tests.server.test_events import STREAM, parse, timeless
from tests.server.test_refusals import assert_problem

LATER = {"Prefer": "respond-async"}
T = TypeVar("T")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.sqlite"


def within(backend: Backend, file: Path, story: Callable[[House], Awaitable[T]], **settings: Any) -> T:
    async def told() -> T:
        async with running(backend, jobs_file=file, **settings) as house:
            return await story(house)

    return asyncio.run(told())


async def submit(
    house: House, task: str = "depth", headers: dict[str, str] | None = None, **options: Any
) -> httpx.Response:
    return await house.client.post(f"/{task}", files=files(task), params=options, headers=LATER | (headers or {}))


def jobs_of(house: House) -> Jobs:
    found: Jobs = house.client._transport.app.state.jobs  # type: ignore[attr-defined]
    return found


async def ended(house: House, path: str) -> httpx.Response:
    """The result, once there is one."""
    await house.client.get(f"{path}/events")
    return await house.client.get(f"{path}/result")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("options", [{}, {"format": "npy"}, {"format": "png", "render": "color"}])
def test_a_job_has_the_answer_of_those_who_wait(
    backend: Backend, file: Path, task: str, options: dict[str, str]
) -> None:
    async def story(house: House) -> tuple[httpx.Response, ...]:
        asked = {"steps": 3, "ensemble_size": 2, "seed": 7, **options}
        taken = await submit(house, task, **asked)
        return await house.ask(task, **asked), taken, await ended(house, taken.headers["location"])

    plain, taken, result = within(backend, file, story)
    assert (taken.status_code, taken.headers["preference-applied"]) == (202, "respond-async")
    job = taken.json()
    assert (job["status"], job["task"], job["links"]["self"]) == ("queued", task, taken.headers["location"])
    assert result.status_code == 200
    kept = {name for name in plain.headers if name.startswith("saccade-") or name in ("content-type", "vary")}
    assert {name: result.headers[name] for name in kept} == {name: plain.headers[name] for name in kept}
    assert set(result.headers) == set(plain.headers)
    if options:
        assert result.content == plain.content
    else:
        assert timeless(result.json()) == timeless(plain.json())


def test_a_jobs_life_as_its_document_tells_it(backend: Backend, file: Path) -> None:
    gate = Gated(backend)

    async def story(house: House) -> list[dict[str, Any]]:
        gate.shut()
        first, second = [(await submit(house, seed=seed)).headers["location"] for seed in range(2)]
        await until(lambda: gate.rows)
        unready = await house.client.get(f"{first}/result")
        assert_problem(unready, 409, "not-done")
        told = [(await house.client.get(path)).json() for path in (first, second)]
        gate.open()
        await ended(house, first)
        await ended(house, second)
        return [*told, (await house.client.get(first)).json()]

    runs, waits, done = within(gate, file, story, jobs_at_once=1)
    assert (runs["status"], waits["status"], done["status"]) == ("running", "queued", "done")
    assert (waits["started"], runs["finished"]) == (None, None)
    assert done["created"] <= done["started"] <= done["finished"]
    assert done["created"].endswith("+00:00")


def test_events_of_a_job_are_those_of_a_watched_request(backend: Backend, file: Path) -> None:
    gate = Gated(backend)

    async def story(house: House) -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        gate.shut()
        path = (await submit(house, steps=4, previews=2)).headers["location"]
        following = [asyncio.create_task(house.client.get(f"{path}/events")) for _ in range(2)]
        await until(lambda: gate.rows)
        gate.open()
        live, other = await asyncio.gather(*following)
        assert live.text == other.text
        late = await house.client.get(f"{path}/events")
        again = await house.client.get(f"{path}/events", headers={"Last-Event-ID": "40"})
        return live, late, again

    live, late, again = within(gate, file, story)
    names = [event.name for event in parse(live.text)]
    assert (names[0], names[-1]) == ("accepted", "answer")
    assert live.headers["content-type"].startswith(STREAM)
    assert [event.name for event in parse(late.text)] == ["answer"]
    assert parse(late.text)[0].data == parse(live.text)[-1].data
    assert [event.id for event in parse(again.text)] == [41], "a reader that reconnects is not told twice"


def test_what_can_be_refused_at_once_is(backend: Backend, file: Path) -> None:
    async def story(house: House) -> list[httpx.Response]:
        refused = [await submit(house, steps=0), await submit(house, colour="red")]
        refused.append(await house.client.post("/depth", files={"image": b"no picture"}, headers=LATER))
        refused.append(await house.client.post("/depth", content=b"{", headers={**LATER, "content-type": "text/plain"}))
        refused.append(await submit(house, webhook="https://example.org/"))
        refused.append(await house.ask("depth", webhook="https://example.org/"))
        assert (await house.client.get("/jobs")).json() == {"jobs": [], "cursor": None}
        return refused

    steps, name, picture, body, hook, waits = within(backend, file, story)
    assert_problem(steps, 422, "invalid-input", "steps")
    assert_problem(name, 422, "invalid-input", "colour")
    assert_problem(picture, 415, "unsupported-media-type", "image")
    assert_problem(body, 415, "unsupported-media-type")
    assert "secret" in assert_problem(hook, 422, "invalid-input", "webhook")["detail"]
    assert "Prefer" in assert_problem(waits, 422, "invalid-input", "webhook")["detail"]


def test_what_fails_later_is_the_problem_of_those_who_wait(backend: Backend, file: Path) -> None:
    async def story(house: House) -> tuple[httpx.Response, dict[str, Any]]:
        sizes = files("flow", next_image=png(30, 30))
        path = (await house.client.post("/flow", files=sizes, headers=LATER)).headers["location"]
        return await ended(house, path), (await house.client.get(path)).json()

    result, job = within(backend, file, story)
    problem = assert_problem(result, 422, "invalid-input", "next_image")
    assert (job["status"], job["problem"]) == ("failed", problem)


def test_a_job_waits_for_a_model_that_is_away(backend: Backend, file: Path) -> None:
    failing = Failing(backend)

    async def story(house: House) -> httpx.Response:
        failing.error = BackendUnavailable("gone for lunch", retry_after_s=0.1)
        path = (await submit(house)).headers["location"]
        await until(lambda: house.service.admission.rate.seconds > 1)
        failing.error = None
        return await ended(house, path)

    assert within(failing, file, story).status_code == 200


def test_a_full_queue_delays_jobs_and_refuses_none(backend: Backend, file: Path) -> None:
    gate = Gated(backend)

    async def story(house: House) -> httpx.Response:
        gate.shut()
        waiting = asyncio.create_task(house.ask("depth", steps=100))
        await until(lambda: gate.rows)
        path = (await submit(house, steps=100)).headers["location"]
        gate.open()
        assert (await waiting).status_code == 200
        return await ended(house, path)

    assert within(gate, file, story, queue_limit=8).status_code == 200


@pytest.mark.parametrize("which", ["running", "queued"])
def test_cancelling(backend: Backend, file: Path, which: str) -> None:
    gate = Gated(backend)

    async def story(house: House) -> None:
        gate.shut()
        first, second = [(await submit(house, seed=seed)).headers["location"] for seed in range(2)]
        await until(lambda: gate.rows)
        path, other = (first, second) if which == "running" else (second, first)
        following = asyncio.create_task(house.client.get(f"{path}/events"))
        await asyncio.sleep(0)
        told = await house.client.delete(path)
        assert (told.status_code, told.json()["status"]) == (200, "cancelled")
        last = parse((await following).text)[-1]
        assert (last.name, last.data["status"]) == ("problem", 410)
        assert_problem(await house.client.get(f"{path}/result"), 410, "gone")
        gate.open()
        assert (await ended(house, other)).status_code == 200
        assert (await house.client.get(path)).json()["status"] == "cancelled"
        assert (house.model.stepping.waiting, house.service.admission.requests) == (0, 0)

    within(gate, file, story, jobs_at_once=1)


def test_forgetting(backend: Backend, file: Path) -> None:
    async def story(house: House) -> list[httpx.Response]:
        path = (await submit(house)).headers["location"]
        await ended(house, path)
        deleted = await house.client.delete(path)
        assert (deleted.status_code, deleted.content) == (204, b"")
        return [await house.client.get(path + end) for end in ("", "/result", "/events")]

    for response in within(backend, file, story):
        assert_problem(response, 404, "not-found")


def test_the_same_key_is_the_same_job(backend: Backend, file: Path) -> None:
    async def story(house: House) -> tuple[list[httpx.Response], list[httpx.Response]]:
        key = {"Idempotency-Key": "a-1"}
        same = await asyncio.gather(*(submit(house, headers=key, seed=1) for _ in range(5)))
        await ended(house, same[0].headers["location"])
        same.append(await submit(house, headers=key, seed=1))
        others = [await submit(house, headers=key, seed=2), await submit(house, headers={"Idempotency-Key": "a b"})]
        others.append(await submit(house, headers={"Idempotency-Key": "b"}, seed=1))
        assert len((await house.client.get("/jobs")).json()["jobs"]) == 2
        return same, others

    same, (changed, bad, fresh) = within(backend, file, story)
    assert len({response.headers["location"] for response in same}) == 1
    assert [response.status_code for response in same] == [202] * 6
    assert same[-1].json()["status"] == "done"
    assert_problem(changed, 422, "idempotency-key-reused", "Idempotency-Key")
    assert_problem(bad, 422, "invalid-input", "Idempotency-Key")
    assert fresh.headers["location"] != same[0].headers["location"]


def test_the_list_is_in_pages_newest_first(backend: Backend, file: Path) -> None:
    async def story(house: House) -> tuple[list[str], list[str], list[httpx.Response]]:
        made = [(await submit(house, seed=seed)).json()["id"] for seed in range(5)]
        pages, query = [], {"limit": "2"}
        while query:
            page = (await house.client.get("/jobs", params=query)).json()
            pages.append([job["id"] for job in page["jobs"]])
            query = {"limit": "2", "cursor": page["cursor"]} if page["cursor"] else {}
        assert [len(page) for page in pages] == [2, 2, 1]
        bad = [
            await house.client.get("/jobs", params=each) for each in ({"limit": "0"}, {"limit": "x"}, {"cursor": "-"})
        ]
        return made, [one for page in pages for one in page], bad

    made, listed, bad = within(backend, file, story)
    assert listed == made[::-1]
    for response, param in zip(bad, ("limit", "limit", "cursor"), strict=True):
        assert_problem(response, 422, "invalid-input", param)


def test_number_and_bytes_are_bounded(backend: Backend, file: Path) -> None:
    gate = Gated(backend)

    async def story(house: House) -> None:
        gate.shut()
        paths = [(await submit(house, seed=seed)).headers["location"] for seed in range(3)]
        refused = await submit(house)
        assert_problem(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await submit(house, headers={"Idempotency-Key": "x"})).status_code == 429
        gate.open()
        for path in paths:
            assert (await ended(house, path)).status_code == 200
        await house.client.delete(paths[0])
        assert (await submit(house)).status_code == 202

    within(gate, file, story, jobs_limit=3)


def test_too_many_bytes_are_refused(backend: Backend, file: Path) -> None:
    gate = Gated(backend)

    async def story(house: House) -> list[int]:
        gate.shut()
        noise = {"image": png() + bytes(400_000)}
        return [(await house.client.post("/depth", files=noise, headers=LATER)).status_code for _ in range(4)]

    assert within(gate, file, story, jobs_max_bytes=2**20) == [202, 202, 429, 429]


def test_results_expire(backend: Backend, file: Path) -> None:
    async def story(house: House) -> tuple[httpx.Response, httpx.Response]:
        path = (await submit(house)).headers["location"]
        await ended(house, path)
        jobs: Any = house.client._transport.app.state.jobs  # type: ignore[attr-defined]
        real = jobs._store.clock
        jobs._store.clock = lambda: real() + 101
        await jobs._do(lambda store: store.expire())
        gone, still = await house.client.get(f"{path}/result"), await house.client.get(path)
        jobs._store.clock = lambda: real() + 201
        await jobs._do(lambda store: store.expire())
        assert_problem(await house.client.get(path), 404, "not-found")
        return gone, still

    gone, still = within(backend, file, story, jobs_keep_s=100)
    assert_problem(gone, 410, "gone")
    assert still.json()["status"] == "done"


def test_previews_nobody_looks_at_cost_nothing(backend: Backend, file: Path) -> None:
    async def story(house: House) -> float:
        before = await house.counters()
        path = (await submit(house, steps=4, previews=4)).headers["location"]
        while (await house.client.get(path)).json()["status"] != "done":
            await asyncio.sleep(0.01)
        decoded = 'saccade_rows_total{kind="decode"}'
        return (await house.counters())[decoded] - before[decoded]

    assert within(backend, file, story) == 1


def test_what_one_server_leaves_the_next_one_does(
    backend: Backend, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="server.jobs.runner")
    gate = Gated(backend)
    paths: list[str] = []

    async def first(house: House) -> None:
        paths.append((await submit(house, seed=0, format="npy")).headers["location"])
        await ended(house, paths[0])
        gate.shut()
        paths.extend([(await submit(house, seed=seed, format="npy")).headers["location"] for seed in (1, 2, 3)])
        await until(lambda: gate.rows)

    async def second(house: House) -> list[bytes]:
        results = [await ended(house, path) for path in paths]
        assert (await house.counters())['saccade_jobs_finished_total{status="done",task="depth"}'] == 3
        return [result.content for result in results] + [
            (await house.ask("depth", seed=seed, format="npy")).content for seed in range(4)
        ]

    within(gate, file, first)
    found = within(backend, file, second)
    assert found[:4] == found[4:]
    assert "3 jobs go on (3 queued)" in caplog.text


def test_a_job_that_ends_the_server_again_and_again_is_given_up(backend: Backend, file: Path) -> None:
    gate = Gated(backend)
    paths: list[str] = []

    async def begin(house: House) -> None:
        gate.shut()
        paths.append((await submit(house)).headers["location"])
        await until(lambda: gate.rows)

    async def after(house: House) -> httpx.Response:
        return await ended(house, paths[0])

    within(gate, file, begin)
    with sqlite3.connect(file) as store:
        store.execute("UPDATE jobs SET status = 'running', attempts = 5")
    store.close()
    assert_problem(within(backend, file, after), 500, "interrupted")


def test_a_file_belongs_to_one_server(backend: Backend, file: Path) -> None:
    async def story(_: House) -> None:
        with pytest.raises(SaccadeError, match="another server has it open"):
            place.opened(Settings.load(jobs_file=file))

    within(backend, file, story)
    assert file.stat().st_mode & 0o77 == 0, "pictures of others"


def test_where_jobs_are_kept_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    store = place.opened(Settings.load(port=8123))
    assert store is not None
    store.close()
    assert (tmp_path / "saccade" / "jobs-8123.sqlite").is_file()
    assert place.opened(Settings.load(port=0)) is None
    assert place.opened(Settings.load(jobs_file="off")) is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert place.opened(Settings.load()) is None, "a default that cannot be had is done without"
    with pytest.raises(SaccadeError, match="cannot be kept"):
        place.opened(Settings.load(jobs_file=tmp_path / "file" / "jobs.sqlite"))


def test_one_owner_does_not_stand_in_anothers_way(file: Path) -> None:
    store = place.opened(Settings.load(jobs_file=file))
    assert store is not None
    asked = Asked("depth", b"", "image/png", "", b"body", "")
    for owner in ("ann", "ann", "ann", "bob"):
        store.add(owner, asked, None, None)
    claimed = [store.claim() for _ in range(5)]
    assert [None if found is None else found[0].owner for found in claimed] == ["ann", "bob", "ann", "ann", None]
    store.close()


def test_the_same_request_in_another_wrapping_is_the_same() -> None:
    def sent(boundary: str, seed: int = 1) -> str:
        request = httpx.Request(
            "POST",
            "http://saccade/",
            files=files("depth"),
            data={"seed": str(seed)},
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        kind = request.headers["content-type"]
        return Asked("depth", b"", kind, "", request.read(), "").fingerprint()

    assert sent("a" * 20) == sent("b" * 30)
    assert sent("a" * 20) != sent("a" * 20, seed=2)


def test_a_server_without_jobs_answers_at_once(backend: Backend) -> None:
    async def story() -> tuple[httpx.Response, httpx.Response]:
        async with running(backend) as house:
            return await submit(house), await house.client.get("/jobs")

    answer, jobs = asyncio.run(story())
    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers
    assert json.loads(answer.content)["task"] == "depth"
    assert_problem(jobs, 404, "not-found")


def test_a_job_belongs_to_its_key(backend: Backend, file: Path, tmp_path: Path) -> None:
    known = {name: keys.new() for name in ("ann", "bob")}
    ring = tmp_path / "keys.toml"
    for name, key in known.items():
        keys.add(ring, keys.entry(name, key, None, None, 10))
    ann, bob = ({"X-API-Key": key} for key in known.values())

    async def story(house: House) -> list[httpx.Response]:
        taken = await submit(house, headers=ann | {"Idempotency-Key": "1"})
        path = taken.headers["location"]
        await house.client.get(f"{path}/events", headers=ann)
        assert (await house.client.get(f"{path}/result", headers=ann)).status_code == 200
        assert (await submit(house, headers=bob | {"Idempotency-Key": "1"})).headers["location"] != path
        assert path not in (await house.client.get("/jobs", headers=bob)).text
        assert path in (await house.client.get("/jobs", headers=ann)).text
        strange = [await house.client.get(path + end, headers=bob) for end in ("", "/result", "/events")]
        return [*strange, await house.client.delete(path, headers=bob)]

    for response in within(backend, file, story, keys_file=ring):
        assert_problem(response, 404, "not-found")


def test_a_follower_who_leaves_is_noticed(backend: Backend, file: Path) -> None:
    gate = Gated(backend)

    async def story(house: House) -> None:
        gate.shut()
        path = (await submit(house)).headers["location"]
        await until(lambda: gate.rows)
        gone, heard = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            heard.set()

        scope = {"type": "http", "method": "GET", "path": f"{path}/events", "query_string": b"", "headers": []}
        app: Any = house.client._transport.app  # type: ignore[attr-defined]
        following = asyncio.create_task(app(scope | {"raw_path": path.encode()}, receive, send))
        await heard.wait()
        told = jobs_of(house)._live[path.removeprefix("/jobs/")]
        assert told.followers == 1
        gone.set()
        await asyncio.wait_for(following, 5)
        assert told.followers == 0
        gate.open()
        assert (await ended(house, path)).status_code == 200

    within(gate, file, story)


def test_a_fault_of_ours_ends_no_worker(backend: Backend, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [RuntimeError("nobody foresaw this")] * 3
    real = Store.claim

    def claim(store: Store) -> Any:
        if faults:
            raise faults.pop()
        return real(store)

    monkeypatch.setattr(runner, "AGAIN_S", 0.01)
    monkeypatch.setattr(Store, "claim", claim)

    async def story(house: House) -> httpx.Response:
        return await ended(house, (await submit(house)).headers["location"])

    assert within(backend, file, story, jobs_at_once=1).status_code == 200


def test_a_job_that_cannot_be_begun_fails(backend: Backend, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def request(asked: Asked, owner: str, weight: float) -> None:
        raise RuntimeError("nobody foresaw this")

    async def story(house: House) -> httpx.Response:
        with monkeypatch.context() as patch:
            patch.setattr(replay, "request", request)
            failed = await ended(house, (await submit(house)).headers["location"])
        assert (await ended(house, (await submit(house)).headers["location"])).status_code == 200
        return failed

    assert_problem(within(backend, file, story, jobs_at_once=1), 500, "internal")


def test_answers_are_put_into_words_for_followers_only(
    backend: Backend, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    words = events.outcome

    def outcome(status: int, headers: dict[str, str], body: bytes) -> tuple[events.Name, str]:
        threads.append(threading.current_thread())
        return words(status, headers, body)

    monkeypatch.setattr(events, "outcome", outcome)
    monkeypatch.setattr(events, "SMALL_BYTES", 0)
    gate = Gated(backend)

    async def story(house: House) -> tuple[str, str]:
        path = (await submit(house)).headers["location"]
        while (await house.client.get(path)).json()["status"] != "done":
            await asyncio.sleep(0.01)
        assert not threads
        late = await house.client.get(f"{path}/events")
        gate.shut()
        path = (await submit(house)).headers["location"]
        await until(lambda: gate.rows)
        following = asyncio.create_task(house.client.get(f"{path}/events"))
        await until(lambda: jobs_of(house)._live[path.removeprefix("/jobs/")].followers)
        gate.open()
        return late.text, (await following).text

    for text in within(gate, file, story):
        assert parse(text)[-1].name == "answer"
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_the_head_of_a_result_has_no_body(backend: Backend, file: Path) -> None:
    async def story(house: House) -> tuple[httpx.Response, httpx.Response]:
        path = (await submit(house)).headers["location"]
        return await ended(house, path), await house.client.head(f"{path}/result")

    whole, head = within(backend, file, story)
    assert (head.status_code, head.content) == (200, b"")
    assert {name: value for name, value in head.headers.items() if name != "x-request-id"} == {
        name: value for name, value in whole.headers.items() if name != "x-request-id"
    }


def test_a_job_does_not_wait_for_ever(backend: Backend, file: Path) -> None:
    failing = Failing(backend)

    async def story(house: House) -> httpx.Response:
        failing.error = BackendUnavailable("gone for good", retry_after_s=0.1)
        path = (await submit(house)).headers["location"]
        await until(lambda: house.service.admission.rate.seconds > 1)
        store: Any = jobs_of(house)._store
        real = store.clock
        store.clock = lambda: real() + 101
        return await ended(house, path)

    assert_problem(within(failing, file, story, jobs_keep_s=100), 503, "unavailable")


@pytest.mark.parametrize("which", ["queued", "put back"])
def test_nobody_follows_a_job_that_a_leaving_server_will_not_run(
    backend: Backend, file: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(backend)
    gate = Gated(failing)
    monkeypatch.setattr(runner, "LOOK_S", 60.0)

    async def story(house: House) -> str:
        gate.shut()
        first, second = [(await submit(house, seed=seed)).headers["location"] for seed in range(2)]
        await until(lambda: gate.rows)
        following = asyncio.create_task(house.client.get(f"{first}/events"))
        await until(lambda: jobs_of(house)._live[first.removeprefix("/jobs/")].followers)
        failing.error = BackendUnavailable("gone", retry_after_s=60)
        house.service.drain.begin()
        if which == "queued":
            text = (await house.client.get(f"{second}/events")).text
            assert not following.done()
            following.cancel()
            return text
        gate.open()
        text = (await following).text
        assert (await house.client.get(f"{first}/events")).text == text, "nor whoever comes again"
        return text

    names = [event.name for event in parse(within(gate, file, story, jobs_at_once=1))]
    assert "answer" not in names
    assert "problem" not in names


def test_room_is_given_back_to_the_disk(file: Path) -> None:
    store = place.opened(Settings.load(jobs_file=file))
    assert store is not None
    made, _ = store.add("", Asked("depth", b"", "image/png", "", b"body", ""), None, None)
    store.claim()
    store.finish(made.number, Result(200, {}, bytes(4_000_000)))
    store.forget(made.id)
    before = store._value("PRAGMA freelist_count")
    store.expire()
    assert before > 900
    assert store._value("PRAGMA freelist_count") == 0
    store.close()


@pytest.mark.parametrize("path", ["/jobs/nothing", "/jobs/" + "0" * 32, "/jobs/" + "0" * 32 + "/result"])
def test_unknown_jobs(backend: Backend, file: Path, path: str) -> None:
    async def story(house: House) -> list[httpx.Response]:
        return [await house.client.get(path), await house.client.delete(path.removesuffix("/result"))]

    for response in within(backend, file, story):
        assert_problem(response, 404, "not-found")
