"""What takes its time takes none of the event loop's: pictures, alignment, colours and files are made in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from saccade import ensemble, fit, formats, pipeline, reel, render, sequence
from saccade.backends import Backend
from saccade.tasks import TASKS
from server import cache, etag, events
from tests.server.house import House, files, png, running
from tests.server.test_events import STREAM

HEAVY: tuple[tuple[Any, str], ...] = (
    (ensemble, "merge"),
    (ensemble, "reduce"),
    (ensemble, "align"),
    (fit, "resize"),
    (pipeline, "resize"),
    (pipeline, "context_box"),
    (fit.Fit, "picture"),
    (fit.Fit, "mask"),
    (fit.Fit, "restore"),
    (formats, "read_picture"),
    (formats, "read_mask"),
    (formats, "write_png"),
    (formats, "write_npy"),
    (formats, "write_kitti_flow"),
    (formats, "colorize_depth"),
    (formats, "colorize_flow"),
    (formats, "colorize_mask"),
    (render, "encode"),
    (reel, "encode"),
    (sequence, "steady"),
    (cache, "_digest"),
    (etag, "of"),
    (events, "outcome"),
)


def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """By name, whether each was called on the event loop's thread."""
    heard: dict[str, set[bool]] = {}

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            heard.setdefault(name, set()).add(threading.current_thread() is threading.main_thread())
            return function(*given, **named)

        return called

    for place, name in HEAVY:
        monkeypatch.setattr(place, name, spy(name, getattr(place, name)))
    monkeypatch.setattr(events, "SMALL_BYTES", 0)
    return heard


async def everything(house: House) -> None:
    for task in TASKS:
        for options in (
            {},
            {"encoding": "npy"},
            {"format": "png", "render": "color"},
            {"ensemble_size": 3, "output_uncertainty": "true"},
        ):
            assert (await house.ask(task, **options)).status_code == 200
        assert (await house.ask(task, STREAM, previews=2)).status_code == 200
        for dialled in ({"budget_ms": 600_000}, {"target_uncertainty": 0.1}):
            assert (await house.ask(task, **dialled)).status_code == 200
        several = [(name, file) for _ in range(2) for name, file in files(task).items()]
        frames = [part for part in several if part[0] != "next_image"]
        assert (await house.client.post(f"/{task}", files=frames)).status_code == 200
    assert (await house.ask("depth", reduction="aligned_median", ensemble_size=3)).status_code == 200
    frames = [("image", (f"{seed}.png", png(seed=seed))) for seed in range(3)]
    assert (await house.client.post("/depth", files=frames, params={"steady": "true"})).status_code == 200


def test_the_event_loop_computes_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def within() -> dict[str, set[bool]]:
        async with running(backend, answer_cache_bytes=2**22) as house:
            heard = spied(monkeypatch)
            await everything(house)
            return heard

    heard = asyncio.run(within())
    assert {name for name, found in heard.items() if True in found} == set()
    assert {name for _, name in HEAVY} == heard.keys()
