"""A gateway for a bench: in a process of its own, on a free port, with the example pictures to ask about."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from saccade.tasks import TaskName

EXAMPLES = Path(__file__).parent.parent / "examples"
PARTS: dict[TaskName, dict[str, str]] = {
    "depth": {"image": "photo.jpg"},
    "flow": {"image": "frame_1.png", "next_image": "frame_2.png"},
    "amodal": {"image": "occluded.jpg", "mask": "occluded_mask.png"},
}
PATIENCE_S = 120.0


@asynccontextmanager
async def gateway(log: Path | None = None, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a `saccade serve` that is ready; ended after. Its queue takes all that comes: what is measured is
    never who is let in. Raises RuntimeError if it ends, TimeoutError if it is not ready in two minutes."""
    async with spawned(log, **settings) as (client, _):
        yield client


@asynccontextmanager
async def spawned(
    log: Path | None = None, **settings: object
) -> AsyncIterator[tuple[httpx.AsyncClient, subprocess.Popen[bytes]]]:
    """`gateway`, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = {"port": port, "queue_limit": 1_000_000, "jobs_file": "off", **settings}
    environment = os.environ | {f"SACCADE_{name.upper()}": str(value) for name, value in chosen.items()}
    command = [sys.executable, "-m", "saccade", "serve"]
    with (log or Path(os.devnull)).open("ab") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        free = httpx.Limits(max_connections=None)  # what waits is the server's, not the client's
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=free) as client:
            await _ready(client, process)
            yield client, process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


async def ask(
    client: httpx.AsyncClient, task: TaskName, headers: dict[str, str] | None = None, **options: object
) -> httpx.Response:
    """The task's example pictures, answered as npy; options that are None are the model's."""
    files = {name: (file, (EXAMPLES / file).read_bytes()) for name, file in PARTS[task].items()}
    fields = {name: str(value) for name, value in options.items() if value is not None}
    return await client.post(
        f"/{task}", files=files, data=fields, headers={"Accept": "application/x-npy"} | (headers or {})
    )


async def _ready(client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the gateway ended with status {process.returncode}")
            with suppress(httpx.TransportError):
                if (await client.get("/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.1)
