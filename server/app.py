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

from saccade import __version__
from saccade.errors import SaccadeError
from server import openapi, problems, routes
from server.alias import Opener
from server.limits import BodyLimit, body_limit
from server.opening import open_backend
from server.problems import LastResort
from server.service import Service
from server.settings import Settings
from server.telemetry import Metrics, Telemetry

logger = logging.getLogger(__name__)


def create_app(settings: Settings, opener: Opener | None = None) -> FastAPI:
    """The gateway as an ASGI app; `app.state.service` is what its routes share.

    Its lifespan begins with the model that the settings want, opened by `opener` (by default as the settings say),
    follows what they want later, and closes at the end whatever is open.
    """
    metrics = Metrics()
    service = Service(settings, opener or partial(open_backend, settings), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await service.begin()
            service.alias.follow()
            yield
        finally:
            await service.aclose()

    app = FastAPI(title="Saccade", version=__version__, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.state.service = service
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
    signal.signal(signal.SIGTERM, _leave)  # at once: by itself it does nothing to the first process of a container
    _log(settings.log_level)
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
    await cast(Service, app.state.service).begin()  # here rather than in the lifespan, whose errors are stack traces
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=settings.log_level == "debug",
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )
    server = uvicorn.Server(config)
    logger.info("saccade %s starts on %s", __version__, _url(listener))
    await server.serve(sockets=[listener])
    if not server.started:
        _exit("the server could not start; see the log above")


def _log(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")


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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _leave(_: int, __: FrameType | None) -> NoReturn:
    """A clean end; uvicorn too raises the signal again once it has drained."""
    raise SystemExit(0)


def _exit(reason: str) -> NoReturn:
    sys.exit(f"saccade: {reason}")
