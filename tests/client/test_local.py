"""`Local`: the model in this process. That it answers as a server does is shown in test_client."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from saccade.errors import BackendUnavailable, InvalidInput, ModelError
from saccade.local import Local
from tests import toy
from tests.client.conftest import Scene


def test_threads_that_share_it_get_what_they_would_get_alone(local: Local, scene: Scene) -> None:
    def ask(seed: int) -> np.ndarray:
        return local.depth(scene.image, seed=seed, ensemble_size=2).prediction

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert np.array_equal(alone, together)
    assert not np.array_equal(alone[0], alone[1])


def test_it_may_be_used_beside_a_running_event_loop(local: Local, scene: Scene) -> None:
    async def ask() -> tuple[int, ...]:
        return local.depth(scene.image).prediction.shape

    assert asyncio.run(ask()) == (48, 64)


def test_what_it_took_is_told(local: Local, scene: Scene) -> None:
    timings = local.depth(scene.image).timings_ms
    assert set(timings) == {"queue", "encode", "denoise", "decode", "ensemble", "total"}
    assert timings["total"] >= timings["encode"] + timings["denoise"] + timings["decode"] + timings["ensemble"]


def test_options_the_task_cannot_have(local: Local, scene: Scene) -> None:
    with pytest.raises(InvalidInput, match="aligned_median"):
        local.flow(scene.image, scene.next_image, reduction="aligned_median")
    with pytest.raises(TypeError):
        local.depth(scene.image, step=1)  # type: ignore[call-arg]


def test_pictures_over_the_limit(toy_repository: Path, scene: Scene) -> None:
    with Local(toy_repository, threads=1, max_pixels=64 * 48 - 1) as small, pytest.raises(InvalidInput) as refused:
        small.flow(np.zeros((8, 8, 3), np.uint8), scene.next_image)
    assert refused.value.param == "next_image"


def test_a_broken_model_is_called_so(tmp_path: Path, scene: Scene) -> None:
    with Local(toy.build(tmp_path, fault="nan"), threads=1) as broken, pytest.raises(ModelError):
        broken.depth(scene.image, ensemble_size=3)


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="repository"):
        Local(tmp_path / "nowhere")


def test_closed_is_closed(toy_repository: Path, scene: Scene) -> None:
    once = Local(toy_repository, threads=1)
    once.close()
    once.close()
    with pytest.raises(BackendUnavailable, match="closed"):
        once.depth(scene.image)
