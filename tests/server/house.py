"""A server inside the test, pictures to send to it, and backends that wait or fail on command."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from PIL import Image

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.card import Card
from server.alias import Opener
from server.app import create_app
from server.model import Model
from server.service import Service
from server.settings import Settings

WIDTH, HEIGHT = 60, 40
PROBLEM = "application/problem+json"


def png(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> bytes:
    """Smooth colours, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return save(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def mask(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    inside = np.zeros((height, width), np.uint8)
    inside[height // 4 : height // 2, width // 4 : width // 2] = 255
    return save(Image.fromarray(inside))


def save(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


PICTURES: dict[str, dict[str, bytes]] = {
    "depth": {"image": png()},
    "flow": {"image": png(), "next_image": png(seed=1)},
    "amodal": {"image": png(), "mask": mask()},
}


def files(task: str, **replaced: bytes) -> dict[str, tuple[str, bytes]]:
    return {name: (f"{name}.png", data) for name, data in (PICTURES[task] | replaced).items()}


class House:
    def __init__(self, client: httpx.AsyncClient, service: Service) -> None:
        self.client, self.service = client, service

    @property
    def model(self) -> Model:
        """The one that serves."""
        return self.service.alias.current

    async def ask(self, task: str, accept: str | None = None, **options: Any) -> httpx.Response:
        """POST /task with this test's pictures; options go into the query."""
        headers = {} if accept is None else {"Accept": accept}
        return await self.client.post(f"/{task}", files=files(task), params=options, headers=headers)

    async def counters(self) -> dict[str, float]:
        """/metrics, parsed."""
        return parse_metrics((await self.client.get("/metrics")).text)


def parse_metrics(text: str) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in lines}


@asynccontextmanager
async def running(backend: Backend, **settings: Any) -> AsyncIterator[House]:
    """The app around a backend that outlives it. A test that hangs fails after half a minute."""

    async def opener(_: str | None) -> Backend:
        return Wrapped(backend)

    async with housed(opener, **settings) as house:
        yield house


@asynccontextmanager
async def housed(opener: Opener, **settings: Any) -> AsyncIterator[House]:
    """The app around the backends that `opener` gives it."""
    app = create_app(Settings.load(**{"batch_size": 1, "jobs_file": "off", **settings}), opener)
    transport = httpx.ASGITransport(app)
    async with (
        asyncio.timeout(30),
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://saccade") as client,
    ):
        yield House(client, app.state.service)


async def until(condition: Callable[[], object]) -> None:
    """Wait until the callable is true."""
    while not condition():
        await asyncio.sleep(0.005)


class Clock:
    """Time that passes on command."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Wrapped:
    """A backend that passes everything on."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def card(self) -> Card:
        return self.inner.card

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        return await self.inner.encode(image, prompt, task, ticket)

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        return await self.inner.denoise(latent, timestep, task, conditioning, ticket)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return await self.inner.decode(latent, ticket)

    async def aclose(self) -> None:
        return None


class Gated(Wrapped):
    """Once shut, denoises only after `open`; `rows` counts what it was asked for since, copies included."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self._open = asyncio.Event()
        self._open.set()
        self.rows = 0

    def shut(self) -> None:
        self._open.clear()
        self.rows = 0

    def open(self) -> None:
        self._open.set()

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        self.rows += len(latent)
        await self._open.wait()
        return await super().denoise(latent, timestep, task, conditioning, ticket)


class Failing(Wrapped):
    """Raises `error` from every denoise while it is set."""

    error: Exception | None = None

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        if self.error is not None:
            raise self.error
        return await super().denoise(latent, timestep, task, conditioning, ticket)
