"""The application, and the process around it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import NoReturn, cast

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from saccade import __version__
from saccade.errors import SaccadeError
from server import allocator, drain, logs, openapi, problems, routes, tls, tracing, v2, walls
from server.alias import Opener
from server.jobs import routes as job_routes
from server.jobs.runner import Jobs
from server.keys import Keys, Ring
from server.limits import BodyLimit, body_limit
from server.opening import open_backend
from server.problems import LastResort
from server.service import Service
from server.settings import Settings
from server.telemetry import Metrics, Telemetry

ALLOWED = (
    *("Authorization", "X-API-Key", "X-Request-ID", "Content-Type", "Accept", "Prefer", "Idempotency-Key"),
    *("Last-Event-ID", "traceparent", "tracestate"),
)
EXPOSED = (
    *("X-Request-ID", "Server-Timing", "Retry-After", "Location", "Preference-Applied", "Saccade-Model"),
    *("Saccade-Digest", "Saccade-Steps", "Saccade-Ensemble-Size", "Saccade-Reduction", "Saccade-Seed", "Saccade-Units"),
)
"""Headers that a web page of another origin may send, and read."""
logger = logging.getLogger(__name__)


def create_app(settings: Settings, opener: Opener | None = None) -> FastAPI:
    """The gateway as an ASGI app; `app.state.service` is what its routes share.

    Its lifespan begins with the model that the settings want, opened by `opener` (by default as the settings say),
    follows what they want later, and closes at the end whatever is open.
    """
    service = Service(settings, opener or partial(open_backend, settings), Metrics())
    ring = None if settings.keys_file is None else Ring(settings.keys_file)
    jobs = Jobs(service) if ring is None else Jobs(service, ring.weight_of)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = [service.watchdog.follow(), *([] if ring is None else [ring.follow()])]
        tasks = [asyncio.create_task(follow) for follow in following]
        try:
            await service.begin()
            await jobs.begin()
            service.alias.follow()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await jobs.aclose()
            await service.aclose()

    app = FastAPI(title="Saccade", version=__version__, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.state.service, app.state.jobs = service, jobs
    app.include_router(routes.router())
    app.include_router(job_routes.router())
    app.include_router(v2.router(settings))
    app.openapi = lambda: walls.dress(openapi.document(settings), settings)  # type: ignore[method-assign]
    problems.install(app)
    _add_layers(app, service, ring)
    return app


def _add_layers(app: FastAPI, service: Service, ring: Ring | None) -> None:
    """What every request passes, the innermost first. Pure ASGI throughout, so that a client's leaving is noticed."""
    settings = service.settings
    largest = body_limit(settings.max_upload_bytes, settings.max_clip_bytes)
    app.add_middleware(BodyLimit, limit=largest, guard=service.guard)
    if ring is not None:
        app.add_middleware(Keys, ring=ring)
    app.add_middleware(LastResort, drain=service.drain)
    app.add_middleware(v2.ProtocolErrors)
    if origins := settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=ALLOWED,
            expose_headers=EXPOSED,
        )
    app.add_middleware(drain.Shed, drain=service.drain)
    app.add_middleware(Telemetry, metrics=service.metrics)
    app.add_middleware(logs.AccessLog)
    if service.tracing is not None:
        app.add_middleware(tracing.Traced, tracing=service.tracing)
    app.add_middleware(logs.RequestIds)


def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT: then accept for `drain_delay_s` more, finish what was accepted within
    `drain_timeout_s`, and return.

    Exits with one line and a status that is not 0 if the model cannot be loaded or the port cannot be had.
    """
    signal.signal(signal.SIGTERM, _leave)  # at once: by itself it does nothing to the first process of a container
    logs.install(settings.log_level, settings.log_format)
    logger.info("memory: %s", allocator.settle())
    _check_temporary_folder()
    listener = _listen(settings.host, settings.port)
    try:
        asyncio.run(_serve(settings, listener))
    except SaccadeError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        logger.info("interrupted")


async def _serve(settings: Settings, listener: socket.socket) -> None:
    """Raises SaccadeError if the model cannot be opened and will not come by itself."""
    app = create_app(settings)
    service = cast(Service, app.state.service)
    await service.begin()  # here rather than in the lifespan, whose errors are stack traces
    await cast(Jobs, app.state.jobs).begin()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        **tls.options(settings),
    )
    config.load()
    bound_s = settings.drain_delay_s + settings.drain_timeout_s + drain.CLOSING_S
    server = drain.Server(config, service.drain, settings.drain_delay_s, bound_s)
    logger.info("saccade %s starts on %s", __version__, _url(listener, "http" if config.ssl is None else "https"))
    renewing = None if config.ssl is None else asyncio.create_task(tls.follow(config.ssl, settings))
    await server.serve(sockets=[listener])
    if renewing is not None:
        renewing.cancel()
    if not server.started:
        _exit("the server could not start; see the log above")


def _check_temporary_folder() -> None:
    try:
        tempfile.TemporaryFile().close()
    except OSError as error:
        _exit(f"large uploads need a folder to write to: {error.strerror or error}. Mount one at /tmp or set TMPDIR.")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        _exit(f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --port or --host.")
    return listener


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _leave(_: int, __: FrameType | None) -> NoReturn:
    """A clean end; uvicorn too raises the signal again once it has drained."""
    raise SystemExit(0)


def _exit(reason: str) -> NoReturn:
    sys.exit(f"saccade: {reason}")
