"""Answers within a budget, on real graphs and a clock of the test's own: what is there when the time is up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saccade import sequence
from saccade.anytime import Spend
from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.backends.embedded import Embedded
from saccade.backends.stepping import Stepping
from saccade.dial import Plan
from saccade.errors import ModelError
from saccade.pipeline import Answer, Inputs, Options, Pipeline, Resolved
from saccade.repository import Repository
from saccade.tasks import TASKS, TaskName
from tests.server.house import Wrapped
from tests.test_pipeline import contents, inputs

ENCODE_S, STEP_S, DECODE_S = 0.010, 0.010, 0.001


class Loop(asyncio.SelectorEventLoop):
    """Its time passes on command."""

    now = 100.0

    def time(self) -> float:
        return self.now


class Timed(Wrapped):
    """Every call takes its time, of the loop's clock; and is counted."""

    def __init__(self, inner: Backend, loop: Loop) -> None:
        super().__init__(inner)
        self.loop, self.calls = loop, {"encode": 0, "denoise": 0, "decode": 0}

    async def passes(self, kind: str, seconds: float) -> None:
        self.calls[kind] += 1
        self.loop.now += seconds
        for _ in range(3):  # whoever waits for that moment is up before this returns
            await asyncio.sleep(0)

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        await self.passes("encode", ENCODE_S)
        return await super().encode(image, prompt, task, ticket)

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        await self.passes("denoise", STEP_S)
        return await super().denoise(latent, timestep, task, conditioning, ticket)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        await self.passes("decode", DECODE_S)
        return await super().decode(latent, ticket)


@pytest.fixture(scope="module")
def toy(toy_repository: Path) -> Embedded:
    return Embedded.load(Repository(toy_repository), engine="onnxruntime", precision="fp32", threads=1)


def run(loop: Loop, work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(work)


def resolved(backend: Backend, task: TaskName, **options: Any) -> Resolved:
    return Options(**options).resolve(backend.card, task)


def within(toy: Embedded, asked: Inputs, seconds: float | None, target: float | None = None, **options: Any) -> Answer:
    """Answered alone; `seconds` is when the last step must end, after the request came."""
    loop = Loop()
    chosen = resolved(toy, asked.task, **options)
    plan = Plan(chosen.steps, chosen.ensemble_size, "a test", target_uncertainty=target)
    spend = Spend(plan, None if seconds is None else loop.now + seconds)
    found: Answer = run(loop, Pipeline(Timed(toy, loop))(asked, chosen, spend=spend))
    assert found.plan is not None
    return found


def plain(toy: Embedded, asked: Inputs, **options: Any) -> Answer:
    found: Answer = asyncio.run(Pipeline(toy)(asked, resolved(toy, asked.task, **options)))
    return found


def told(found: Answer) -> tuple[bool, int, int]:
    assert found.plan is not None
    return found.plan.complete, found.plan.members, found.plan.steps_taken


@pytest.mark.parametrize("task", TASKS)
def test_enough_time_changes_nothing(toy: Embedded, task: TaskName) -> None:
    options = {"steps": 3, "ensemble_size": 3, "output_uncertainty": True}
    found = within(toy, inputs(task), 10.0, **options)
    assert told(found) == (True, 3, 3)
    expected = plain(toy, inputs(task), **options)
    assert contents(found) == contents(expected)
    assert found.options == expected.options


@pytest.mark.parametrize("task", TASKS)
def test_members_that_are_finished_are_the_answer(toy: Embedded, task: TaskName) -> None:
    # A member takes 5 steps and a decoding, 51 ms: at 130 ms two are finished and the third is not.
    found = within(toy, inputs(task), 0.130, steps=5, ensemble_size=8, output_uncertainty=True)
    assert told(found) == (False, 2, 5)
    expected = plain(toy, inputs(task), steps=5, ensemble_size=2, output_uncertainty=True)
    assert contents(found) == contents(expected)
    assert found.options.ensemble_size == 2


def test_one_member_has_no_uncertainty(toy: Embedded) -> None:
    found = within(toy, inputs("depth"), 0.080, steps=5, ensemble_size=8, output_uncertainty=True)
    assert told(found) == (False, 1, 5)
    assert found.uncertainty is None


@pytest.mark.parametrize("task", TASKS)
def test_without_a_finished_member_its_estimate_is_the_answer(toy: Embedded, task: TaskName) -> None:
    found = within(toy, inputs(task), 0.045, steps=50, ensemble_size=4)
    complete, members, taken = told(found)
    assert (complete, members) == (False, 1)
    assert 2 <= taken <= 4
    assert not np.array_equal(found.prediction, plain(toy, inputs(task), steps=50).prediction)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.005, 0.015])
@pytest.mark.parametrize("task", TASKS)
def test_one_step_is_always_taken(toy: Embedded, task: TaskName, seconds: float) -> None:
    """From pure noise the first step's estimate is the one-step answer, which is thus the least there is."""
    found = within(toy, inputs(task), seconds, steps=20, ensemble_size=4)
    assert told(found) == (False, 1, 1)
    assert contents(found) == contents(plain(toy, inputs(task), steps=1, ensemble_size=1))


def test_the_least_costs_one_step_and_one_decoding(toy: Embedded) -> None:
    loop = Loop()
    backend = Timed(toy, loop)
    chosen = resolved(toy, "depth", steps=20, ensemble_size=4)
    spend = Spend(Plan(20, 4, "a test"), loop.now)
    run(loop, Pipeline(backend)(inputs("depth"), chosen, spend=spend))
    assert backend.calls == {"encode": 1, "denoise": 1, "decode": 1}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_cut_off_leaves_the_lane_at_once(toy: Embedded, batch_size: int) -> None:
    loop = Loop()
    lane = Stepping(Timed(toy, loop), batch_size=batch_size)
    ticket = Ticket()
    chosen = resolved(toy, "depth", steps=20, ensemble_size=8)
    spend = Spend(Plan(20, 8, "a test"), loop.now + 0.130)
    found: Answer = run(loop, Pipeline(lane)(inputs("depth"), chosen, ticket, spend=spend))
    assert told(found)[:2] == (False, batch_size)
    assert (lane.waiting, lane.running, ticket.waiting, ticket.running) == (0, 0, 0, 0)
    assert list(ticket.ahead) == []


def test_the_reserve_is_kept_free(toy: Embedded) -> None:
    loop = Loop()
    chosen = resolved(toy, "depth", steps=5, ensemble_size=8)
    spend = Spend(Plan(5, 8, "a test"), loop.now + 0.130, reserve_s=0.060)
    assert told(run(loop, Pipeline(Timed(toy, loop))(inputs("depth"), chosen, spend=spend))) == (False, 1, 5)


@pytest.mark.parametrize("task", TASKS)
def test_members_are_added_until_the_answer_is_sure(toy: Embedded, task: TaskName) -> None:
    """The uncertainty by the test's own reckoning: the mean spread of the map over the root of the members."""
    whole = {"output_uncertainty": True, "match_input_resolution": False, "steps": 2}
    spreads = {n: plain(toy, inputs(task), ensemble_size=n, **whole).uncertainty for n in range(2, 9)}
    sure = {n: float(spread.mean()) / n**0.5 for n, spread in spreads.items() if spread is not None}
    target = sorted(sure.values())[3]
    enough = min(n for n, value in sure.items() if value <= target)
    found = within(toy, inputs(task), None, target * 1.0001, ensemble_size=8, **whole)
    assert told(found) == (True, enough, 2)
    assert found.plan is not None
    assert found.plan.uncertainty == pytest.approx(sure[enough], rel=1e-4)
    expected = plain(toy, inputs(task), ensemble_size=enough, **whole)
    assert contents(found) == contents(expected)
    assert found.options == expected.options


def test_a_target_out_of_reach_ends_with_the_members(toy: Embedded) -> None:
    found = within(toy, inputs("flow"), None, 1e-9, steps=1, ensemble_size=3)
    assert told(found) == (True, 3, 1)
    assert found.plan is not None
    assert found.plan.uncertainty is not None
    assert found.plan.uncertainty > 1e-9


def test_a_target_stops_at_the_deadline(toy: Embedded) -> None:
    found = within(toy, inputs("flow"), 0.060, 1e-9, steps=1, ensemble_size=20)
    complete, members, _ = told(found)
    assert not complete
    assert 2 <= members < 20


def test_pictures_in_a_row_share_the_time(toy: Embedded) -> None:
    """Each gets its share of what is left: none takes it all, and none is left without an answer."""
    loop = Loop()
    asked = [inputs("depth", seed=seed) for seed in range(4)]
    chosen = resolved(toy, "depth", steps=4, ensemble_size=20)
    spend = Spend(Plan(4, 20, "a test"), loop.now + 0.6)
    seen = run(loop, sequence.ask(Pipeline(Timed(toy, loop)), asked, chosen, spend=spend))
    members = [told(answer)[1] for answer in seen]
    assert all(2 <= count <= 5 for count in members)
    assert loop.now <= 100.0 + 0.6 + 4 * STEP_S


def test_steadied_frames_share_it_with_the_flows_between_them(toy: Embedded) -> None:
    loop = Loop()
    asked = [inputs("depth", seed=seed) for seed in range(3)]
    chosen = resolved(toy, "depth", steps=2, ensemble_size=20)
    spend = Spend(Plan(2, 20, "a test"), loop.now + 0.5)
    seen = run(loop, sequence.ask(Pipeline(Timed(toy, loop)), asked, chosen, steadily=True, spend=spend))
    assert [answer.plan.complete for answer in seen] == [False] * 3
    assert loop.now <= 100.0 + 0.5 + 4 * STEP_S


def test_frames_are_not_whole_where_only_the_flows_that_steady_them_were_cut(toy: Embedded) -> None:
    asked = [inputs("depth", seed=seed) for seed in range(3)]
    chosen = resolved(toy, "depth", steps=1, ensemble_size=1)
    for budget_s, whole in ((0.0, False), (60.0, True)):
        loop = Loop()
        spend = Spend(Plan(1, 1, "a test"), loop.now + budget_s)
        seen = run(loop, sequence.ask(Pipeline(Timed(toy, loop)), asked, chosen, steadily=True, spend=spend))
        assert [answer.plan.complete for answer in seen] == [whole] * 3


def test_watching_changes_nothing(toy: Embedded) -> None:
    class Watch:
        steps = 0

        def phase(self, name: str) -> None:
            pass

        async def step(self, member: int, step: int, glimpse: object) -> None:
            self.steps += 1

    loop, watch = Loop(), Watch()
    chosen = resolved(toy, "depth", steps=5, ensemble_size=8)
    spend = Spend(Plan(5, 8, "a test"), loop.now + 0.130)
    found = run(loop, Pipeline(Timed(toy, loop))(inputs("depth"), chosen, watch=watch, spend=spend))
    assert contents(found) == contents(plain(toy, inputs("depth"), steps=5, ensemble_size=2))
    assert watch.steps >= 10


def test_failures_and_leaving_are_those_of_any_request(toy: Embedded) -> None:
    class Broken(Timed):
        async def decode(self, latent: Array, ticket: Ticket) -> Array:
            raise ModelError("broken")

    loop = Loop()
    lane = Stepping(Broken(toy, loop), batch_size=4)
    chosen, spend = resolved(toy, "depth", steps=2, ensemble_size=8), Spend(Plan(2, 8, "a test"))

    async def fail() -> None:
        with pytest.raises(ModelError):
            await Pipeline(lane)(inputs("depth"), chosen, spend=spend)
        await asyncio.sleep(0)
        assert (lane.waiting, lane.running) == (0, 0)

    run(loop, fail())

    async def leave() -> None:
        asking = asyncio.create_task(Pipeline(lane)(inputs("depth"), chosen, spend=spend))
        while not lane.running_steps:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while lane.running:
            await asyncio.sleep(0)
        assert lane.waiting == 0

    loop = Loop()
    lane = Stepping(Timed(toy, loop), batch_size=4)
    run(loop, leave())
