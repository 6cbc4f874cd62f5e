"""What a request may cost: its plan, its place in the queue, and what is learnt from how it went."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from saccade.dial import Plan
from saccade.pipeline import Answer, Inputs
from saccade.planner import Shape
from server.admission import Overloaded, Size, padded

if TYPE_CHECKING:
    from server.service import Job, Service

Rows = Sequence[Sequence[Size]]
"""(H, W) of each question's pictures."""


def planned(house: Service, job: Job, rows: Rows) -> Job:
    """The job with the steps and members that its budget is good for, and its place in the queue."""
    model, shapes = job.model, _shapes(job, rows)
    options, spend = house.planner.spend(
        model.stepping,
        model.card,
        job.task,
        job.wanted.options,
        job.options,
        shapes,
        arrived=asyncio.get_running_loop().time() - (time.perf_counter() - job.began),
        longest_s=job.longest_s,
        written_as=_written_as(job),
        steadily=job.several is not None and job.several.steady,
        decoded=job.several is not None and job.several.clip is not None,
    )
    ticket = house.planner.ticket(model.card, job.task, options, spend, shapes, job.client, job.weight)
    return replace(job, options=options, spend=spend, ticket=ticket)


def admitted(house: Service, job: Job, cost: float, rows: Rows) -> AbstractContextManager[None]:
    """Raises Overloaded, also where its deadline would be over before one step of one member is done."""
    lane, pixels = job.model.stepping, sum(shape.model_px for shape in _shapes(job, rows))
    least_s = lane.pace.alone_s(pixels, 1, 1, job.model.card.tasks[job.task].label)
    return house.admission.admit(cost, lane=lane, ticket=job.ticket, least_s=least_s)


def refusal(error: Overloaded) -> str:
    if error.reason == "deadline":
        return "The budget cannot be kept: too much work comes first. Try again later, or give more."
    return "The queue is full. Try again later, or ask for fewer steps, fewer members or a smaller resolution."


def count(house: Service, job: Job, plan: Plan | None) -> None:
    """How a budget was kept."""
    if plan is None or plan.budget_ms is None or job.spend is None:
        return
    late_s = time.perf_counter() - job.began - min(plan.budget_ms / 1e3, job.longest_s)
    house.planner.cut(job.spend, plan, late_s)
    house.metrics.budgets.labels("late" if late_s > 0 else "complete" if plan.complete else "cut").inc()


def read(house: Service, job: Job, asked: Sequence[Inputs], began: float) -> None:
    """The pictures were read since `began`."""
    house.planner.saw(f"read {job.task}", _pixels(asked), time.perf_counter() - began)


def learn(house: Service, job: Job, asked: Sequence[Inputs], seen: Sequence[Answer]) -> None:
    """The members were merged in the time that the answers tell."""
    shapes = _shapes(job, [[(inputs.image.shape[0], inputs.image.shape[1])] for inputs in asked])
    for answer, shape in zip(seen, shapes, strict=True):
        house.planner.learn(answer, shape)


def wrote(house: Service, job: Job, asked: Sequence[Inputs], began: float) -> None:
    """The answer was written since `began`."""
    house.planner.saw(f"write {_written_as(job)}", _pixels(asked), time.perf_counter() - began)


def _shapes(job: Job, rows: Rows) -> list[Shape]:
    models = [padded(job.model.card, job.task, job.options, sizes[0]) for sizes in rows]
    return [Shape(model[0] * model[1], sizes[0][0] * sizes[0][1]) for model, sizes in zip(models, rows, strict=True)]


def _written_as(job: Job) -> str:
    return f"{job.task} {job.format} {job.wanted.render} {job.wanted.encoding or ''}"


def _pixels(asked: Sequence[Inputs]) -> int:
    return sum(inputs.image.shape[0] * inputs.image.shape[1] for inputs in asked)
