"""HTTPS by the server itself: the certificate, and the one that replaces it."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

from saccade.errors import InvalidInput
from server.settings import Settings

LOOK_S = 60.0
logger = logging.getLogger(__name__)


def options(settings: Settings) -> dict[str, Any]:
    """What the HTTP server must be told; nothing where HTTPS is off. Raises InvalidInput for files that will not do."""
    if settings.tls_certificate is None:
        for name in ("tls_key", "tls_client_ca"):
            if getattr(settings, name) is not None:
                raise InvalidInput(f"setting {name} needs tls_certificate", param=name)
        return {}
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(trial, settings)
    chosen: dict[str, Any] = {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key}
    if settings.tls_client_ca is not None:
        chosen |= {"ssl_ca_certs": str(settings.tls_client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return chosen


def _load(context: ssl.SSLContext, settings: Settings) -> None:
    assert settings.tls_certificate is not None
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: "")
        if settings.tls_client_ca is not None:
            context.load_verify_locations(settings.tls_client_ca)
    except (OSError, ValueError) as error:
        told = "the TLS certificate, its key or the client authorities cannot be used"
        raise InvalidInput(f"{told} ({error or type(error).__name__})", param="tls_certificate") from error


async def follow(context: ssl.SSLContext, settings: Settings) -> None:
    """From now on give new connections the certificate that is in the files now, and trust authorities added to theirs.

    A context forgets no authority: one that is taken out of `tls_client_ca` is trusted until the server is restarted.
    """
    seen = _stamps(settings)
    while True:
        await asyncio.sleep(LOOK_S)
        if (now := _stamps(settings)) == seen:
            continue
        seen = now
        try:
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings)
            _load(context, settings)
        except InvalidInput as error:
            logger.error("the certificate stays as it was: %s", error)
        else:
            logger.info("the TLS certificate has been replaced")


def _stamps(settings: Settings) -> tuple[int, ...]:
    return tuple(map(_stamp, (settings.tls_certificate, settings.tls_key, settings.tls_client_ca)))


def _stamp(file: Path | None) -> int:
    try:
        return 0 if file is None else file.stat().st_mtime_ns
    except OSError:
        return 0
