"""`Local`: the model in this process. That it answers as a server does is shown in test_client."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saccade import ensemble
from saccade.backends.stepping import Stepping
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


def ours() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("saccade-"))


def test_a_model_that_cannot_start_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: Stepping) -> None:
        raise ModelError("broken")

    monkeypatch.setattr(Stepping, "start", fail)
    before = ours()
    with pytest.raises(ModelError, match="broken"):
        Local(toy.build(tmp_path), threads=1)
    assert ours() == before


def test_closing_waits_for_an_answer_that_needs_the_model_no_more(
    toy_repository: Path, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging, go_on = threading.Event(), threading.Event()
    merge = ensemble.merge

    def slow(*given: Any) -> Any:
        merging.set()
        go_on.wait(20)
        return merge(*given)

    monkeypatch.setattr(ensemble, "merge", slow)
    once = Local(toy_repository, threads=1, batch_size=2)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(once.depth, scene.image)
        assert merging.wait(20)
        closing = pool.submit(once.close)
        while not once._closed:
            time.sleep(0.01)
        with pytest.raises(BackendUnavailable, match="closed"):
            once.depth(scene.image)
        go_on.set()
        closing.result(20)
        assert asked.result(20).prediction.shape == (48, 64)


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="repository"):
        Local(tmp_path / "nowhere")


def test_closed_is_closed(toy_repository: Path, scene: Scene) -> None:
    once = Local(toy_repository, threads=1)
    once.close()
    once.close()
    with pytest.raises(BackendUnavailable, match="closed"):
        once.depth(scene.image)
