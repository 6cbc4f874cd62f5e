"""Budgets over HTTP: what was chosen is told, what the time cut off is marked, and nobody goes away with nothing."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.tasks import TASKS
from tests.server.house import Gated, House, Wrapped, files, png, running
from tests.server.test_events import STREAM, parse
from tests.server.test_refusals import assert_problem

HOUR_MS = 600_000
ASYNC = {"Prefer": "respond-async"}


def ask(backend: Backend, task: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with running(backend) as house:
            return await house.ask(task, **options)

    return asyncio.run(once())


async def cut_short(house: House, gated: Gated, task: str, accept: str | None = None, **options: Any) -> httpx.Response:
    """Answered by a model that does not move until the budget of 30 ms is over."""
    gated.shut()
    asking = asyncio.create_task(house.ask(task, accept, budget_ms=30, steps=5, ensemble_size=3, **options))
    while not gated.rows:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    gated.open()
    return await asking


@pytest.mark.parametrize("task", TASKS)
def test_a_quality_is_the_steps_and_members_that_it_stands_for(backend: Backend, task: str) -> None:
    """The toy has no curve: `balanced` are its defaults."""
    found = ask(backend, task, quality="balanced")
    assert found.status_code == 200, found.text
    assert found.json()["prediction"] == ask(backend, task).json()["prediction"]
    plan = found.json()["plan"]
    assert (plan["complete"], plan["budget_ms"], plan["steps_taken"]) == (True, None, plan["steps"])
    assert "balanced" in plan["why"]


def test_what_nobody_asked_for_is_not_told(backend: Backend) -> None:
    found = ask(backend, "depth")
    assert "plan" not in found.json()
    assert "saccade-plan" not in found.headers
    assert found.headers["saccade-complete"] == "true"
    assert set(found.json()["options"]) & {"budget_ms", "quality", "target_uncertainty"} == set()


@pytest.mark.parametrize("task", TASKS)
def test_a_budget_that_is_ample_buys_the_most(backend: Backend, task: str) -> None:
    found = ask(backend, task, budget_ms=HOUR_MS)
    assert found.headers["saccade-complete"] == "true"
    assert found.headers["saccade-ensemble-size"] == "10"
    assert "complete=?1" in found.headers["saccade-plan"]
    plan = found.json()["plan"]
    assert (plan["budget_ms"], plan["ensemble_size"], plan["members"]) == (HOUR_MS, 10, 10)
    assert 0 < plan["predicted_ms"] < HOUR_MS


@pytest.mark.parametrize("task", TASKS)
def test_the_best_so_far_comes_when_the_time_is_up(backend: Backend, task: str) -> None:
    async def story() -> None:
        gated = Gated(backend)
        async with running(gated, answer_cache_bytes=2**20) as house:
            least = await house.ask(task, steps=1, ensemble_size=1, format="npy")
            found = await cut_short(house, gated, task, format="npy")
            assert found.status_code == 200, found.text
            assert found.headers["saccade-complete"] == "false"
            assert "steps_taken=1" in found.headers["saccade-plan"]
            assert "etag" not in found.headers
            assert found.content == least.content
            told = (await cut_short(house, gated, task)).json()["plan"]
            assert (told["complete"], told["members"], told["steps_taken"], told["steps"]) == (False, 1, 1, 5)
            assert (house.model.stepping.waiting, house.service.admission.requests) == (0, 0)
            assert (await house.counters())['saccade_budgets_total{outcome="late"}'] == 2

    asyncio.run(story())


def test_watchers_and_their_answer(backend: Backend) -> None:
    async def story() -> None:
        gated = Gated(backend)
        async with running(gated) as house:
            whole = parse((await house.ask("depth", STREAM, budget_ms=HOUR_MS)).text)
            assert whole[0].data["ensemble_size"] == whole[-1].data["plan"]["ensemble_size"] == 10
            cut = parse((await cut_short(house, gated, "depth", STREAM)).text)
            assert [cut[0].name, cut[-1].name] == ["accepted", "answer"]
            assert cut[-1].data["plan"]["complete"] is False

    asyncio.run(story())


def test_jobs_have_budgets_too(backend: Backend, tmp_path: Any) -> None:
    async def story() -> None:
        async with running(backend, jobs_file=tmp_path / "jobs.sqlite") as house:
            options = {"budget_ms": 200_000, "format": "npy"}
            taken = await house.client.post("/depth", files=files("depth"), params=options, headers=ASYNC)
            job = taken.json()
            while (await house.client.get(job["links"]["self"])).json()["status"] != "done":
                await asyncio.sleep(0.01)
            result = await house.client.get(job["links"]["result"])
            assert result.headers["saccade-complete"] == "true"
            assert "budget_ms=200000" in result.headers["saccade-plan"]

    asyncio.run(story())


def test_every_picture_of_several_has_its_share(backend: Backend) -> None:
    async def story() -> None:
        gated = Gated(backend)
        async with running(gated) as house:
            pictures = [("image", (f"{seed}.png", png(seed=seed))) for seed in range(3)]
            gated.shut()
            params = {"budget_ms": 30, "steps": 3, "ensemble_size": 2}
            asking = asyncio.create_task(house.client.post("/depth", files=pictures, params=params))
            await asyncio.sleep(0.1)
            gated.open()
            found = await asking
            assert found.headers["saccade-complete"] == "false"
            answers = found.json()["answers"]
            assert [answer["plan"]["members"] for answer in answers] == [1, 1, 1]

    asyncio.run(story())


def test_a_target_is_met_and_told(backend: Backend) -> None:
    loose = ask(backend, "flow", target_uncertainty=1e6).json()
    assert (loose["plan"]["members"], loose["plan"]["complete"]) == (2, True)
    assert loose["plan"]["uncertainty"] > 0
    assert loose["options"]["ensemble_size"] == 2
    assert loose["prediction"] == ask(backend, "flow", ensemble_size=2).json()["prediction"]


def test_a_budget_beyond_the_time_limit_ends_before_it(backend: Backend) -> None:
    """Whoever would wait for ten minutes gets what there is within the server's patience, and not a 503."""

    class Slow(Wrapped):
        async def denoise(
            self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
        ) -> Array:
            await asyncio.sleep(0.02)
            return await super().denoise(latent, timestep, task, conditioning, ticket)

    async def story() -> None:
        async with running(Slow(backend), request_timeout_s=2.0) as house:
            found = await house.ask("depth", budget_ms=HOUR_MS, steps=50, ensemble_size=20)
            assert (found.status_code, found.headers["saccade-complete"]) == (200, "false")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"budget_ms": 0}, "budget_ms"),
        ({"budget_ms": 600_001}, "budget_ms"),
        ({"budget_ms": "soon"}, "budget_ms"),
        ({"quality": "worst"}, "quality"),
        ({"quality": "best", "steps": 2}, "quality"),
        ({"quality": "best", "target_uncertainty": 0.1}, "target_uncertainty"),
        ({"target_uncertainty": 0}, "target_uncertainty"),
        ({"target_uncertainty": "nan"}, "target_uncertainty"),
        ({"target_uncertainty": 0.1, "ensemble_size": 1}, "target_uncertainty"),
    ],
)
def test_what_contradicts_itself_is_refused(backend: Backend, options: dict[str, Any], param: str) -> None:
    assert_problem(ask(backend, "depth", **options), 422, "invalid-input", param)


def test_in_json_numbers_are_numbers(backend: Backend) -> None:
    async def story() -> None:
        async with running(backend) as house:
            body: dict[str, Any] = {"image": base64.b64encode(png()).decode(), "target_uncertainty": 0.5}
            found = await house.client.post("/depth", json=body | {"budget_ms": HOUR_MS})
            assert found.json()["plan"]["target_uncertainty"] == 0.5
            for name, value in (("target_uncertainty", "0.5"), ("budget_ms", 1.5), ("quality", 1)):
                refused = await house.client.post("/depth", content=json.dumps(body | {name: value}),
                                                  headers={"Content-Type": "application/json"})  # fmt: skip
                assert_problem(refused, 422, "invalid-input", name)

    asyncio.run(story())
