"""A model without tasks: the gateway lives with it, refuses the tasks, and lends its graphs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.repository import Repository
from tests import generator
from tests.server.house import PROBLEM, House, housed


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generator.build(tmp_path_factory.mktemp("generator") / "model_repository")


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[House]:
    async def opener(_: str | None) -> Backend:
        return Embedded.load(Repository(path), threads=1)

    async with housed(opener, model_repository=path) as house:
        yield house


def test_a_repository_reads_its_card(repository: Path) -> None:
    found = Repository(repository)
    card = found.card(found.default())
    found.verify(card)
    assert card.tasks == {}
    assert card.labels == set(range(generator.CLASSES))


def test_the_gateway_is_ready_and_refuses_the_tasks(repository: Path) -> None:
    async def story() -> None:
        async with serving(repository) as house:
            assert (await house.client.get("/readyz")).status_code == 200
            assert (await house.client.get("/models")).json()
            for task in ("depth", "flow", "amodal"):
                refused = await house.ask(task)
                assert refused.status_code == 422
                assert refused.headers["content-type"] == PROBLEM
                assert task in refused.json()["detail"]

    asyncio.run(story())


def test_its_graphs_can_be_asked(repository: Path) -> None:
    latent = np.zeros((1, generator.LATENT, 8, 8), np.float32)

    def asked(label: int) -> dict[str, object]:
        numbers = [("timestep", 999), ("task", label)]
        given = [{"name": "latent", "shape": list(latent.shape), "datatype": "FP32", "data": latent.ravel().tolist()}]
        given += [{"name": n, "shape": [1, 1], "datatype": "INT64", "data": [v]} for n, v in numbers]
        return {"inputs": given}

    async def story() -> None:
        async with serving(repository) as house:
            infer = f"/v2/models/{generator.NAME}/infer"
            for label in (0, generator.CLASSES - 1):
                answer = (await house.client.post(infer, json=asked(label))).json()["outputs"][0]
                found = np.reshape(answer["data"], answer["shape"])
                wanted = label * generator.LATENT + np.arange(generator.LATENT)
                np.testing.assert_array_equal(found[0, :, 3, 4], wanted)
            assert (await house.client.post(infer, json=asked(generator.CLASSES))).status_code == 400

            picture = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
            given = [
                {"name": name, "shape": list(picture.shape), "datatype": "FP32", "data": picture.ravel().tolist()}
                for name in ("image", "prompt")
            ]
            given.append({"name": "task", "shape": [1, 1], "datatype": "INT64", "data": [0]})
            infer = f"/v2/models/{generator.NAME}-encoder/infer"
            answer = (await house.client.post(infer, json={"inputs": given})).json()
            assert [(o["name"], o["shape"]) for o in answer["outputs"]] == [("image_latent", [1, 8, 8, 8])]

    asyncio.run(story())
