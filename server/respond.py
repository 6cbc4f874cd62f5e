"""From a request to its answer: the one way of those that wait, of those that watch, and of jobs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

from fastapi import Request, Response

from saccade.dial import Plan
from saccade.errors import InvalidInput
from saccade.pipeline import Answer
from saccade.render import Encoded
from saccade.tasks import TaskName
from server import etag, events, forms, negotiation, options, problems, several
from server.cache import Kept
from server.events import Witness
from server.logs import state
from server.model import Model
from server.options import Given
from server.problems import ClientGone, Problem
from server.service import Job, Service, picture_names, while_connected

PHASES = ("queue", "encode", "denoise", "decode", "ensemble", "total")


async def respond(
    house: Service,
    request: Request,
    task: TaskName,
    watch: Witness | None = None,
    later: bool = False,
) -> Response:
    """The answer to a request that waits for it, or that is answered `later`: a job's.

    Raises Problem, SaccadeError, or ClientGone.
    """
    began = time.perf_counter()
    _check_task(house.alias.current, task)  # before a byte of the body is read
    form = await _form(house, request, task)
    with house.alias.use() as model:
        job = _job(house, model, request, task, form, began)
        if job.wanted.webhook is not None and not later:
            raise InvalidInput("a webhook is for jobs: send Prefer: respond-async too, or drop it", param="webhook")
        patience_s = house.settings.jobs_timeout_s if later else house.settings.request_timeout_s
        job = replace(job, longest_s=patience_s - min(1.0, patience_s / 4))
        tag = await house.in_thread(lambda: etag.of(job, house.settings)) if house.answers.limit else None
        if tag is not None:
            told_at_once = watch is None or job.several is None  # the stream of several has each as it comes
            known = house.answers.get(tag) if told_at_once else None
            etag.check(request.headers.getlist("if-none-match"), tag, known is not None)
            if known is not None:
                return _again(known, job, began, watch)
        answer, encoded = await _result(house, request, job, watch, patience_s)
    headers = _headers(answer)
    if tag is not None and _whole(answer):
        headers["ETag"] = tag
        house.answers.put(tag, Kept(encoded.data, encoded.media_type, headers), len(encoded.data))
    return _response(Kept(encoded.data, encoded.media_type, headers), answer.timings_ms, began)


async def read_body(house: Service, request: Request) -> bytes:
    """All of it, within the time limit of uploads; the request keeps it too. Raises Problem."""
    async with _in_time(house):
        return await request.body()


async def check(house: Service, request: Request, task: TaskName) -> Job:
    """What can be refused before anything is computed is refused here. Raises Problem or SaccadeError."""
    _check_task(house.alias.current, task)
    form = await _form(house, request, task)
    with house.alias.use() as model:
        job = _job(house, model, request, task, form, time.perf_counter())
        house.cost(job, await house.rows(job))
    return job


def accepted(request: Request) -> str:
    """The Accept headers as one."""
    return ", ".join(request.headers.getlist("accept"))


def _check_task(model: Model, task: TaskName) -> None:
    if task not in model.card.tasks:
        raise InvalidInput(f"model {model.name} does not do {task}", param="task")


async def _result(
    house: Service, request: Request, job: Job, watch: Witness | None, patience_s: float
) -> tuple[Answer, Encoded]:
    """The answer, unless the client leaves or the time is up: then the work is withdrawn."""
    try:
        async with asyncio.timeout(patience_s) as deadline:
            return await while_connected(request.receive, house.answer(job, watch))
    except ClientGone:
        house.metrics.cancelled.labels(job.task, "disconnect").inc()
        raise
    except TimeoutError as error:
        if not deadline.expired():
            raise
        house.metrics.cancelled.labels(job.task, "timeout").inc()
        raise _late(patience_s) from error


def _job(house: Service, model: Model, request: Request, task: TaskName, form: forms.Form, began: float) -> Job:
    """Everything that can be refused without looking at a pixel is refused here."""
    names = form.names(picture_names(task))
    query = [_query(name, value, names) for name, value in request.query_params.multi_items()]
    wanted = options.read(house.tables[task], [*query, *form.options])
    resolved = wanted.options.resolve(model.card, task, house.limits)
    accept = "" if events.wanted(accepted(request)) else accepted(request)
    asked = several.of(form, wanted, task)
    choose = negotiation.choose if asked is None else negotiation.choose_of_several
    chosen = choose(task, accept, wanted.format, wanted.render, resolved.output_uncertainty)
    if wanted.encoding and chosen != "json":
        raise InvalidInput("encoding is that of maps inside JSON: ask for format json, or drop it", param="encoding")
    known = state(request.scope)
    client, weight = known.get("key"), float(known.get("weight", 1.0))
    return Job(model, task, form.pictures, wanted, resolved, chosen, began, asked, client, weight)


async def _form(house: Service, request: Request, task: TaskName) -> forms.Form:
    names, room = picture_names(task), several.room(house.settings, task)
    async with _in_time(house):
        return await forms.read(request, names, house.settings.max_upload_bytes, house.in_thread, room)


@asynccontextmanager
async def _in_time(house: Service) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(house.settings.request_timeout_s) as deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise Problem(problems.SLOW_UPLOAD, "The body did not arrive in time. Send it faster, or smaller.") from error


def _query(name: str, value: str, names: tuple[str, ...]) -> Given:
    if name in names:
        raise InvalidInput(f"{name} belongs into the body, not into the query", param=name)
    return Given(name, value, True)


def _late(seconds: float) -> Problem:
    return Problem(
        problems.TIMEOUT,
        f"No answer within {seconds:g} s; the work was withdrawn. Try later, or ask for fewer steps or members.",
        retry_after_s=min(seconds, 30.0),
    )


def _again(known: Kept, job: Job, began: float, watch: Witness | None) -> Response:
    """An answer that was kept, as if it had just been computed."""
    if watch is not None:
        watch.begin(job.task, job.options, 0)
    return _response(known, {}, began)


def _response(answer: Kept, timings_ms: Mapping[str, float], began: float) -> Response:
    """`total` runs from the request's first byte to here; the one inside JSON cannot count the writing of the JSON."""
    milliseconds = {**timings_ms, "total": (time.perf_counter() - began) * 1e3}
    timings = ", ".join(f"{name};dur={milliseconds.get(name, 0.0):.3f}" for name in PHASES)
    return Response(answer.data, headers=answer.headers | {"Server-Timing": timings}, media_type=answer.media_type)


def _whole(answer: Answer) -> bool:
    return answer.plan is None or answer.plan.complete


def _headers(answer: Answer) -> dict[str, str]:
    chosen = answer.options
    planned = {} if answer.plan is None else {"Saccade-Plan": _plan(answer.plan)}
    return {
        "Saccade-Model": answer.model,
        "Saccade-Digest": answer.digest,
        "Saccade-Steps": str(chosen.steps),
        "Saccade-Ensemble-Size": str(chosen.ensemble_size),
        "Saccade-Reduction": chosen.reduction,
        "Saccade-Seed": str(chosen.seed),
        "Saccade-Units": answer.units,
        "Saccade-Complete": str(_whole(answer)).lower(),
        **planned,
        "Vary": "Accept",
    }


def _plan(plan: Plan) -> str:
    """A dictionary of RFC 9651."""
    told = {name: value for name, value in asdict(plan).items() if value is not None}
    return ", ".join(f"{name}={_item(value)}" for name, value in told.items())


def _item(value: object) -> str:
    if isinstance(value, bool):
        return f"?{value:d}"
    if isinstance(value, float):
        return f"{value:.3f}"  # a decimal has three digits after the point at most
    return json.dumps(value)
