from __future__ import annotations

import numpy as np
import pytest

from saccade.backends import Plan, Ticket
from saccade.backends.pace import Pace


def seen(batch_size: int = 1, concurrency: int = 1) -> Pace:
    """A second for a step of 100 px and three for one of 200, half for an encoding, a tenth for a decoding."""
    pace = Pace(batch_size, concurrency)
    pace.saw("denoise", 100, 1.0)
    pace.saw("denoise", 200, 3.0)
    pace.saw("encode", 100, 0.5)
    pace.saw("decode", 100, 0.1)
    return pace


def test_a_size_between_two_that_were_seen_lies_on_the_line_between_them() -> None:
    assert [seen().batch_s("denoise", pixels) for pixels in (100, 150, 200)] == [1.0, 2.0, 3.0]


def test_a_size_beyond_those_seen_is_in_proportion_to_the_nearest() -> None:
    assert seen().batch_s("denoise", 50) == pytest.approx(0.5)
    assert seen().batch_s("denoise", 400) == pytest.approx(6.0)
    assert seen().batch_s("encode", 200) == pytest.approx(1.0)


def test_before_anything_ran_there_is_a_guess_that_grows_with_the_picture() -> None:
    pace = Pace()
    assert 0 < pace.batch_s("denoise", 128**2) < pace.batch_s("denoise", 256**2)


def test_one_batch_that_stood_still_changes_nothing_and_a_machine_that_slows_down_does() -> None:
    pace = seen()
    for _ in range(4):
        pace.saw("denoise", 100, 1.0)
    pace.saw("denoise", 100, 90.0)
    assert pace.batch_s("denoise", 100) == 1.0
    for _ in range(9):
        pace.saw("denoise", 100, 2.0)
    assert pace.batch_s("denoise", 100) == 2.0


def test_sizes_that_come_and_go_do_not_pile_up() -> None:
    pace = Pace()
    for pixels in range(1, 1000):
        pace.saw("decode", pixels, float(pixels))
    assert pace.batch_s("decode", 999) == 999
    assert pace.batch_s("decode", 1) == pytest.approx(1)


def test_what_strays_by_little_is_the_same_and_what_drifts_is_followed() -> None:
    pace, ticket = Pace(), Ticket()
    pace.saw("denoise", 100, 1.0)
    ticket.plan(pixels=100, denoise=3)
    version = pace.version
    for _ in range(9):
        pace.saw("denoise", 100, 1.02)
    assert (pace.version, ticket.work_s(pace)) == (version, 3.0)
    for seconds in np.linspace(1.0, 2.0, 60):
        pace.saw("denoise", 100, float(seconds))
    assert ticket.work_s(pace) == pytest.approx(3 * 1.93, rel=0.05)
    assert pace.version > version
    ticket.plan(pixels=100, denoise=-1)
    assert ticket.work_s(pace) == pytest.approx(2 * 1.93, rel=0.05)


def test_what_runs_alone_is_known_apart_once_it_was_seen() -> None:
    pace = seen(concurrency=2)
    assert pace.batch_s("denoise", 100, alone=True) == 1.0
    pace.saw("denoise", 100, 0.6, alone=True)
    assert (pace.batch_s("denoise", 100, alone=True), pace.batch_s("denoise", 100)) == (0.6, 1.0)
    # 200 pixels were seen in company alone: 3 s there.
    assert pace.batch_s("denoise", 200, alone=True) == pytest.approx(3 * 0.6)
    pace.saw("denoise", 900, 8.0, alone=True)
    assert pace.batch_s("denoise", 900) == pytest.approx(8 / 0.6)
    # One member has the machine to itself at every step, two share it.
    assert pace.alone_s(100, 10, 1) == pytest.approx(0.5 + 10 * 0.6 + 0.1)
    assert pace.alone_s(100, 10, 2) == pytest.approx(0.5 + 10 * 1.0 + 0.1)


def test_encodings_of_two_labels_are_kept_apart() -> None:
    pace = Pace(concurrency=2)
    for _ in range(5):
        pace.saw("encode", 100, 0.2, label=0)
    for _ in range(9):
        pace.saw("encode", 100, 0.8, label=1)
    assert [pace.batch_s("encode", 100, label) for label in (0, 1)] == [0.2, 0.8]
    assert [pace.row_s("encode", 100, label) for label in (0, 1)] == [0.1, 0.4]
    pace.saw("encode", 100, 0.1, alone=True, label=0)
    assert [pace.batch_s("encode", 100, label, alone=True) for label in (0, 1)] == [0.1, 0.8]
    pace.saw("encode", 200, 1.0, label=0)
    assert [pace.batch_s("encode", 150, label) for label in (0, 1)] == pytest.approx([0.6, 1.2])
    assert pace.alone_s(100, 0, 0, 0) < pace.alone_s(100, 0, 0, 1)
    assert pace.work_s(100, 1, 1, 1) - pace.work_s(100, 1, 1, 0) == pytest.approx(0.3)


def test_a_label_that_was_not_seen_takes_what_the_slowest_takes() -> None:
    pace = Pace()
    guess = pace.batch_s("encode", 100, 7)
    assert guess == pace.batch_s("encode", 100) > 0
    pace.saw("encode", 100, 0.2, label=0)
    assert pace.batch_s("encode", 100, 7) == 0.2
    pace.saw("encode", 100, 0.8, label=1)
    assert pace.batch_s("encode", 100, 7) == pace.batch_s("encode", 100) == 0.8
    pace.saw("encode", 100, 0.1, label=7)
    assert pace.batch_s("encode", 100, 7) == 0.1


def test_steps_and_decodings_ignore_labels() -> None:
    pace = seen()
    pace.saw("denoise", 400, 8.0, label=3)
    pace.saw("decode", 400, 0.9, label=3)
    assert [pace.batch_s("denoise", 400, label) for label in (None, 3, 5)] == [8.0] * 3
    assert [pace.batch_s("decode", 400, label) for label in (None, 3, 5)] == [0.9] * 3
    assert pace.batch_s("denoise", 100, 3) == 1.0


@pytest.mark.parametrize(
    ("batch_size", "concurrency", "alone_s", "work_s"),
    [(1, 1, 0.5 + 30 + 0.5, 0.5 + 30 + 0.5), (4, 1, 0.5 + 12 + 0.5, 0.5 + 7.5 + 0.5), (4, 2, 0.5 + 6 + 0.3, 4.25)],
)
def test_members_share_batches_and_steps_wait_for_each_other(
    batch_size: int, concurrency: int, alone_s: float, work_s: float
) -> None:
    """Six steps of five members."""
    pace = seen(batch_size, concurrency)
    assert pace.alone_s(100, 6, 5) == pytest.approx(alone_s)
    assert pace.work_s(100, 6, 5) == pytest.approx(work_s)
    ticket = Ticket()
    ticket.plan(pixels=100, encode=1, denoise=30, decode=5)
    assert ticket.remaining_s(pace) == pytest.approx(alone_s)
    assert ticket.work_s(pace) == pytest.approx(work_s)


def rows(ticket: Ticket) -> dict[str, int]:
    return {kind: count for kind, _, count in ticket.ahead}


def test_what_ran_is_no_longer_ahead() -> None:
    ticket = Ticket()
    ticket.plan(pixels=100, encode=1, denoise=4, decode=2)
    for _ in range(3):
        ticket.enqueue("denoise", 100)
        ticket.start()
        ticket.finish("denoise", 100)
    assert rows(ticket) == {"encode": 1, "denoise": 1, "decode": 2}
    ticket.enqueue("denoise", 100)
    ticket.drop("denoise", 100)
    assert rows(ticket) == {"encode": 1, "decode": 2}


def test_rows_that_nobody_planned_are_ahead_while_they_wait() -> None:
    ticket = Ticket()
    for _ in range(3):
        ticket.enqueue("denoise", 100)
    assert rows(ticket) == {"denoise": 3}
    ticket.start()
    ticket.finish("denoise", 100)
    ticket.drop("denoise", 100)
    ticket.drop("denoise", 100)
    assert rows(ticket) == {}


def test_encodings_that_were_planned_are_found_by_their_label() -> None:
    pace, ticket = Pace(), Ticket()
    pace.saw("encode", 100, 0.2, label=0)
    pace.saw("encode", 100, 0.8, label=1)
    ticket.expect(Plan(100, encode=1, denoise=4, decode=2, label=0))
    ticket.plan(pixels=100, encode=1, label=0)
    ticket.plan(pixels=100, encode=1, label=1)
    assert ticket.work_s(pace) == ticket.remaining_s(pace) == pytest.approx(1.0)
    ticket.enqueue("encode", 100, 1)
    assert ticket.work_s(pace) == pytest.approx(1.0)
    ticket.start()
    ticket.finish("encode", 100, 1)
    assert ticket.work_s(pace) == pytest.approx(0.2)
    assert ticket.ran_s(pace) == pytest.approx(0.8)
    ticket.plan(pixels=100, encode=-1, label=0)
    assert rows(ticket) == {}


def test_a_plan_takes_the_place_of_what_was_expected() -> None:
    ticket = Ticket()
    ticket.expect(Plan(100, encode=1, denoise=50, decode=5))
    ticket.expect(Plan(100, encode=1, denoise=50, decode=5))
    assert rows(ticket) == {"encode": 2, "denoise": 100, "decode": 10}
    ticket.plan(pixels=100, encode=1, denoise=8, decode=1)
    assert rows(ticket) == {"encode": 2, "denoise": 58, "decode": 6}
    ticket.plan(pixels=100, denoise=-3)
    assert rows(ticket) == {"encode": 2, "denoise": 55, "decode": 6}
    ticket.plan(pixels=100, denoise=4, decode=1)  # a member more, of the question that has begun
    ticket.plan(pixels=100, denoise=-4, decode=-1)
    assert rows(ticket) == {"encode": 2, "denoise": 55, "decode": 6}
    ticket.plan(pixels=400, encode=1, denoise=2, decode=1)
    assert sorted(ticket.ahead) == [
        ("decode", 100, 1), ("decode", 400, 1), ("denoise", 100, 5), ("denoise", 400, 2), ("encode", 100, 1),
        ("encode", 400, 1),
    ]  # fmt: skip


def test_what_is_elastic_never_counts_for_more_than_a_part_of_its_time() -> None:
    ticket = Ticket(deadline=60.0, elastic=True)
    ticket.plan(pixels=100, encode=1, denoise=1000, decode=1)
    assert ticket.left_s(0.0, seen()) == (pytest.approx(20), pytest.approx(20))
    least = 0.5 + 1.0 + 0.1
    assert ticket.left_s(70.0, seen()) == (pytest.approx(least), pytest.approx(least))
    assert ticket.remaining_s(seen()) > 1000
