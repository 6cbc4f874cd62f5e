"""The paths under /v2, as KServe and Triton define them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from saccade import __version__
from saccade.backends import Ticket
from saccade.errors import ModelError
from saccade.repository import Repository, find_repository
from server import problems
from server.admission import Overloaded
from server.limits import body_limit
from server.model import Model
from server.problems import ClientGone, Problem
from server.service import Service, while_connected
from server.settings import Settings
from server.v2 import raws, tensors
from server.v2.raws import Raw, Raws
from server.v2.statistics import Statistics
from server.v2.tensors import LENGTH_HEADER, Arrays, refused

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
LABEL = "v2"
Route = Callable[[Request], Awaitable[Response]]
logger = logging.getLogger(__name__)


@dataclass
class Shelf:
    """The raw graphs of every model that serves, read when they are first asked for."""

    settings: Settings
    _raws: WeakKeyDictionary[Model, Raws] = field(default_factory=WeakKeyDictionary)
    _statistics: WeakKeyDictionary[Model, dict[str, Statistics]] = field(default_factory=WeakKeyDictionary)

    def of(self, model: Model) -> Raws:
        if model not in self._raws:
            found = raws.read(self.repository(), model.card)
            self._raws[model] = Raws(model, found, self.settings.max_processing_resolution)
        return self._raws[model]

    def statistics(self, model: Model) -> dict[str, Statistics]:
        return self._statistics.setdefault(model, defaultdict(Statistics))

    def repository(self) -> Repository:
        return Repository(find_repository(self.settings.model_repository))


def router(settings: Settings) -> APIRouter:
    """Where Triton runs the models, every path says to ask Triton itself, which speaks this protocol.

    Passing it through would open a way around admission to whatever else that server has, its model control included.
    """
    made = APIRouter()
    if settings.backend == "triton":
        made.add_api_route("/v2{rest:path}", _elsewhere, methods=["GET", "POST"], name="v2")
        return made
    routes = _Routes(Shelf(settings))
    for path, answer in routes.reading.items():
        made.add_api_route(f"/v2{path}", answer, methods=["GET"])
    for path in ("/models/{name}", "/models/{name}/versions/{version}"):
        for ending, answer in routes.of_a_model.items():
            made.add_api_route(f"/v2{path}{ending}", answer, methods=["GET"])
        made.add_api_route(f"/v2{path}/infer", routes.infer, methods=["POST"])
    made.add_api_route("/v2/repository/index", routes.index, methods=["POST"])
    made.add_api_route("/v2/repository/models/{name}/{change}", _no_change, methods=["POST"])
    return made


async def _elsewhere(_: Request) -> Response:
    told = "The models run in Triton, which speaks this protocol itself: ask it at its own HTTP or gRPC port."
    raise Problem(problems.NOT_FOUND, told)


async def _no_change(_: Request) -> Response:
    raise refused("Models are not loaded and unloaded from here: the setting model_file moves the server to another.")


class _Routes:
    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.reading: dict[str, Route] = {
            "": self.server,
            "/health/live": self.live,
            "/health/ready": self.ready,
            "/models/stats": self.all_statistics,
        }
        self.of_a_model: dict[str, Route] = {
            "": self.metadata,
            "/ready": self.model_ready,
            "/config": self.configuration,
            "/stats": self.statistics,
        }

    async def server(self, _: Request) -> Response:
        return JSONResponse({"name": "saccade", "version": __version__, "extensions": EXTENSIONS})

    async def live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        house = _house(request)
        await _check_ready(house, house.alias.current)
        return JSONResponse({"ready": True})

    async def model_ready(self, request: Request) -> Response:
        model, _ = await self._asked(request)
        await _check_ready(_house(request), model)
        return JSONResponse({"ready": True})

    async def metadata(self, request: Request) -> Response:
        return JSONResponse((await self._asked(request))[1].metadata())

    async def configuration(self, request: Request) -> Response:
        return JSONResponse((await self._asked(request))[1].configuration())

    async def statistics(self, request: Request) -> Response:
        model, raw = await self._asked(request)
        return self._told(model, [raw])

    async def all_statistics(self, request: Request) -> Response:
        model = _house(request).alias.current
        return self._told(model, list((await self._raws(request, model)).raws.values()))

    def _told(self, model: Model, asked: list[Raw]) -> Response:
        kept = self.shelf.statistics(model)
        return JSONResponse({"model_stats": [kept[raw.name].document(raw, model.tally) for raw in asked]})

    async def index(self, request: Request) -> Response:
        """Every model of the repository; those of the serving model are ready."""
        house = _house(request)
        loaded = (await self._raws(request, house.alias.current)).raws
        names = set(loaded) | set(await house.in_thread(lambda: self.shelf.repository().models()))
        return JSONResponse([_entry(name, loaded.get(name)) for name in sorted(names)])

    async def infer(self, request: Request) -> Response:
        house, began = _house(request), time.perf_counter()
        await self._asked(request)  # before a byte of the body is read
        body, encoding = await _body(house, request), request.headers.get("content-encoding", "")
        length, most = request.headers.get(LENGTH_HEADER), _limit(house)
        with ExitStack() as held, house.alias.use() as model:
            held.enter_context(house.guard.hold(tensors.height(body, encoding, most)))
            call = await house.in_thread(lambda: tensors.read(body, length, encoding, most))
            all_raws = await self._raws(request, model)
            raw = _find(all_raws, request)
            statistics = self.shelf.statistics(model)[raw.name]
            feeds = await house.in_thread(lambda: all_raws.feeds(raw, call))
            read_s, ticket = time.perf_counter() - began, Ticket()
            try:
                results = await _result(house, request, all_raws, raw, feeds, ticket, held)
            except BaseException:
                statistics.failed(time.perf_counter() - began)
                raise
            ran_s = time.perf_counter() - began - read_s
            sent = raw.sent(results)
            body, headers, media_type = await house.in_thread(lambda: tensors.write(call, raw.name, raw.version, sent))
            wrote_s = time.perf_counter() - began - read_s - ran_s
            phases = {"queue": ticket.queue_s, "compute_input": read_s, "compute_output": wrote_s}
            statistics.succeeded(phases | {"compute_infer": max(0.0, ran_s - ticket.queue_s)})
        return Response(body, headers=headers, media_type=media_type)

    async def _asked(self, request: Request) -> tuple[Model, Raw]:
        model = _house(request).alias.current
        return model, _find(await self._raws(request, model), request)

    async def _raws(self, request: Request, model: Model) -> Raws:
        return await _house(request).in_thread(partial(self.shelf.of, model))


def _house(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def _body(house: Service, request: Request) -> bytes:
    try:
        async with asyncio.timeout(house.settings.request_timeout_s) as deadline:
            return await request.body()
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise Problem(problems.SLOW_UPLOAD, "The body did not arrive in time. Send it faster, or smaller.") from error


def _limit(house: Service) -> int:
    """Bytes of a body, unpacked."""
    return body_limit(house.settings.max_upload_bytes, house.settings.max_clip_bytes)


def _find(found: Raws, request: Request) -> Raw:
    """The raw model of the path. Raises Problem 404."""
    name, version = request.path_params["name"], request.path_params.get("version")
    raw = found.raws.get(name)
    if raw is None or version not in (None, raw.version):
        told = repr(name[:64]) + (f", version {version[:16]}," if raw is not None and version else "")
        raise Problem(problems.NOT_FOUND, f"Request for unknown model: {told} is not found")
    return raw


def _entry(name: str, raw: Raw | None) -> dict[str, Any]:
    if raw is None:
        return {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "not loaded"}
    return {"name": name, "version": raw.version, "state": "READY", "reason": ""}


async def _check_ready(house: Service, model: Model) -> None:
    with model.used():
        fault = house.obstacle or await model.readiness.check()
    if fault is not None:
        raise Problem(problems.UNAVAILABLE, f"Not ready: {fault}.", retry_after_s=model.readiness.ttl_s)


async def _result(
    house: Service, request: Request, all_raws: Raws, raw: Raw, feeds: Arrays, ticket: Ticket, held: ExitStack
) -> dict[str, Any]:
    """The outputs, unless the queue is full, the client leaves or the time is up: then the work is withdrawn.

    What was promised for reading, `held`, gives way to what the call itself takes.
    """
    try:
        async with asyncio.timeout(house.settings.request_timeout_s) as deadline:
            held.close()
            with house.admission.admit(all_raws.cost(raw, feeds)), house.guard.hold(all_raws.footprint(feeds)):
                return await while_connected(request.receive, all_raws.run(raw, feeds, ticket))
    except Overloaded as error:
        house.metrics.rejected.labels(LABEL).inc()
        told = "The queue is full. Try again later, or send fewer rows."
        raise Problem(problems.OVERLOADED, told, retry_after_s=error.retry_after_s) from error
    except ClientGone:
        house.metrics.cancelled.labels(LABEL, "disconnect").inc()
        raise
    except ModelError as error:  # the tensors are the caller's own: the same model answers everybody else
        logger.warning("%s does not run on what it was sent: %s", raw.name, error)
        raise refused(f"The model does not run on these tensors: {error}.") from error
    except TimeoutError as error:
        if not deadline.expired():
            raise
        house.metrics.cancelled.labels(LABEL, "timeout").inc()
        seconds = house.settings.request_timeout_s
        told = f"No answer within {seconds:g} s; the work was withdrawn. Try later, or send fewer rows."
        raise Problem(problems.TIMEOUT, told, retry_after_s=min(seconds, 30.0)) from error
