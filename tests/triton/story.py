"""A gateway in this process in front of real Tritons, and requests to it while something happens to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from tritonclient.grpc.service_pb2 import RepositoryModelLoadRequest, RepositoryModelUnloadRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from server.app import create_app
from server.service import Service
from server.settings import Settings
from tests.server.house import files, parse_metrics
from tests.triton.server import TritonServer

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Asked:
    """One answer: its status, its problem's type (empty if it is none), its body, and when it came."""

    status: int
    problem: str
    body: bytes
    headers: httpx.Headers
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Gateway:
    """The app with the backend `triton`, as `create_app` makes it."""

    def __init__(self, client: httpx.AsyncClient, service: Service) -> None:
        self.client, self.service = client, service

    async def ask(self, task: str = "depth", **options: Any) -> Asked:
        began = time.monotonic()
        answer = await self.client.post(
            f"/{task}", files=files(task), params=options, headers={"Accept": "application/x-npy"}
        )
        problem = "" if answer.is_success else answer.json()["type"].rpartition(":")[2]
        return Asked(answer.status_code, problem, answer.content, answer.headers, began, time.monotonic())

    def asking(self, count: int, **options: Any) -> list[asyncio.Task[Asked]]:
        """Requests under way, each with a seed of its own."""
        return [asyncio.create_task(self.ask(seed=seed, **options)) for seed in range(count)]

    async def ready(self) -> bool:
        return (await self.client.get("/readyz")).status_code == 200

    async def until_ready(self, ready: bool = True) -> float:
        """Seconds until it is, or is not."""
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            while await self.ready() is not ready:
                await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def until_up(self, count: int) -> None:
        """So many endpoints are up."""
        async with asyncio.timeout(PATIENCE_S):
            while list(self.service.alias.current.endpoints.values()).count("up") < count:
                await asyncio.sleep(0.05)

    async def until_back(self, *servers: TritonServer) -> float:
        """Seconds until a request is answered. Those of `servers` that have died are started again, as their containers
        would be: on a crowded machine the Python backend of this Triton has been seen to end its server."""
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            while (await self.ask(steps=1)).status != 200:
                for server in servers:
                    if server.has_died:
                        await asyncio.to_thread(server.start)
                await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def until_running(self) -> None:
        """A batch is in Triton's hands."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.service.alias.current.stepping.running:
                await asyncio.sleep(0.002)

    async def leaks(self) -> dict[str, float]:
        """Gauges that ought to be 0 when nobody asks, and are not."""
        counters = parse_metrics((await self.client.get("/metrics")).text)
        names = ("pending_work", "pending_requests", "queue_rows", "running_rows")
        return {name: counters[f"saccade_{name}"] for name in names if counters[f"saccade_{name}"]}


@asynccontextmanager
async def gateway(*servers: TritonServer, ready: bool = True, **settings: Any) -> AsyncIterator[Gateway]:
    """In front of `servers`; waits until it is ready."""
    chosen = {"backend": "triton", "triton_url": ",".join(s.url for s in servers), "batch_size": 1, **settings}
    app = create_app(Settings.load(**{"readiness_ttl_s": 0.1, **chosen}))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://saccade", timeout=PATIENCE_S) as client,
    ):
        house = Gateway(client, app.state.service)
        if ready:
            await house.until_ready()
        yield house


def inject(repository: Path, model: str, fault: str | None) -> None:
    """Make a stand-in backend misbehave from its next batch on; None ends it."""
    file = repository / model / "fault"
    if fault is None:
        file.unlink(missing_ok=True)
    else:
        draft = file.with_suffix(".draft")
        draft.write_text(fault)
        draft.rename(file)


def reload(server: TritonServer, model: str, pause_s: float = 0.5) -> None:
    """As an operator does it: the model is gone for a while."""
    with grpc.insecure_channel(server.url) as channel:
        stub = GRPCInferenceServiceStub(channel)
        stub.RepositoryModelUnload(RepositoryModelUnloadRequest(model_name=model))
        time.sleep(pause_s)
        stub.RepositoryModelLoad(RepositoryModelLoadRequest(model_name=model))
