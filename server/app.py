"""The application, and the process around it."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from saccade import __version__
from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.errors import SaccadeError
from saccade.repository import Repository, find_repository
from server import openapi, problems, routes
from server.limits import BodyLimit, body_limit
from server.problems import LastResort
from server.service import Service
from server.settings import Settings
from server.telemetry import Metrics, Telemetry

logger = logging.getLogger(__name__)


def load(settings: Settings) -> Embedded:
    """The settings' model, in this process. Raises ModelError."""
    embedded = Embedded.load(
        Repository(find_repository(settings.model_repository)),
        settings.model,
        engine=settings.engine,
        precision=settings.precision,
        threads=settings.threads,
    )
    logger.info("%s runs on %s in %s", embedded.card.name, embedded.engine, embedded.precision)
    return embedded


def create_app(settings: Settings, backend: Backend | None = None) -> FastAPI:
    """The gateway as an ASGI app. Its lifespan loads the settings' model where no `backend` is given, starts the queue,
    and closes the backend at the end."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        chosen = backend if backend is not None else load(settings)
        service = app.state.service = Service(settings, chosen, metrics)
        await service.start()
        logger.info("ready: model %s, batches of up to %d", service.card.name, service.stepping.batch_size)
        try:
            yield
        finally:
            await service.aclose()

    app = FastAPI(title="Saccade", version=__version__, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.include_router(routes.router())
    app.openapi = lambda: openapi.document(settings)  # type: ignore[method-assign]
    problems.install(app)
    # The last added is the outermost.
    app.add_middleware(BodyLimit, limit=body_limit(settings.max_upload_bytes))
    app.add_middleware(Telemetry, metrics=metrics)
    app.add_middleware(LastResort)
    return app


def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT: then stop accepting, finish what was accepted within `drain_timeout_s`, and return.

    Exits with one line and a status that is not 0 if the model cannot be loaded or the port cannot be had.
    """
    _log(settings.log_level)
    listener = _listen(settings.host, settings.port)
    try:
        backend = load(settings)
    except SaccadeError as error:
        _exit(str(error))
    config = uvicorn.Config(
        create_app(settings, backend),
        log_config=None,
        access_log=settings.log_level == "debug",
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )
    # uvicorn raises the signal again once it has drained: that is a clean end.
    signal.signal(signal.SIGTERM, _leave)
    server = uvicorn.Server(config)
    logger.info("saccade %s starts on %s", __version__, _url(listener))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        logger.info("interrupted")
    if not server.started:
        _exit("the server could not start; see the log above")


def _log(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")


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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _leave(_: int, __: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _exit(reason: str) -> NoReturn:
    sys.exit(f"saccade: {reason}")
