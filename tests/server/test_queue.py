"""Admission by work, clients that leave, requests that take too long, and readiness under all that."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from saccade.backends import Backend
from saccade.errors import ModelError
from server.admission import Admission, Overloaded, work
from server.service import ClientGone, while_connected
from tests.server.house import Clock, Failing, Gated, House, files, running, until
from tests.server.test_refusals import assert_problem


def test_work_counts_steps_members_and_pixels(backend: Backend) -> None:
    from saccade.pipeline import Options

    def units(size: tuple[int, int] = (256, 256), **options: int) -> float:
        resolved = Options(**{"processing_resolution": 256, **options}).resolve(backend.card, "depth")
        return work(backend.card, "depth", resolved, [size])

    few, many = units(steps=1, ensemble_size=1), units(steps=50, ensemble_size=10)
    assert many - few == pytest.approx(50 * 10 - 1 + 9)
    assert units(processing_resolution=512) > 3.9 * (units() - 1)
    assert units((4000, 5000), steps=1) - units((400, 500), steps=1) == pytest.approx(4 * 19.8, rel=0.01)


def test_admission_releases_exactly_once_whatever_happens() -> None:
    admission = Admission(100)
    with admission.admit(60):
        with pytest.raises(Overloaded), admission.admit(60):
            pass
        with pytest.raises(KeyError), admission.admit(40):
            raise KeyError
        with admission.admit(40):
            assert (admission.pending, admission.requests) == (100, 2)
        assert (admission.pending, admission.requests) == (60, 1)
    assert (admission.pending, admission.requests) == (0, 0)


def test_a_request_alone_is_always_admitted() -> None:
    admission = Admission(100)
    with admission.admit(1e6), pytest.raises(Overloaded), admission.admit(1):
        pass
    with admission.admit(1e6):
        pass


def test_retry_after_follows_the_measured_rate() -> None:
    def wait_after(rate: float) -> float:
        clock = Clock()
        admission = Admission(1000, clock)
        for _ in range(20):
            with admission.admit(10 * rate):
                clock.now += 10
        with admission.admit(1000), pytest.raises(Overloaded) as refused, admission.admit(500):
            pass
        return refused.value.retry_after_s

    assert wait_after(50) == pytest.approx(10, rel=0.1)
    assert wait_after(5) == pytest.approx(100, rel=0.1)


def test_full_queue_is_429_and_recovers(backend: Backend) -> None:
    async def story() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        gate = Gated(backend)
        async with running(gate, queue_limit=8) as house:
            gate.shut()
            first = asyncio.create_task(house.ask("depth", steps=100))
            await until(lambda: gate.rows)
            refused = [await house.ask("depth", steps=100) for _ in range(3)]
            gate.open()
            answered = await first
            assert (house.service.admission.pending, house.service.admission.requests) == (0, 0)
            counters = await house.counters()
            assert counters['saccade_rejected_total{task="depth"}'] == 3
            assert counters['saccade_requests_total{status="429",task="depth"}'] == 3
            return refused, answered, await house.ask("depth", steps=100)

    refused, first, later = asyncio.run(story())
    for response in refused:
        assert_problem(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
    assert (first.status_code, later.status_code) == (200, 200)


def test_a_budget_that_the_backlog_makes_impossible_is_429_and_an_idle_server_takes_it(backend: Backend) -> None:
    async def story() -> tuple[list[httpx.Response], httpx.Response]:
        gate = Gated(backend)
        async with running(gate) as house:
            gate.shut()
            first = asyncio.create_task(house.ask("depth", steps=3, ensemble_size=2, budget_ms=20_000))
            await until(lambda: gate.rows)
            for _ in range(9):
                house.model.stepping.pace.saw("denoise", 64 * 64, 30.0)
            refused = [await house.ask("depth", budget_ms=budget_ms) for budget_ms in (1, 21_000)]
            assert (await house.counters())["saccade_backlog_seconds"] > 0
            gate.open()
            assert (await first).status_code == 200
            assert (await house.counters())["saccade_backlog_seconds"] == 0
            return refused, await house.ask("depth", budget_ms=21_000)

    refused, idle = asyncio.run(story())
    for response in refused:
        assert_problem(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
    assert idle.status_code == 200


def test_a_client_that_leaves_takes_its_work_along() -> None:
    async def story() -> None:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        with pytest.raises(ClientGone):
            await while_connected(receive, work())
        assert ended.is_set()

    asyncio.run(story())


def test_leaving_frees_queue_and_steps(backend: Backend) -> None:
    async def story() -> tuple[int, dict[str, float]]:
        gate = Gated(backend)
        async with running(gate, batch_size=4) as house:
            gate.shut()
            app = house.client._transport.app  # type: ignore[attr-defined]
            request = httpx.Request("POST", "http://saccade/depth?steps=50&ensemble_size=10", files=files("depth"))
            messages = [{"type": "http.request", "body": request.read(), "more_body": False}]
            leave = asyncio.Event()

            async def receive() -> dict[str, object]:
                if messages:
                    return messages.pop()
                await leave.wait()
                return {"type": "http.disconnect"}

            async def send(message: object) -> None:
                return None

            scope = {
                "type": "http",
                "http_version": "1.1",
                "method": "POST",
                "path": "/depth",
                "scheme": "http",
                "query_string": request.url.query,
                "headers": [(name.lower(), value) for name, value in request.headers.raw],
            }
            serving = asyncio.create_task(app(scope, receive, send))
            await until(lambda: gate.rows)
            leave.set()
            await serving
            assert (house.model.stepping.waiting, house.service.admission.requests) == (0, 0)
            gate.open()
            assert (await house.ask("flow", steps=1)).status_code == 200
            return gate.rows, await house.counters()

    rows, counters = asyncio.run(story())
    assert rows == 4 + 4, "the batch that ran when the client left, and the one step of the request that came after"
    assert counters['saccade_cancelled_total{reason="disconnect",task="depth"}'] == 1
    assert counters["saccade_pending_work"] == counters["saccade_queue_rows"] == 0


def test_too_slow_is_503_and_withdrawn(backend: Backend) -> None:
    async def story() -> httpx.Response:
        gate = Gated(backend)
        async with running(gate, request_timeout_s=0.3) as house:
            gate.shut()
            late = await house.ask("depth")
            assert house.service.admission.requests == house.model.stepping.waiting == 0
            gate.open()
            assert (await house.ask("depth")).status_code == 200
            return late

    late = asyncio.run(story())
    assert_problem(late, 503, "timeout")
    assert int(late.headers["retry-after"]) >= 1


def test_slow_upload_is_408(backend: Backend) -> None:
    async def dribble():  # type: ignore[no-untyped-def]
        yield b"{"
        await asyncio.sleep(30)

    async def story() -> httpx.Response:
        async with running(backend, request_timeout_s=0.1) as house:
            headers = {"Content-Type": "application/json"}
            return await house.client.post("/depth", content=dribble(), headers=headers)

    assert_problem(asyncio.run(story()), 408, "upload-timeout")


def outdate(house: House) -> None:
    """What readiness knows from the start is older than any time to live from now on."""
    house.model.readiness.clock = lambda: time.monotonic() + 1e6


def test_readiness_is_an_inference_kept_for_a_while(backend: Backend) -> None:
    async def story() -> None:
        gate = Gated(backend)
        async with running(gate, readiness_ttl_s=1000) as house:
            outdate(house)
            gate.shut()
            asking = [asyncio.create_task(house.client.get("/readyz")) for _ in range(5)]
            await until(lambda: gate.rows)
            gate.open()
            answers = await asyncio.gather(*asking)
            again = await house.client.get("/readyz")
            assert {answer.status_code for answer in [*answers, again]} == {200}
            assert gate.rows == 1, "concurrent and later checks share one probe"

    asyncio.run(story())


def test_readiness_fails_with_the_model_and_comes_back(backend: Backend) -> None:
    async def story() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        failing = Failing(backend)
        async with running(failing, readiness_ttl_s=0) as house:
            failing.error = ModelError("NaN in secret place")
            unready = await house.client.get("/readyz")
            alive = await house.client.get("/livez")
            failing.error = None
            return unready, alive, await house.client.get("/readyz")

    unready, alive, ready = asyncio.run(story())
    assert "secret" not in unready.text
    assert_problem(unready, 503, "unavailable")
    assert (alive.status_code, ready.status_code) == (200, 200)


def test_real_work_proves_readiness(backend: Backend) -> None:
    async def story() -> int:
        gate = Gated(backend)
        async with running(gate, readiness_ttl_s=1000) as house:
            await house.ask("depth", steps=2)
            before = gate.rows
            assert (await house.client.get("/readyz")).status_code == 200
            return gate.rows - before

    assert asyncio.run(story()) == 0, "no probe stands in the queue behind real work"


def test_a_stuck_backend_is_not_ready(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> httpx.Response:
        gate = Gated(backend)
        async with running(gate, readiness_ttl_s=0) as house:
            monkeypatch.setattr("server.health.PROBE_TIMEOUT_S", 0.5)
            gate.shut()
            unready = await house.client.get("/readyz")
            gate.open()
            return unready

    assert_problem(asyncio.run(story()), 503, "unavailable")


def test_a_probe_that_waits_behind_work_that_succeeds_is_no_fault(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> int:
        gate = Gated(backend)
        async with running(gate, readiness_ttl_s=1000) as house:
            outdate(house)
            monkeypatch.setattr("server.health.PROBE_TIMEOUT_S", 0.5)
            gate.shut()
            asking = asyncio.create_task(house.client.get("/readyz"))
            await until(lambda: gate.rows)
            house.model.readiness.prove()
            answer = await asking
            gate.open()
            return answer.status_code

    assert asyncio.run(story()) == 200


def test_whatever_fails_a_probe_is_not_ready(backend: Backend) -> None:
    async def story() -> httpx.Response:
        failing = Failing(backend)
        async with running(failing, readiness_ttl_s=0) as house:
            failing.error = KeyError("nobody foresaw this")
            return await house.client.get("/readyz")

    assert_problem(asyncio.run(story()), 503, "unavailable")


def test_metrics_follow_the_work(backend: Backend) -> None:
    async def story() -> tuple[dict[str, float], dict[str, float]]:
        async with running(backend, batch_size=4) as house:
            before = await house.counters()
            await asyncio.gather(*(house.ask("depth", steps=5, seed=seed) for seed in range(4)))
            await house.ask("flow", steps=0)
            return before, await house.counters()

    before, counters = asyncio.run(story())
    assert counters['saccade_requests_total{status="200",task="depth"}'] == 4
    assert counters['saccade_requests_total{status="422",task="flow"}'] == 1
    assert counters['saccade_rows_total{kind="denoise"}'] - before['saccade_rows_total{kind="denoise"}'] == 20
    batches = 'saccade_batch_rows_count{kind="denoise"}'
    assert counters[batches] - before[batches] <= 20
    assert counters['saccade_phase_seconds_count{phase="denoise",task="depth"}'] == 4
    assert counters["saccade_pending_requests"] == counters["saccade_running_rows"] == 0
    assert counters["saccade_work_rate"] > 0


def test_nothing_leaks_when_many_leave_at_any_moment(backend: Backend) -> None:
    async def story() -> dict[str, float]:
        async with running(backend, batch_size=2) as house:
            asking = [asyncio.create_task(house.ask("depth", steps=50, ensemble_size=3, seed=n)) for n in range(30)]
            for number, task in enumerate(asking):
                await asyncio.sleep(0.01 * (number % 3))
                if number % 5:
                    task.cancel()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert sum(isinstance(answer, httpx.Response) and answer.status_code == 200 for answer in answers) >= 6
            await until(lambda: house.model.stepping.running == 0)
            return await house.counters()

    counters = asyncio.run(story())
    for gauge in ("pending_work", "pending_requests", "queue_rows", "running_rows"):
        assert counters[f"saccade_{gauge}"] == 0
