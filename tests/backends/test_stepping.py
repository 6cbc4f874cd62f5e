from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.lane import run as in_virtual_time
from saccade.backends import Ticket
from saccade.backends.order import FirstCome, RoundRobin
from saccade.backends.stepping import Stepping
from saccade.errors import BackendUnavailable, ModelError
from saccade.fit import Fit
from saccade.pipeline import Inputs, Options, _Run
from saccade.planner import Planner, Shape
from saccade.tasks import TaskName
from tests.backends.recorder import Recorder
from tests.toy import CONDITIONING, LABELS, LATENT


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def within() -> Any:
        async with asyncio.timeout(20):
            return await coroutine

    return asyncio.run(within())


def step(lane: Stepping, *names: float, **choices: Any) -> asyncio.Task[np.ndarray]:
    return asyncio.create_task(denoise(lane, *names, **choices))


async def denoise(
    lane: Stepping, *names: float, ticket: Ticket | None = None, edge: int = 2, t: int = 5, task: int = 0
) -> np.ndarray:
    """A call of one denoising step with a row for each name."""
    latent = np.broadcast_to(np.array(names, np.float32)[:, None, None, None], (len(names), LATENT, edge, edge)).copy()
    labels = np.full(len(names), task, np.int64)
    seen = dict.fromkeys(CONDITIONING, latent)
    return await lane.denoise(latent, np.full(len(names), t, np.int64), labels, seen, ticket or Ticket())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_steps_of_all_requests_members_tasks_and_timesteps_share_a_batch(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=4)
        mine = Ticket()
        calls = [step(lane, 1, ticket=mine), step(lane, 2, ticket=mine), step(lane, 3, t=900), step(lane, 4, task=1)]
        results = await asyncio.gather(*calls)
        assert [float(result.flat[0]) for result in results] == [2, 4, 6, 8]
        assert [sorted(batch) for batch in backend.batches] == [[1, 2, 3, 4]]

    run(main())


def test_different_sizes_do_not_share_a_batch(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=2)
        results = await asyncio.gather(step(lane, 1), step(lane, 2, edge=4), step(lane, 3), step(lane, 4, edge=4))
        assert [result.shape[-1] for result in results] == [2, 4, 2, 4]
        assert backend.batches == [[1, 3], [2, 4]]

    run(main())


def test_a_batch_has_always_the_same_number_of_rows(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=4)
        result = await step(lane, 7)
        assert result.shape[0] == 1
        assert backend.batches == [[7, 7, 7, 7]]

    run(main())


def test_a_call_of_many_rows_is_cut_and_put_together_again(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=2)
        result = await step(lane, 1, 2, 3, 4, 5)
        assert result[:, 0, 0, 0].tolist() == [2, 4, 6, 8, 10]
        assert backend.batches == [[1, 2], [3, 4], [5, 5]]

    run(main())


def test_pictures_are_encoded_and_decoded_one_at_a_time(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=4)
        images = np.arange(3, dtype=np.float32)[:, None, None, None] * np.ones((3, 3, 16, 16), np.float32)
        seen = await lane.encode(images, images, np.zeros(3, np.int64), Ticket())
        assert list(seen) == CONDITIONING
        assert all(value[:, 0, 0, 0].tolist() == [0, 1, 2] for value in seen.values())
        decoded = await lane.decode(np.ones((2, LATENT, 2, 2), np.float32), Ticket())
        assert decoded.shape == (2, LATENT, 2, 2)
        assert np.all(decoded == 2)
        assert backend.ran == [("encode", 1)] * 3 + [("decode", 1)] * 2

    run(main())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_request_of_many_members_does_not_starve_another(toy_repository: Path, batch_size: int) -> None:
    """Each of twenty members wants two steps, the late request's one member wants three: it has them in turn."""

    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=batch_size)
        many, late = Ticket(), Ticket()

        async def member(name: float, ticket: Ticket, steps: int) -> None:
            for _ in range(steps):
                await denoise(lane, name, ticket=ticket)

        crowd = [asyncio.create_task(member(100 + i, many, 2)) for i in range(20)]
        await asyncio.sleep(0)
        await asyncio.create_task(member(1, late, 3))
        before = len(backend.batches)
        await asyncio.gather(*crowd)
        assert before <= 8 // batch_size + 1
        assert sum(len({*batch} - {1.0}) for batch in backend.batches) == 40

    run(main())


def test_tickets_take_turns_within_a_batch(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=4, order=RoundRobin())
        one, two, three = Ticket(), Ticket(), Ticket()
        await asyncio.gather(
            *(step(lane, 10 + i, ticket=one) for i in range(5)),
            *(step(lane, 20 + i, ticket=two) for i in range(2)),
            *(step(lane, 30 + i, ticket=three) for i in range(1)),
        )
        assert backend.batches == [[10, 20, 30, 11], [21, 12, 13, 14]]

    run(main())


def test_cancelling_withdraws_waiting_rows_at_once(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository, open=False)
        lane = Stepping(backend, batch_size=1, order=FirstCome())
        mine, other = Ticket(), Ticket()
        calls = [step(lane, i, ticket=mine) for i in range(10)] + [step(lane, 20, 21, 22, ticket=mine)]
        stays = step(lane, 99, ticket=other)
        await settle()
        assert (lane.waiting, lane.running) == (13, 1)
        for call in calls:
            call.cancel()
        await settle()
        assert (lane.waiting, lane.running) == (0, 1)  # the batch that nobody waits for has made room
        assert (mine.waiting, mine.running) == (0, 0)
        backend.gate.set()
        assert float((await stays).flat[0]) == 198
        assert backend.batches == [[0], [99]]
        assert all(call.cancelled() for call in calls)
        assert (mine.waiting, mine.running, other.waiting, other.running) == (0, 0, 0, 0)

    run(main())


def test_a_row_cancelled_before_its_batch_is_made_is_never_run(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=2)
        gone, stays = step(lane, 1), step(lane, 2)
        await asyncio.sleep(0)
        gone.cancel()
        await stays
        assert backend.batches == [[2, 2]]

    run(main())


def test_a_row_that_the_model_cannot_run_fails_alone(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        backend.error, backend.poison = ModelError("non-finite"), 2
        lane = Stepping(backend, batch_size=4)
        results = await asyncio.gather(*(step(lane, i) for i in (1, 2, 3, 4)), return_exceptions=True)
        assert isinstance(results.pop(1), ModelError)
        assert [float(result.flat[0]) for result in results] == [2, 6, 8]
        assert all(len(batch) == 4 for batch in backend.batches)
        assert lane.waiting == lane.running == 0

    run(main())


@pytest.mark.parametrize("error", [BackendUnavailable("draining"), KeyError("bug")])
def test_an_error_reaches_every_caller_of_its_batch_and_the_lane_goes_on(
    toy_repository: Path, error: Exception
) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        backend.error, backend.poison = error, 2
        lane = Stepping(backend, batch_size=2)
        results = await asyncio.gather(*(step(lane, i) for i in (1, 2, 3, 4)), return_exceptions=True)
        assert [type(result) for result in results[:2]] == [type(error)] * 2
        assert [float(result.flat[0]) for result in results[2:]] == [6, 8]
        assert float((await step(lane, 5)).flat[0]) == 10
        assert lane.waiting == lane.running == 0

    run(main())


def test_a_call_whose_rows_all_fail_fails_once(toy_repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        backend.error = ModelError("broken")
        lane = Stepping(backend, batch_size=2)
        with pytest.raises(ModelError, match="broken"):
            await step(lane, 1, 2, 3, 4, 5, 6)

    run(main())
    gc.collect()
    assert not caplog.records


def test_closing_refuses_what_waits_and_lets_the_running_end(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository, open=False)
        lane = Stepping(backend, batch_size=1)
        ticket = Ticket()
        running, waiting = step(lane, 1), step(lane, 2, ticket=ticket)
        await settle()
        closing = asyncio.create_task(lane.aclose())
        with pytest.raises(BackendUnavailable):
            await waiting
        assert (ticket.waiting, ticket.running, lane.waiting) == (0, 0, 0)
        assert not backend.closed
        backend.gate.set()
        assert float((await running).flat[0]) == 2
        await closing
        assert backend.closed
        with pytest.raises(BackendUnavailable):
            await step(lane, 3)
        assert backend.batches == [[1]]

    run(main())


def test_as_many_batches_run_together_as_allowed(toy_repository: Path) -> None:
    async def main(concurrency: int) -> int:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=1, concurrency=concurrency)
        await asyncio.gather(*(step(lane, i) for i in range(7)))
        return backend.most_together

    assert [run(main(concurrency)) for concurrency in (1, 3)] == [1, 3]


def test_only_what_has_no_company_is_told_that_it_is_alone(toy_repository: Path) -> None:
    async def main(**lane_options: int) -> list[bool]:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=1, **lane_options)
        await step(lane, 1)
        assert backend.lone == [False]  # nobody has looked yet whether its bytes are the same then
        await lane.start()
        backend.lone.clear()
        await step(lane, 1)
        await asyncio.gather(step(lane, 2), step(lane, 3))
        await asyncio.gather(step(lane, 4), step(lane, 5), step(lane, 6))
        await step(lane, 7)
        return backend.lone

    assert run(main(concurrency=2)) == [True, False, False, False, False, False, True]
    assert not any(run(main(concurrency=1)))


def test_what_gets_company_from_the_middle_on_teaches_nothing_of_either(toy_repository: Path) -> None:
    class Slow(Recorder):
        async def run(self, kind: str, rows: Any, ticket: Ticket) -> None:
            await asyncio.sleep(1.0)
            await super().run(kind, rows, ticket)

    async def main(later_s: float) -> float:
        lane = Stepping(Slow.of(toy_repository), batch_size=1, concurrency=2)
        lane.pace.saw("denoise", 16 * 16, 5.0, alone=True)
        first = step(lane, 1)
        await asyncio.sleep(later_s)
        await asyncio.gather(first, step(lane, 2))
        return float(np.mean(list(lane.pace._seen["denoise", None, True][16 * 16])))

    assert in_virtual_time(main(0.5)) == 5.0
    assert in_virtual_time(main(1.5)) == pytest.approx((5 + 1 + 1) / 3)


def test_nothing_is_alone_to_a_backend_whose_bytes_depend_on_it(
    toy_repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        backend.alone_gives = 2.0000002
        lane = Stepping(backend, batch_size=1, concurrency=2)
        await lane.start()
        backend.lone.clear()
        assert float((await step(lane, 1)).flat[0]) == 2
        assert backend.lone == [False]

    run(main())
    assert "other bytes alone than in company" in caplog.text


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -1}, {"concurrency": 0}])
def test_sizes_below_one_are_refused(toy_repository: Path, wrong: dict[str, int]) -> None:
    async def main() -> None:
        Stepping(Recorder.of(toy_repository), **wrong)

    with pytest.raises(ValueError, match="at least 1"):
        run(main())


def test_a_ticket_counts_only_time_in_which_nothing_of_it_runs(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository, open=False)
        lane = Stepping(backend, batch_size=1, order=FirstCome())
        first, second = Ticket(), Ticket()
        calls = [step(lane, 1, ticket=first), step(lane, 2, ticket=first), step(lane, 3, ticket=second)]
        await settle()
        began = time.perf_counter()
        await asyncio.sleep(0.05)
        stood = time.perf_counter() - began
        backend.gate.set()
        await asyncio.gather(*calls)
        assert second.queue_s >= stood
        assert first.queue_s < stood

    run(main())


def test_the_observer_hears_of_batches_that_succeeded(toy_repository: Path) -> None:
    heard: list[tuple[str, int, float]] = []

    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=4, observer=lambda *batch: heard.append(batch))
        await asyncio.gather(step(lane, 1), step(lane, 2), step(lane, 3))
        await lane.decode(np.ones((1, LATENT, 2, 2), np.float32), Ticket())
        backend.error = ModelError("broken")
        with pytest.raises(ModelError):
            await step(lane, 1)

    run(main())
    assert [(kind, rows) for kind, rows, _ in heard] == [("denoise", 3), ("decode", 1)]
    assert all(seconds >= 0 for _, _, seconds in heard)


class Costly(Recorder):
    """Takes the given milliseconds for a denoising batch of 1, 2, 4 and 8 rows, and one for whatever else."""

    costs_ms: tuple[float, ...] = ()

    async def run(self, kind: str, rows: Any, ticket: Ticket) -> None:
        await asyncio.sleep(self.costs_ms[len(rows).bit_length() - 1] / 1e3 if kind == "denoise" else 1e-3)
        await super().run(kind, rows, ticket)


@pytest.mark.parametrize(
    ("costs_ms", "knee"),
    [((4, 8, 16, 32), 1), ((4, 4.2, 8.4, 16.8), 2), ((4, 4.2, 4.4, 8.8), 4), ((4, 4, 4, 4), 8)],
)
def test_the_knee_is_where_a_row_stops_getting_cheaper(
    toy_repository: Path, costs_ms: tuple[float, ...], knee: int
) -> None:
    async def main() -> None:
        backend = Costly.of(toy_repository)
        backend.costs_ms = costs_ms
        lane = Stepping(backend)
        assert lane.batch_size == 1
        await lane.start()
        assert lane.batch_size == knee
        assert {kind for kind, _ in backend.ran} == {"encode", "denoise", "decode"}

    in_virtual_time(main())


def test_a_given_batch_size_is_kept_and_warmed_up(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        lane = Stepping(backend, batch_size=3)
        await lane.start()
        assert lane.batch_size == 3
        assert {size for kind, size in backend.ran if kind == "denoise"} == {3}

    run(main())


class Uneven(Recorder):
    """Encodes a flow in 39 ms and other pictures in 15; takes one for whatever else."""

    flow_s: float = 0.039

    async def encode(self, image: Any, prompt: Any, task: Any, ticket: Ticket) -> Any:
        await asyncio.sleep(self.flow_s if task[0] == LABELS["flow"] else 0.015)
        return await super().encode(image, prompt, task, ticket)

    async def run(self, kind: str, rows: Any, ticket: Ticket) -> None:
        await asyncio.sleep(0 if kind == "encode" else 1e-3)
        await super().run(kind, rows, ticket)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_encoding_takes_is_measured_for_every_task(toy_repository: Path, concurrency: int) -> None:
    async def main() -> None:
        lane = Stepping(Uneven.of(toy_repository), batch_size=1, concurrency=concurrency)
        await lane.start()
        for alone in (False, concurrency > 1):
            took = {task: lane.pace.batch_s("encode", 64 * 64, label, alone=alone) for task, label in LABELS.items()}
            assert took == pytest.approx({"depth": 0.015, "amodal": 0.015, "flow": 0.039})

    in_virtual_time(main())


def test_a_model_without_tasks_is_measured_by_its_lowest_label(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        backend.card = backend.card.model_copy(update={"tasks": {}, "classes": 3})
        lane = Stepping(backend, batch_size=1)
        await lane.start()
        assert {label for kind, label, _ in lane.pace._seen if kind == "encode"} == {0}

    run(main())


@pytest.mark.parametrize("task", LABELS)
def test_bytes_that_differ_alone_in_one_tasks_encoding_are_noticed(toy_repository: Path, task: TaskName) -> None:
    class Fickle(Recorder):
        async def encode(self, image: Any, prompt: Any, label: Any, ticket: Ticket) -> Any:
            seen = await super().encode(image, prompt, label, ticket)
            differs = ticket.alone and label[0] == LABELS[task]
            return {name: value + np.float32(differs) for name, value in seen.items()}

    async def main() -> bool:
        lane = Stepping(Fickle.of(toy_repository), batch_size=1, concurrency=2)
        await lane.start()
        return lane._tells_alone

    assert not run(main())


def test_slow_encodings_of_flow_change_nothing_for_depth(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Uneven.of(toy_repository)
        lane, shapes = Stepping(backend, batch_size=1), [Shape(64 * 64, 64 * 64)]
        await lane.start()
        planner, card = Planner(), lane.card

        def expected(task: TaskName) -> tuple[float, float]:
            """Forecast of the encoding, and of the whole request as its ticket has it."""
            resolved = Options().resolve(card, task)
            ticket = planner.ticket(card, task, resolved, None, shapes)
            return planner.forecast(lane, card, task, resolved, shapes, 60.0).encode_s, ticket.remaining_s(lane.pace)

        depth, amodal, flow = expected("depth"), expected("amodal"), expected("flow")
        assert (depth[0], flow[0]) == pytest.approx((0.015, 0.039))
        backend.flow_s = 0.5
        picture, label = np.zeros((1, 3, 64, 64), np.float32), np.full(1, LABELS["flow"], np.int64)
        for _ in range(9):
            await lane.encode(picture, picture, label, Ticket())
        assert expected("flow")[0] == pytest.approx(0.5)
        assert expected("flow")[1] - flow[1] == pytest.approx(0.5 - 0.039, abs=1e-3)
        assert expected("depth") == pytest.approx(depth)
        assert expected("amodal") == pytest.approx(amodal)

    in_virtual_time(main())


def test_an_encoding_is_asked_for_as_it_was_planned(toy_repository: Path) -> None:
    async def main() -> None:
        lane = Stepping(Recorder.of(toy_repository), batch_size=1)
        picture, resolved = np.zeros((64, 64, 3), np.uint8), Options().resolve(lane.card, "depth")
        ticket = Planner().ticket(lane.card, "depth", resolved, None, [Shape(64 * 64, 64 * 64)])
        question = _Run(lane, Inputs("depth", picture), resolved, Fit.plan((64, 64), 64, 16), ticket)
        question.plan()
        planned = list(ticket.ahead)
        encoding = asyncio.create_task(question.encode())
        while not ticket.running:
            await asyncio.sleep(0)
        assert sorted(ticket.ahead) == sorted(planned)
        await encoding
        await settle()
        assert [row for row in planned if row[0] != "encode"] == list(ticket.ahead)

    run(main())


def test_a_model_that_fails_to_start_says_so(toy_repository: Path) -> None:
    async def main() -> None:
        backend = Recorder.of(toy_repository)
        backend.error = ModelError("broken")
        await Stepping(backend).start()

    with pytest.raises(ModelError, match="broken"):
        run(main())
