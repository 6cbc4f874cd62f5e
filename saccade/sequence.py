"""Several questions asked as one: pictures in a row, or the frames of a video; a steady scale where it is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from saccade import metres
from saccade.anytime import Spend
from saccade.backends import Ticket
from saccade.card import Card
from saccade.dial import Plan
from saccade.errors import InvalidInput, MetresUndetermined
from saccade.metres import Points
from saccade.pipeline import Answer, Inputs, Options, Picture, Pipeline, Resolved, Watch
from saccade.steady import Affine, steady
from saccade.tasks import TaskName

T = TypeVar("T")
# Enough to fill batches; each holds its maps at the picture's size.
AT_ONCE = 8


@dataclass(frozen=True)
class Seen(Sequence[Answer]):
    """Answers in the order of the questions. `shots`: the first frame of each stretch with one scale, where the scale
    is steady, else None. `fps`: frames a second that were asked about, where it was a video."""

    answers: list[Answer]
    shots: list[int] | None = None
    fps: float | None = None

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Answer]: ...
    def __getitem__(self, index: int | slice) -> Answer | Sequence[Answer]:
        return self.answers[index]

    def __len__(self) -> int:
        return len(self.answers)


def pairs(frames: Sequence[Picture] | NDArray[np.uint8]) -> list[Inputs]:
    """N frames [H, W, 3] -> the N - 1 questions where everything moved. Raises InvalidInput for one alone."""
    if len(frames) < 2:
        raise InvalidInput("flow needs two frames or more", param="image")
    return [Inputs("flow", now, following) for now, following in pairwise(frames)]


def questions(task: TaskName, frames: Sequence[Picture] | NDArray[np.uint8]) -> list[Inputs]:
    """What is asked about the frames of depth or flow."""
    return pairs(frames) if task == "flow" else [Inputs(task, frame) for frame in frames]


def guide(card: Card, options: Resolved) -> Resolved:
    """How the flow is asked for that steadies a depth: one member, at the model's size. Raises InvalidInput for a
    model without flow."""
    edge = options.processing_resolution
    wanted = Options(ensemble_size=1, seed=options.seed, processing_resolution=edge, match_input_resolution=False)
    return wanted.resolve(card, "flow")


async def ask(
    pipeline: Pipeline,
    asked: Sequence[Inputs],
    options: Resolved,
    *,
    steadily: bool = False,
    known: Points | None = None,
    fps: float | None = None,
    watch: Watch | None = None,
    ticket: Ticket | None = None,
    spend: Spend | None = None,
) -> Seen:
    """Answer every question with the same options, and so from the same noise; cancelling withdraws them all.

    `steadily` (depth of frames of one size): each is fitted to the one before it along the flow, and a shot as a whole
    lies in 0 .. 1. `known` points of the only, or with `steadily` of the first, picture give metres. With a deadline to
    `spend` until, they are answered one after another, each in its share of what time is left. Raises what the pipeline
    does, and MetresUndetermined.
    """
    if steadily:
        _check_sizes(asked)
    if known is not None:
        metres.check(known, _size(asked[0]))
    ticket = ticket or Ticket()
    purse = _Purse(spend, 2 * len(asked) - 1 if steadily else len(asked))
    answers = await _some_at_once(
        (purse.ask(pipeline, inputs, options, ticket, watch) for inputs in asked), purse.at_once
    )
    seen = Seen(answers, [0] if steadily else None, fps)
    if steadily and len(asked) > 1:
        seen = await _steadied(pipeline, asked, options, seen, ticket, purse)
    if known is None:
        return seen
    return await asyncio.to_thread(_measured, seen, known, _size(asked[0]))


@dataclass
class _Purse:
    """What so many questions may still spend."""

    spend: Spend | None
    questions: int

    @property
    def at_once(self) -> int:
        return AT_ONCE if self.spend is None or self.spend.deadline is None else 1

    async def ask(
        self, pipeline: Pipeline, inputs: Inputs, options: Resolved, ticket: Ticket, watch: Watch | None = None
    ) -> Answer:
        share = None
        if self.spend is not None:
            share = self.spend.share(asyncio.get_running_loop().time(), self.questions)
            self.questions -= 1
        return await pipeline(inputs, options, ticket, watch, share)


async def _steadied(
    pipeline: Pipeline, asked: Sequence[Inputs], options: Resolved, seen: Seen, ticket: Ticket, purse: _Purse
) -> Seen:
    how = guide(pipeline.card, options)
    back = [Inputs("flow", now.image, before.image) for before, now in pairwise(asked)]
    if purse.spend is not None:  # its own target or plan is not the flow's
        purse.spend = replace(purse.spend, plan=Plan(how.steps, how.ensemble_size, "to steady a depth"))
    flows = await _some_at_once((purse.ask(pipeline, inputs, how, ticket) for inputs in back), purse.at_once)
    return await asyncio.to_thread(_apply, seen, asked, flows)


def _apply(seen: Seen, asked: Sequence[Inputs], flows: Sequence[Answer]) -> Seen:
    depths = [_float(answer) for answer in seen]
    steadied = steady(depths, [inputs.image for inputs in asked], [_float(flow) for flow in flows])
    moved = zip(seen, steadied.maps, steadied.fits, strict=True)
    answers = [_refitted(answer, depth, fit) for answer, depth, fit in moved]
    if any(flow.plan is not None and not flow.plan.complete for flow in flows):  # a cut flow steadies less well
        answers = [replace(a, plan=None if a.plan is None else replace(a.plan, complete=False)) for a in answers]
    return replace(seen, answers=answers, shots=steadied.shots)


def _float(answer: Answer) -> NDArray[np.float32]:
    return answer.prediction.astype(np.float32, copy=False)


def _refitted(answer: Answer, depth: NDArray[np.float32], fit: Affine) -> Answer:
    spread = None if answer.uncertainty is None else answer.uncertainty * np.float32(fit.scale)
    return replace(answer, prediction=depth, uncertainty=spread)


def _measured(seen: Seen, known: Points, size: tuple[int, int]) -> Seen:
    """One fit, from the first picture, for all that share its scale."""
    if len(seen) > 1 and seen.shots != [0]:
        if seen.shots:
            why = f"at frame {seen.shots[1]} another shot begins. Ask about one shot at a time."
        else:
            why = "each has a scale of its own. Ask one by one, or steadily."
        told = f"the points of the first picture say nothing of the others: {why}"
        raise MetresUndetermined(told, param=metres.PARAM)
    found = metres.fit_points(_float(seen[0]), known, size)
    return replace(seen, answers=[answer.in_metres(found) for answer in seen])


def _size(inputs: Inputs) -> tuple[int, int]:
    return inputs.image.shape[0], inputs.image.shape[1]


def _check_sizes(asked: Sequence[Inputs]) -> None:
    sizes = {_size(inputs) for inputs in asked}
    if len(sizes) > 1:
        told = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:3])
        raise InvalidInput(f"a steady scale needs frames of one size, and these are {told} px", param="image")


async def _some_at_once(coroutines: Iterable[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """The results in order, `at_once` running beside each other; the first failure ends all and is raised as it is."""
    door = asyncio.Semaphore(at_once)

    async def through(coroutine: Coroutine[Any, Any, T]) -> T:
        async with door:
            return await coroutine

    waiting = list(coroutines)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(through(coroutine)) for coroutine in waiting]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__
    finally:
        for coroutine in waiting:
            coroutine.close()  # those that never ran; closing one that ended does nothing
    return [task.result() for task in tasks]
