"""Open a model where the settings say that models run."""

from __future__ import annotations

import asyncio
import logging

from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.repository import Repository, find_repository
from server.settings import Settings

logger = logging.getLogger(__name__)


async def open_backend(settings: Settings, model: str | None = None) -> Backend:
    """The model, or where it is None the repository's only one, compiled in this process or behind Triton.

    Raises ModelError where the model is not in order, BackendUnavailable where Triton cannot be asked now.
    """
    if settings.backend == "triton":
        from saccade.backends.triton import Triton  # and with it gRPC, which the embedded engine does not need

        logging.getLogger("grpc").setLevel(logging.INFO)  # in debug it has a line for every call
        triton = await Triton.connect(settings.endpoints, model, timeout_s=settings.triton_timeout_s)
        logger.info("%s runs on Triton at %s", triton.card.name, ", ".join(settings.endpoints))
        return triton
    return await asyncio.to_thread(_embedded, settings, model)


def _embedded(settings: Settings, model: str | None) -> Embedded:
    wanted = settings.ratios.split(",") if settings.ratios else []
    embedded = Embedded.load(
        Repository(find_repository(settings.model_repository)),
        model,
        engine=settings.engine,
        precision=settings.precision,
        threads=settings.threads,
        streams=settings.streams,
        ratios=[(int(height), int(width)) for width, _, height in (one.partition(":") for one in wanted)],
    )
    told = (embedded.card.name, embedded.engine, embedded.precision, embedded.threads, embedded.streams)
    logger.info("%s runs on %s in %s, threads: %d, streams: %d", *told)
    return embedded
