"""The dial from the client, from this process and from the command line: the same options, the same story."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saccade.client import AsyncClient, Client
from saccade.errors import InvalidInput, ServerError
from saccade.local import Local
from saccade.pipeline import Answer
from tests.client.conftest import Scene
from tests.client.test_cli import Saccade, saccade  # noqa: F401

EMBEDDED = pytest.mark.parametrize("url", ["embedded"], indirect=True, scope="session")


def same(one: Answer, other: Answer) -> bool:
    return bool(np.array_equal(one.prediction, other.prediction)) and one.options == other.options


@EMBEDDED
def test_everybody_dials_alike(url: str, local: Local, scene: Scene) -> None:
    dialled: dict[str, Any] = {"quality": "best"}
    wanted = local.depth(scene.image, steps=2, ensemble_size=10)
    here = local.depth(scene.image, **dialled)
    assert same(here, wanted)
    assert here.plan is not None
    with Client(url) as client:
        there = client.depth(scene.image, **dialled)
        assert same(there, wanted)
        assert there.plan == here.plan
        assert client.depth(scene.image).plan is None
        *_, streamed = client.stream("depth", scene.image, quality="best")
        assert isinstance(streamed, Answer)
        assert streamed.plan == here.plan
        seen = client.flows([scene.image, scene.next_image, scene.image], budget_ms=600_000)
        assert [answer.plan.complete for answer in seen if answer.plan] == [True, True]

    async def ask() -> Answer:
        async with AsyncClient(url) as client:
            return await client.depth(scene.image, **dialled)

    assert asyncio.run(ask()).plan == here.plan


def test_a_target(local: Local, scene: Scene) -> None:
    found = local.flow(scene.image, scene.next_image, target_uncertainty=1e6)
    assert same(found, local.flow(scene.image, scene.next_image, ensemble_size=2))


@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_the_least_that_a_budget_buys_is_an_answer(local: Local, scene: Scene, task: str) -> None:
    """A millisecond is over before anything has begun: one step of one member is still taken."""
    pictures = {"depth": (scene.image,), "flow": scene[:2], "amodal": (scene.image, scene.mask)}[task]
    found = getattr(local, task)(*pictures, budget_ms=1, steps=50, ensemble_size=4)
    assert (found.plan.complete, found.plan.members, found.plan.steps_taken) == (False, 1, 1)
    least = getattr(local, task)(*pictures, steps=1, ensemble_size=1)
    assert np.array_equal(found.prediction, least.prediction)


def test_contradictions_are_refused_before_anything_is_read(local: Local) -> None:
    with pytest.raises(InvalidInput) as refused:
        local.depth("nowhere.png", quality="best", steps=3)
    assert refused.value.param == "quality"


@EMBEDDED
def test_the_server_says_the_same(url: str, scene: Scene) -> None:
    with Client(url) as client, pytest.raises(ServerError) as refused:
        client.depth(scene.image, target_uncertainty=0.1, ensemble_size=1)
    assert refused.value.problem["param"] == "target_uncertainty"


def test_on_the_command_line(saccade: Saccade, scene: Scene, local: Local) -> None:  # noqa: F811
    said = saccade("depth", scene.image, "-o", "a.npy", "--quality", "fast")
    assert (said.code, said.err) == (0, "")
    assert np.array_equal(np.load("a.npy"), local.depth(scene.image, steps=1, ensemble_size=1).prediction)
    said = saccade("depth", scene.image, "-o", "b.npy", "--budget-ms", "1", "--steps", "50", "--ensemble-size", "4")
    assert said.code == 0
    assert "1 of 4 members, 1 of 50 steps" in said.err
    assert Path("b.npy").exists()
    said = saccade("depth", scene.image, "-o", "c.npy", "--quality", "fast", "--steps", "2")
    assert said.code == 2
    assert "quality" in said.err
