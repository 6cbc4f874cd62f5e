"""Webhooks: signed, tried again, never sent inside, and never in the way of a job."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from saccade import signature
from saccade.backends import Backend
from saccade.errors import InvalidInput
from server.jobs import webhook
from server.jobs.records import Record
from server.jobs.webhook import Courier
from tests.server.house import House, running, until
from tests.server.test_jobs import submit
from tests.server.test_refusals import assert_problem

SECRET = "sixteen characters and more"


class Receiver:
    """An HTTP server that answers each request with the next of `statuses`, and 200 when they are used up."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.silent = False
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        self.requests.append((headers, await reader.readexactly(int(headers["content-length"]))))
        if self.silent:
            await reader.read()
        status = self.statuses.pop(0) if self.statuses else 200
        writer.write(f"HTTP/1.1 {status} So\r\nLocation: http://127.0.0.1:{self.port}/other\r\n".encode())
        writer.write(b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving(receiver: Receiver, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    server = await asyncio.start_server(receiver, "127.0.0.1", 0, ssl=context)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield f"{'http' if context is None else 'https'}://127.0.0.1:{receiver.port}/hook?a=b"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    return {"jobs_file": tmp_path / "jobs.sqlite", "webhook_secret_file": secret, "webhook_allow_private": True}


def told_of(backend: Backend, receiver: Receiver, tries: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The job's document after so many tries of its webhook."""

    async def story() -> dict[str, Any]:
        async with receiving(receiver) as url, running(backend, **settings) as house:
            path = (await submit(house, webhook=url)).headers["location"]
            await until(lambda: len(receiver.requests) >= tries)
            return await settled(house, path, tries)

    return asyncio.run(story())


async def settled(house: House, path: str, tries: int) -> dict[str, Any]:
    while True:
        job: dict[str, Any] = (await house.client.get(path)).json()
        if job["webhook"]["tries"] >= tries:
            return job
        await asyncio.sleep(0.01)


def test_what_a_webhook_says_and_how_it_is_signed(backend: Backend, settings: dict[str, Any]) -> None:
    receiver = Receiver()
    job = told_of(backend, receiver, 1, settings)
    assert job["webhook"] == {"status": "delivered", "tries": 1}
    ((headers, body),) = receiver.requests
    told = json.loads(body)
    assert (told["id"], told["status"], told["problem"]) == (job["id"], "done", None)
    assert (headers["content-type"], headers["host"]) == ("application/json", f"127.0.0.1:{receiver.port}")
    seconds, digest = (part.split("=")[1] for part in headers["saccade-signature"].split(","))
    assert hmac.new(SECRET.encode(), f"{seconds}.".encode() + body, "sha256").hexdigest() == digest
    assert signature.verify(body, headers["saccade-signature"], SECRET)
    assert not signature.verify(body + b" ", headers["saccade-signature"], SECRET)
    assert not signature.verify(body, headers["saccade-signature"], "another secret altogether")
    assert not signature.verify(body, headers["saccade-signature"], SECRET, now=int(seconds) + 301)
    assert not signature.verify(body, "t=1,v1=zz", SECRET)


def test_it_is_tried_again_and_then_given_up(
    backend: Backend, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "WAITS_S", (0.01, 0.02))
    assert told_of(backend, Receiver(500, 302), 3, settings)["webhook"] == {"status": "delivered", "tries": 3}
    settings["jobs_file"] = settings["jobs_file"].with_name("other.sqlite")
    receiver = Receiver(500, 500, 500, 500)
    assert told_of(backend, receiver, 3, settings)["webhook"] == {"status": "failed", "tries": 3}
    assert len(receiver.requests) == 3


def test_a_receiver_that_never_answers_is_in_nobodys_way(backend: Backend, settings: dict[str, Any]) -> None:
    async def story() -> list[str]:
        receiver = Receiver()
        receiver.silent = True
        async with receiving(receiver) as url, running(backend, **settings) as house:
            paths = [(await submit(house, webhook=url, seed=seed)).headers["location"] for seed in range(5)]
            for path in paths:
                await house.client.get(f"{path}/events")
            await until(lambda: receiver.requests)
            return [(await house.client.get(path)).json()["status"] for path in paths]

    assert asyncio.run(story()) == ["done"] * 5


def test_what_was_not_delivered_is_delivered_by_the_next_server(
    backend: Backend, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "WAITS_S", (0.01,) * 50)
    receiver = Receiver(*[503] * 3)

    async def story() -> dict[str, Any]:
        async with receiving(receiver) as url:
            async with running(backend, **settings) as house:
                path = (await submit(house, webhook=url)).headers["location"]
                await until(lambda: receiver.requests)
            async with running(backend, **settings) as house:
                await until(lambda: not receiver.statuses and len(receiver.requests) >= 4)
                return await settled(house, path, 3)

    assert asyncio.run(story())["webhook"]["status"] == "delivered"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://example.org/", "https"),
        ("https://user:password@example.org/", "user name"),
        ("https://127.0.0.1/", "private"),
        ("https://[::1]/", "private"),
        ("https://[::ffff:10.0.0.1]/", "private"),
        ("https://localhost/", "private"),
        ("https://169.254.169.254/latest/meta-data", "private"),
        ("https://example.org:99999/", "URL"),
        ("https:///path", "URL"),
        ("https://[oops/", "URL"),
    ],
)
def test_urls_that_are_refused_when_they_come(backend: Backend, settings: dict[str, Any], url: str, hint: str) -> None:
    settings["webhook_allow_private"] = False

    async def story() -> httpx.Response:
        async with running(backend, **settings) as house:
            return await submit(house, webhook=url)

    assert hint in assert_problem(asyncio.run(story()), 422, "invalid-input", "webhook")["detail"]


def test_private_networks_need_leave() -> None:
    webhook.check("http://10.0.0.1:8000/hook", allow_private=True)
    with pytest.raises(InvalidInput):
        webhook.check("ftp://10.0.0.1/hook", allow_private=True)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("fec0::1", "::7f00:1", "::5db8:d70e", "64:ff9b:1::5db8:d70e"),
    ],
)
def test_private_addresses_whatever_they_are_wrapped_in(address: str) -> None:
    assert not webhook.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "64:ff9b::5db8:d70e"])
def test_public_addresses(address: str) -> None:
    assert webhook.is_public(address)


def record(url: str) -> Record:
    return Record(1, "0" * 32, "", "depth", "done", 1.0, 2.0, 3.0, 1, True, None, "", url, "pending", 0)


def attempt(courier: Callable[[], Courier], url: str) -> bool:
    async def once() -> bool:
        sender = courier()
        try:
            return await sender.deliver(record(url))
        finally:
            await sender.aclose()

    return asyncio.run(once())


@pytest.mark.parametrize("found", [["127.0.0.1"], ["93.184.215.14", "127.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_a_name_with_a_private_address_is_not_called(found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return found

    def no_connection(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be connected to")

    monkeypatch.setattr(httpx.AsyncClient, "send", no_connection)
    assert not attempt(lambda: Courier(SECRET, False, resolver), "https://example.org/")


def test_the_connection_goes_to_the_address_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is looked up once; whatever the name server says later, the checked address gets the request, with the
    certificate of the name."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    kind = "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=hook.example -addext subjectAltName=DNS:hook.example"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *kind.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    looked_up: list[str] = []
    receiver = Receiver()

    async def resolver(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return ["127.0.0.1"] if len(looked_up) == 1 else ["192.0.2.1"]

    def by_name(host: object, *_: object, **__: object) -> object:
        assert host == "127.0.0.1", "the name is not looked up again"
        return real(host, *_, **__)  # type: ignore[arg-type]

    async def story(name: str) -> bool:
        trusted = ssl.create_default_context(cafile=str(certificate))
        looked_up.clear()
        async with receiving(receiver, context) as url:
            courier = Courier(SECRET, True, resolver)
            courier._http = httpx.AsyncClient(verify=trusted, trust_env=False)
            try:
                return await courier.deliver(record(url.replace("127.0.0.1", name)))
            finally:
                await courier.aclose()

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", by_name)
    assert asyncio.run(story("hook.example"))
    assert receiver.requests[0][0]["host"] == f"hook.example:{receiver.port}"
    assert not asyncio.run(story("other.example")), "the certificate is another name's"
    assert len(receiver.requests) == 1
