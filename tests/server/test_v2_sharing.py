"""Raw calls stand in the same queue as everybody's, and spoil nobody's answer."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.errors import ModelError
from server.v2 import tensors
from server.v2.tensors import Call
from tests.server.house import Gated, House, Wrapped, files, running, until
from tests.toy import LABELS, LATENT

CELLS = 8


def body(value: float = 0.5, rows: int = 1) -> bytes:
    """An inference of the toy's denoiser at 64 px."""
    maps = dict.fromkeys(("latent", "image_latent", "prompt_latent"), [value] * rows * LATENT * CELLS * CELLS)
    labels = {"timestep": [10] * rows, "task": [LABELS["depth"]] * rows}
    inputs = [
        {"name": name, "datatype": "FP32", "shape": [rows, LATENT, CELLS, CELLS], "data": data}
        for name, data in maps.items()
    ] + [{"name": name, "datatype": "INT64", "shape": [rows, 1], "data": data} for name, data in labels.items()]
    return json.dumps({"inputs": inputs}).encode()


async def infer(house: House, content: bytes) -> httpx.Response:
    return await house.client.post("/v2/models/toy/infer", content=content)


def test_what_a_packed_body_becomes_is_promised_before_it_is_unpacked(
    backend: Backend, toy_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = gzip.compress(body()), body()
    held: list[int] = []

    async def story() -> None:
        async with running(backend, model_repository=toy_repository) as house:
            real = tensors.read

            def read(*given: Any) -> Call:
                held.append(house.service.guard.held)
                return real(*given)

            monkeypatch.setattr(tensors, "read", read)
            url = "/v2/models/toy/infer"
            assert (await infer(house, plain)).status_code == 200
            answer = await house.client.post(url, content=packed, headers={"Content-Encoding": "gzip"})
            assert answer.status_code == 200
            assert house.service.guard.held == 0

    asyncio.run(story())
    assert held == [len(plain), 1032 * len(packed)]


class Strict(Wrapped):
    """Answers NaN for a latent beyond a million, as an engine does when it overflows: for which all that shares the
    batch is refused."""

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        if np.abs(latent).max() > 1e6:
            raise ModelError("the denoiser of toy produced non-finite values")
        return await super().denoise(latent, timestep, task, conditioning, ticket)


def test_a_full_queue_refuses_raw_calls_too(backend: Backend, toy_repository: Path) -> None:
    async def story() -> tuple[httpx.Response, dict[str, float]]:
        gate = Gated(backend)
        async with running(gate, queue_limit=1, model_repository=toy_repository) as house:
            gate.shut()
            pending = asyncio.create_task(house.ask("depth", steps=50))
            await until(lambda: gate.rows)
            refused = await infer(house, body())
            counters = await house.counters()
            gate.open()
            assert (await pending).status_code == 200
            assert (await infer(house, body())).status_code == 200
            return refused, counters

    refused, counters = asyncio.run(story())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "queue is full" in refused.json()["error"]
    assert counters['saccade_rejected_total{task="v2"}'] == 1


def test_raw_steps_share_a_batch_with_other_requests(backend: Backend, toy_repository: Path) -> None:
    async def story() -> dict[str, float]:
        gate = Gated(backend)
        async with running(gate, batch_size=2, model_repository=toy_repository) as house:
            assert (await infer(house, body())).status_code == 200  # the first at its size asks the encoder too
            gate.shut()
            first = asyncio.create_task(house.ask("depth", steps=1, processing_resolution=64, ensemble_size=2))
            await until(lambda: gate.rows)
            others = [asyncio.create_task(infer(house, body())) for _ in range(2)]
            await until(lambda: house.model.stepping.waiting == 2)
            gate.open()
            assert [answer.status_code for answer in await asyncio.gather(first, *others)] == [200] * 3
            return await house.counters()

    counters = asyncio.run(story())
    assert (
        counters['saccade_batch_rows_bucket{kind="denoise",le="1.0"}']
        < counters['saccade_batch_rows_bucket{kind="denoise",le="2.0"}']
    )


def test_tensors_that_break_the_model_break_no_other_answer(backend: Backend, toy_repository: Path) -> None:
    async def story() -> list[httpx.Response]:
        gate = Gated(Strict(backend))
        async with running(gate, batch_size=4, model_repository=toy_repository) as house:
            await infer(house, body())
            gate.shut()
            first = asyncio.create_task(infer(house, body()))
            await until(lambda: gate.rows)
            calls = [
                infer(house, body(1e9)),
                house.ask("depth", steps=1, processing_resolution=64),
                infer(house, body()),
            ]
            waiting = [asyncio.create_task(call) for call in calls]
            await until(lambda: house.model.stepping.waiting == 3)
            gate.open()
            return list(await asyncio.gather(*waiting, first))

    spoilt, depth, other, _ = asyncio.run(story())
    assert spoilt.status_code == 400
    assert "non-finite" in spoilt.json()["error"]
    assert (depth.status_code, other.status_code) == (200, 200)


@pytest.mark.parametrize("path", ["/v2/models/toy", "/v2/models/stats", "/v2/health/ready"])
def test_without_a_model_the_protocol_says_so(backend: Backend, toy_repository: Path, path: str) -> None:
    async def story() -> httpx.Response:
        async with running(backend, model_repository=toy_repository) as house:
            house.service.alias.serving, kept = None, house.service.alias.serving
            answer = await house.client.get(path)
            house.service.alias.serving = kept
            return answer

    answer = asyncio.run(story())
    assert answer.status_code == 503
    assert "error" in answer.json()


def test_a_client_that_leaves_takes_its_rows_along(backend: Backend, toy_repository: Path) -> None:
    async def story() -> dict[str, float]:
        gate = Gated(backend)
        async with running(gate, model_repository=toy_repository) as house:
            await infer(house, body())
            gate.shut()
            leave = asyncio.Event()
            messages: list[dict[str, Any]] = [{"type": "http.request", "body": body(rows=8), "more_body": False}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await leave.wait()
                return {"type": "http.disconnect"}

            async def send(_: object) -> None:
                return None

            scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v2/models/toy/infer"}
            scope |= {"scheme": "http", "query_string": b"", "headers": []}
            app = house.client._transport.app  # type: ignore[attr-defined]
            asked = asyncio.create_task(app(scope, receive, send))
            await until(lambda: gate.rows)
            leave.set()
            await asked
            assert (house.model.stepping.waiting, house.service.admission.requests) == (0, 0)
            gate.open()
            assert (await house.client.post("/depth", files=files("depth"))).status_code == 200
            return await house.counters()

    assert asyncio.run(story())['saccade_cancelled_total{reason="disconnect",task="v2"}'] == 1
