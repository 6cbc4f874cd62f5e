"""POST /depth, /flow, /amodal; GET /, /models, /livez, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from saccade import __version__
from saccade.errors import InvalidInput
from saccade.pipeline import Answer
from saccade.render import Encoded
from saccade.tasks import TASKS, TaskName
from server import forms, negotiation, options, problems
from server.model import Model
from server.options import Given
from server.problems import ClientGone, Problem
from server.service import Job, Service, picture_names, while_connected

PHASES = ("queue", "encode", "denoise", "decode", "ensemble", "total")


def router() -> APIRouter:
    made = APIRouter()
    for task in TASKS:
        made.add_api_route(f"/{task}", _task_route(task), methods=["POST"], name=task)
    plain: dict[str, Callable[..., Awaitable[Response]]] = {
        "/": index,
        "/models": models,
        "/livez": livez,
        "/readyz": readyz,
        "/metrics": metrics,
    }
    for path, answer in plain.items():
        made.add_api_route(path, answer, methods=["GET", "HEAD"])
    return made


def service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def _task_route(task: TaskName) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await _answer(request, task)

    return answer


async def _answer(request: Request, task: TaskName) -> Response:
    house, began = service(request), time.perf_counter()
    _check_task(house.alias.current, task)  # before a byte of the body is read
    form = await _form(house, request, picture_names(task))
    with house.alias.use() as model:
        job = _job(house, model, request, task, form, began)
        answer, encoded = await _result(house, request, job)
    return Response(encoded.data, headers=_headers(answer, began), media_type=encoded.media_type)


def _check_task(model: Model, task: TaskName) -> None:
    if task not in model.card.tasks:
        raise InvalidInput(f"model {model.name} does not do {task}", param="task")


async def _result(house: Service, request: Request, job: Job) -> tuple[Answer, Encoded]:
    """The answer, unless the client leaves or the time is up: then the work is withdrawn."""
    try:
        async with asyncio.timeout(house.settings.request_timeout_s) as deadline:
            return await while_connected(request.receive, house.answer(job))
    except ClientGone:
        house.metrics.cancelled.labels(job.task, "disconnect").inc()
        raise
    except TimeoutError as error:
        if not deadline.expired():
            raise
        house.metrics.cancelled.labels(job.task, "timeout").inc()
        raise _late(house.settings.request_timeout_s) from error


def _job(house: Service, model: Model, request: Request, task: TaskName, form: forms.Form, began: float) -> Job:
    """Everything that can be refused without looking at a pixel is refused here."""
    names = picture_names(task)
    query = [_query(name, value, names) for name, value in request.query_params.multi_items()]
    wanted = options.read(house.tables[task], [*query, *form.options])
    resolved = wanted.options.resolve(model.card, task)
    accept = ", ".join(request.headers.getlist("accept"))
    chosen = negotiation.choose(task, accept, wanted.format, wanted.render, resolved.output_uncertainty)
    if wanted.encoding and chosen != "json":
        raise InvalidInput("encoding is that of maps inside JSON: ask for format json, or drop it", param="encoding")
    return Job(model, task, form.pictures, wanted, resolved, chosen, began)


async def _form(house: Service, request: Request, names: tuple[str, ...]) -> forms.Form:
    try:
        async with asyncio.timeout(house.settings.request_timeout_s) as deadline:
            return await forms.read(request, names, house.settings.max_upload_bytes, house.in_thread)
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


def _headers(answer: Answer, began: float) -> dict[str, str]:
    """`total` runs from the request's first byte to here; the one inside JSON cannot count the writing of the JSON."""
    chosen = answer.options
    milliseconds = {**answer.timings_ms, "total": (time.perf_counter() - began) * 1e3}
    timings = (f"{name};dur={milliseconds.get(name, 0.0):.3f}" for name in PHASES)
    return {
        "Saccade-Model": answer.model,
        "Saccade-Digest": answer.digest,
        "Saccade-Steps": str(chosen.steps),
        "Saccade-Ensemble-Size": str(chosen.ensemble_size),
        "Saccade-Reduction": chosen.reduction,
        "Saccade-Seed": str(chosen.seed),
        "Saccade-Units": TASKS[answer.task].units,
        "Server-Timing": ", ".join(timings),
        "Vary": "Accept",
    }


async def index() -> Response:
    return JSONResponse(
        {
            "name": "saccade",
            "version": __version__,
            "tasks": {task: f"/{task}" for task in TASKS},
            "docs": "/docs",
            "openapi": "/openapi.json",
            "models": "/models",
            "health": ["/livez", "/readyz"],
            "metrics": "/metrics",
        }
    )


async def models(request: Request) -> Response:
    card = service(request).alias.current.card
    return JSONResponse({"default": card.name, "models": [card.model_dump(mode="json")]})


async def livez() -> Response:
    """This process answers; nothing more is claimed."""
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """A model answers. `fault` says what keeps the one that is `wanted` from being it."""
    alias = service(request).alias
    with alias.use() as model:
        fault = await model.readiness.check()
    if fault is not None:
        raise Problem(problems.UNAVAILABLE, f"Not ready: {fault}.", retry_after_s=model.readiness.ttl_s)
    told = {"model": model.name, "digest": model.card.digest, "wanted": alias.wanted.name, "fault": alias.fault}
    return JSONResponse({"status": "ready", **told})


async def metrics(request: Request) -> Response:
    return Response(service(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
