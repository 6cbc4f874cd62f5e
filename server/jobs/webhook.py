"""Telling a caller's server that a job has ended: signed, repeated with patience, never to a private address."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import httpx

from saccade import __version__, signature
from saccade.errors import InvalidInput
from server.jobs.records import Record, document

PATIENCE_S = 10.0
WAITS_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
"""Between the tries; after the last one follows one more try."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")
NEVER = (ipaddress.ip_network("::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
"""IPv4 in IPv6 of old, and the NAT64 of private networks: Python calls both global."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
logger = logging.getLogger(__name__)


class Refused(Exception):
    """The address is none that we connect to."""


def check(url: str, allow_private: bool) -> None:
    """What can be said of a webhook's URL without looking its name up. Raises InvalidInput."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise InvalidInput("webhook must be a URL such as https://example.org/hook", param="webhook")
    if parts.username is not None or parts.password is not None:
        raise InvalidInput(
            "webhook must not hold a user name or password: its signature says who calls", param="webhook"
        )
    if parts.scheme != "https" and not (allow_private and parts.scheme == "http"):
        raise InvalidInput("webhook must be an https URL", param="webhook")
    if not allow_private and _is_private_literal(host):
        raise InvalidInput("webhook must not be a private address", param="webhook")


def is_public(text: str) -> bool:
    """Whether an address is one of the Internet's, also when it carries another one inside."""
    address = ipaddress.ip_address(text)
    inside: Address | None = None
    if isinstance(address, ipaddress.IPv6Address):
        if address.is_site_local or any(address in network for network in NEVER):
            return False
        inside = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return all(one.is_global and not one.is_multicast for one in (address, inside) if one is not None)


def _is_private_literal(host: str) -> bool:
    try:
        return not is_public(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Courier:
    """Delivers one webhook at a time to whoever calls it.

    The name is looked up once, every address that it has is checked, and the connection goes to the checked address
    (the certificate is still that of the name): an answer that changes between two look-ups changes nothing. Redirects
    are not followed, proxies of the environment not used.
    """

    def __init__(self, secret: str, allow_private: bool, resolver: Resolve = resolve) -> None:
        self._secret, self._allow_private, self._resolve = secret, allow_private, resolver
        self._http = httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, follow_redirects=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def deliver(self, record: Record) -> bool:
        """One try: whether the receiver answered with 2xx in time."""
        assert record.webhook is not None  # only such jobs come here
        try:
            body = json.dumps(document(record)).encode()
            async with asyncio.timeout(PATIENCE_S):
                return await self._post(httpx.URL(record.webhook), body)
        except Exception as error:  # whatever a stranger's server does, the others' webhooks go on
            logger.info("webhook of job %s failed: %s", record.id, error or type(error).__name__)
            return False

    async def _post(self, url: httpx.URL, body: bytes) -> bool:
        address = await self._address(url)
        headers = {
            "Host": url.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": f"saccade/{__version__}",
            signature.HEADER: signature.sign(body, self._secret, int(time.time())),
        }
        request = self._http.build_request(
            "POST",
            url.copy_with(host=address),
            headers=headers,
            content=body,
            extensions={"sni_hostname": url.host},
        )
        response = await self._http.send(request, stream=True)  # what it says beyond its status is never read
        await response.aclose()
        if not response.is_success:
            logger.info("webhook to %s was answered with %d", url.host, response.status_code)
        return response.is_success

    async def _address(self, url: httpx.URL) -> str:
        found = await self._resolve(url.host, url.port or (443 if url.scheme == "https" else 80))
        if not found:
            raise Refused("the name has no address")
        if not self._allow_private and not all(map(is_public, found)):
            raise Refused("the name has a private address")
        return found[0]


def wait_s(tries: int) -> float | None:
    """Seconds from the end of try `tries` (1 is the first) to the next; None after the last."""
    return WAITS_S[tries - 1] if tries <= len(WAITS_S) else None
