"""Who is let in by the clock: deadlines that cannot be met, what Retry-After says, and the weight of a key."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from bench.lane import Sleeper, learn, run
from saccade.backends import Ticket
from saccade.backends.pace import Kind
from saccade.backends.stepping import Stepping
from saccade.errors import InvalidInput
from server import keys
from server.admission import Admission, Overloaded

SECOND: dict[Kind, float] = {"encode": 1.0, "denoise": 1.0, "decode": 1.0}
PX = 256**2


def lane() -> Stepping:
    """An idle one, where every row takes a second."""
    made = Stepping(Sleeper(SECOND), batch_size=1)
    learn(made.pace, SECOND)
    return made


def ticket(seconds: int, deadline: float | None = None, **facts: Any) -> Ticket:
    made = Ticket(deadline, **facts)
    made.plan(pixels=PX, denoise=seconds)
    return made


def within(story: Coroutine[Any, Any, Any]) -> Any:
    return run(story)


def test_a_deadline_that_what_goes_before_makes_impossible_is_refused_at_once() -> None:
    async def story() -> None:
        queue, admission = lane(), Admission(1000)
        with admission.admit(1, lane=queue, ticket=ticket(20, deadline=25.0)):
            with pytest.raises(Overloaded) as refused, admission.admit(1, lane=queue, ticket=ticket(10, deadline=26.0)):
                pass
            assert refused.value.reason == "deadline"
            assert refused.value.retry_after_s == pytest.approx(20 + 10 - 26)
            assert (admission.requests, admission.pending) == (1, 1)
            with admission.admit(1, lane=queue, ticket=ticket(10, deadline=31.0)):
                assert queue.backlog_s == pytest.approx(30)
            with admission.admit(1, lane=queue, ticket=ticket(3, deadline=4.0)):
                pass  # goes before the other, which has time
        assert queue.backlog_s == 0

    within(story())


def test_what_could_do_with_less_is_asked_for_the_least_that_it_needs() -> None:
    async def story() -> None:
        queue, admission = lane(), Admission(1000)
        with admission.admit(1, lane=queue, ticket=ticket(20, deadline=21.0)):
            late = ticket(500, deadline=30.0, elastic=True)
            with admission.admit(1, lane=queue, ticket=late, least_s=3.0):
                pass
            with pytest.raises(Overloaded), admission.admit(1, lane=queue, ticket=late, least_s=12.0):
                pass

    within(story())


def test_an_idle_machine_refuses_nobody_and_neither_do_those_without_a_deadline() -> None:
    async def story() -> None:
        queue, admission = lane(), Admission(1000)
        late, patient = ticket(20, deadline=1.0), ticket(600)
        with admission.admit(1, lane=queue, ticket=late), admission.admit(1, lane=queue, ticket=patient):
            assert queue.backlog_s == 620

    within(story())


def test_retry_after_of_a_full_queue_is_the_backlog_in_seconds() -> None:
    async def story() -> None:
        queue, admission = lane(), Admission(100)
        with admission.admit(100, lane=queue, ticket=ticket(40)):
            with pytest.raises(Overloaded) as refused, admission.admit(50, lane=queue, ticket=ticket(20)):
                pass
            assert refused.value.reason == "full"
            assert refused.value.retry_after_s == pytest.approx(20)

    within(story())


def test_the_place_is_left_whatever_happens() -> None:
    async def story() -> None:
        queue, admission = lane(), Admission(100)
        with pytest.raises(KeyError), admission.admit(10, lane=queue, ticket=ticket(40)):
            raise KeyError
        task = asyncio.create_task(hold(admission, queue))
        await asyncio.sleep(0)
        assert queue.backlog_s == 7
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (queue.backlog_s, admission.pending, admission.requests) == (0, 0, 0)

    within(story())


async def hold(admission: Admission, queue: Stepping) -> None:
    with admission.admit(10, lane=queue, ticket=ticket(7)):
        await asyncio.Event().wait()


def test_a_key_has_the_weight_that_its_entry_says(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys.add(file, keys.entry("heavy", keys.new(), None, None, 10, weight=2.0))
    keys.add(file, keys.entry("plain", keys.new(), None, None, 10))
    assert [(key.name, key.weight) for key in keys.read(file)] == [("heavy", 2.0), ("plain", 1.0)]


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e9, float("nan")])
def test_a_weight_that_would_starve_others_is_refused(weight: float) -> None:
    with pytest.raises(InvalidInput, match="weight"):
        keys.entry("greedy", keys.new(), None, None, 10, weight=weight)
