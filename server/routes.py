"""POST /depth, /flow, /amodal; GET /, /models, /livez, /readyz, /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from saccade import __version__
from saccade.tasks import TASKS, TaskName
from server import events, mask, problems
from server.events import Events, Witness
from server.jobs import routes as job_routes
from server.logs import state
from server.page import page
from server.problems import Problem
from server.respond import accepted, respond
from server.service import Service


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
    made.add_api_route("/mask", mask.answer, methods=["POST"])
    made.include_router(page.router())
    return made


def service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def _task_route(task: TaskName) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await _answer(request, task)

    return answer


async def _answer(request: Request, task: TaskName) -> Response:
    house = service(request)
    job_routes.idempotency_key(request)
    if job_routes.wanted(request):
        return await job_routes.accept(house, request, task)
    if not events.wanted(accepted(request)):
        return await respond(house, request, task)
    told = Events()
    watch = Witness(told, house.in_thread, str(state(request.scope).get("request_id", "")))
    return await events.begin(told, asyncio.create_task(events.tell(told, respond(house, request, task, watch))))


async def index(request: Request) -> Response:
    """The page for a browser, the same in JSON for everybody else."""
    if page.wants_page(request):
        return page.index(request)
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
            "features": {"mask": mask.installed()},
        },
        headers={"Vary": "Accept"},
    )


async def models(request: Request) -> Response:
    card = service(request).alias.current.card
    return JSONResponse({"default": card.name, "models": [card.model_dump(mode="json")]})


async def livez() -> Response:
    """This process answers; nothing more is claimed."""
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """A model answers. `fault` says what keeps the one that is `wanted` from being it."""
    house = service(request)
    alias = house.alias
    with alias.use() as model:
        fault = house.obstacle or await model.readiness.check()
    if fault is not None:
        raise Problem(problems.UNAVAILABLE, f"Not ready: {fault}.", retry_after_s=model.readiness.ttl_s)
    told = {"model": model.name, "digest": model.card.digest, "wanted": alias.wanted.name, "fault": alias.fault}
    return JSONResponse({"status": "ready", **told})


async def metrics(request: Request) -> Response:
    return Response(service(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
