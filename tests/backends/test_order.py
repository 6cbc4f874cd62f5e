"""The orders alone, and in the lane in virtual time: no real clock anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.lane import Asked, Sleeper, answer, figures, learn, mixed, run, simulate
from saccade.backends import Ticket
from saccade.backends.order import ByDeadline, Dial, FirstCome, Order, RoundRobin
from saccade.backends.pace import Kind, Pace
from saccade.backends.stepping import Stepping

SECOND: dict[Kind, float] = {"encode": 1.0, "denoise": 1.0, "decode": 1.0}
PX = 256


def pace() -> Pace:
    made = Pace()
    learn(made, SECOND)
    return made


def ticket(order: Order, work: int, *, now: float = 0.0, **facts: object) -> Ticket:
    """One with `work` seconds ahead that came `now`."""
    made = Ticket(**facts)  # type: ignore[arg-type]
    made.plan(pixels=PX**2, denoise=work)
    made.arrived = now
    order.came(made, now, pace())
    return made


def test_those_that_can_be_in_time_go_by_deadline_then_the_others_by_what_is_left() -> None:
    order = Dial()
    soon, later = ticket(order, 5, deadline=10.0), ticket(order, 5, deadline=20.0)
    hopeless, worse = ticket(order, 30, deadline=12.0), ticket(order, 40, deadline=11.0)
    assert order.rank([worse, later, hopeless, soon], 0.0, pace()) == [soon, later, hopeless, worse]


def test_one_large_request_is_given_up_before_it_makes_many_late() -> None:
    order = Dial()
    large = ticket(order, 9, deadline=10.0)
    small = [ticket(order, 2, deadline=11.0 + i) for i in range(4)]
    assert order.rank([large, *small], 0.0, pace()) == [*small, large]
    assert ByDeadline().rank([*small, large], 0.0, pace())[0] is large


def test_a_late_one_goes_first_only_where_it_makes_nobody_late() -> None:
    order = Dial()
    relaxed = ticket(order, 8, deadline=50.0)
    late = ticket(order, 2, deadline=1.0)
    assert order.rank([relaxed, late], 5.0, pace()) == [late, relaxed]
    tight = ticket(order, 8, deadline=13.5)
    assert order.rank([tight, late], 5.0, pace()) == [tight, late]


def test_an_elastic_request_that_wants_more_than_its_time_is_not_given_up() -> None:
    order = Dial()
    elastic = ticket(order, 500, deadline=10.0, elastic=True)
    other = ticket(order, 3, deadline=20.0)
    assert order.rank([other, elastic], 0.0, pace()) == [elastic, other]


def test_a_client_of_twice_the_weight_gets_twice_as_much_of_a_machine_that_both_flood() -> None:
    """Forty requests of six seconds each come at once, of which half come from either."""
    asked = [Asked(i / 64, PX, 4, 1, None, "heavy" if i % 2 else "light", 1.0 + i % 2) for i in range(40)]
    ends = [one.at + seconds for one, seconds in zip(asked, times(asked, Dial(), []), strict=True)]
    first = sorted(zip(ends, asked, strict=True), key=lambda one: one[0])[:24]
    assert sum(one.client == "heavy" for _, one in first) == pytest.approx(16, abs=2)


def test_a_weight_means_nothing_where_there_is_nobody_to_share_with() -> None:
    light, heavy = (ticket(Dial(), 4, client="a", weight=weight) for weight in (0.1, 10.0))
    assert light.soft == heavy.soft == 12


def test_one_client_with_many_requests_does_not_push_back_another() -> None:
    order = Dial()
    many = [ticket(order, 4, client="busy") for _ in range(10)]
    one = ticket(order, 4, now=1.0, client="quiet")
    nobody = ticket(order, 4, now=1.0)
    ranked = order.rank([*many, one, nobody], 1.0, pace())
    assert {ranked.index(one), ranked.index(nobody)} <= {0, 1, 2}


def test_a_client_that_paused_is_not_paid_for_it() -> None:
    order = Dial()
    first = ticket(order, 4, client="a")
    assert first.soft == pytest.approx(12)
    assert ticket(order, 4, client="a").soft == pytest.approx(4 + 12)
    assert ticket(order, 4, now=100.0, client="a").soft == pytest.approx(112)


def test_what_a_client_called_off_does_not_hold_up_its_next_request() -> None:
    """Beside another client that keeps the machine busy."""
    order = Dial()
    ticket(order, 100, client="other")
    done, called_off = ticket(order, 4, client="a"), ticket(order, 50, client="a")
    for _ in range(4):
        done.enqueue("denoise", PX**2)
        done.start()
        done.finish("denoise", PX**2)
    called_off.plan(pixels=PX**2, denoise=-50)
    for each in (done, called_off):
        order.left(each, 0.0, pace())
    assert ticket(order, 4, client="a").starts == pytest.approx(2 * 4)


def test_what_a_client_called_off_lets_those_that_wait_behind_it_start_earlier() -> None:
    order = Dial()
    called_off = ticket(order, 50, client="a")
    waiting, last = ticket(order, 4, client="a"), ticket(order, 2, client="a")
    other = ticket(order, 20, client="b")
    assert (waiting.starts, last.starts) == (50, 54)
    called_off.plan(pixels=PX**2, denoise=-50)
    order.left(called_off, 1.0, pace())
    assert (waiting.starts, waiting.ends) == (1, 5)
    assert (last.starts, last.ends) == (5, 7)
    assert order.rank([other, waiting, last], 1.0, pace())[-1] is other


def test_a_charge_that_time_has_settled_is_not_paid_back() -> None:
    order = Dial()
    ticket(order, 100, client="other")
    called_off = ticket(order, 5, client="a")  # charged until 10
    second = ticket(order, 6, now=11.0, client="a")
    order.left(called_off, 12.0, pace())
    assert ticket(order, 1, now=12.0, client="a").starts == pytest.approx(second.ends)


def test_a_budget_that_is_over_goes_in_nobodys_way() -> None:
    order = Dial()
    tight = ticket(order, 3, now=10.0, deadline=13.0)
    over = ticket(order, 30, now=10.0, deadline=9.0, elastic=True)
    assert order.rank([over, tight], 10.0, pace()) == [tight, over]


def test_an_idle_machine_holds_nothing_against_anybody() -> None:
    """Large work of a client that left at once, charged beside a client of ten times its weight."""

    async def story() -> tuple[float | None, float | None]:
        async with asyncio.timeout(60):
            order = Dial()
            lane = Stepping(Sleeper(), order=order)  # type: ignore[arg-type]
            with lane.place(planned(1, client="heavy", weight=10.0)), lane.place(planned(200, client="light")):
                pass
            later = planned(1, client="light")
            with lane.place(later):
                return later.starts, later.arrived

    def planned(steps: int, **facts: object) -> Ticket:
        made = Ticket(**facts)  # type: ignore[arg-type]
        made.plan(pixels=PX**2, denoise=steps)
        return made

    starts, arrived = run(story())
    assert starts == arrived


arrivals = st.lists(
    st.tuples(
        st.integers(0, 60),  # when it comes
        st.integers(1, 12),  # steps
        st.integers(1, 3),  # members
        st.one_of(st.none(), st.integers(1, 40)),  # its deadline
        st.sampled_from([None, "a", "b"]),
        st.sampled_from([0.2, 1.0, 5.0]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(arrivals, st.sampled_from([2, 4]))
def test_nothing_starves_whatever_comes(
    arrivals: list[tuple[int, int, int, int | None, str | None, float]], patience: int
) -> None:
    """From its deadline on, `patience` times the work of those that came before it is all that a request waits for."""
    asked = [
        Asked(float(at) + i / 64, PX, steps, members, None if due is None else float(due), client, weight)
        for i, (at, steps, members, due, client, weight) in enumerate(sorted(arrivals, key=lambda one: one[0]))
    ]
    tickets: list[Ticket] = []
    took = times(asked, Dial(patience=patience), tickets)
    for i, (one, seconds) in enumerate(zip(asked, took, strict=True)):
        older = sum(1 + (other.steps + 1) * other.members for other in asked[: i + 1])
        assert tickets[i].due < float("inf")
        assert one.at + seconds <= max(one.at, tickets[i].due) + patience * (older + 2)


def times(asked: list[Asked], order: Order, tickets: list[Ticket]) -> list[float]:
    async def main() -> list[float]:
        lane = Stepping(Sleeper(SECOND), batch_size=1, order=order)
        learn(lane.pace, SECOND)
        clock = asyncio.get_running_loop().time
        tickets.extend(
            Ticket(None if one.budget_s is None else one.at + one.budget_s, one.client, one.weight) for one in asked
        )

        async def wait(one: Asked, ticket: Ticket) -> float:
            await asyncio.sleep(one.at)
            await answer(lane, one, ticket)
            return clock() - one.at

        found = await asyncio.gather(*(wait(one, own) for one, own in zip(asked, tickets, strict=True)))
        assert lane.backlog_s == lane.waiting == 0
        return list(found)

    return run(main())


def test_a_large_request_gets_through_a_stream_of_small_ones_that_never_ends() -> None:
    """Small ones alone are all that the machine can do, and each would be late after the large one."""
    small = [Asked(3.0 * i, PX, 1, 1, 9.0) for i in range(400)]
    large = Asked(0.5, PX, 6, 1, 8.0)
    took = times([*small, large], Dial(patience=8), [])
    assert took[-1] < 8 * 10 + 30
    assert max(took[:100]) < 60


@pytest.mark.parametrize("order", [FirstCome, RoundRobin, ByDeadline])
def test_under_too_much_load_ours_is_in_time_more_often_than_the_others(order: Callable[[], Order]) -> None:
    load = mixed(80, 1.3, 5)
    ours, theirs = (figures(load, simulate(load, made, told=lambda _: True)) for made in (Dial(), order()))
    assert ours["met"] > theirs["met"]
    assert ours["mean"] < theirs["mean"]


def test_encoding_and_decoding_leave_a_slot_to_the_denoiser() -> None:
    """Two slots; pictures that take long are encoded while another request takes its steps."""

    async def main() -> float:
        lane = Stepping(Sleeper({"encode": 100.0, "denoise": 1.0, "decode": 1.0}), batch_size=1, concurrency=2)
        learn(lane.pace, SECOND)
        steps, pictures = Ticket(), Ticket()
        stepping = asyncio.create_task(answer_steps(lane, 20, steps))
        await asyncio.sleep(0)
        encoding = [asyncio.create_task(encode(lane, pictures)) for _ in range(4)]
        await stepping
        took = asyncio.get_running_loop().time()
        for one in encoding:
            one.cancel()
        return took

    assert run(main()) == pytest.approx(20)


async def answer_steps(lane: Stepping, steps: int, own: Ticket) -> None:
    latent, label = np.zeros((1, 1, PX // 8, PX // 8), np.float32), np.zeros(1, np.int64)
    for _ in range(steps):
        await lane.denoise(latent, label, label, {}, own)


async def encode(lane: Stepping, own: Ticket) -> None:
    picture = np.zeros((1, 1, PX, PX), np.float32)
    await lane.encode(picture, picture, np.zeros(1, np.int64), own)
