"""An engine that stops is noticed: by the log, by readiness, by the metrics; and so is its coming back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from server.watchdog import Watchdog
from tests.server.house import Clock, files
from tests.server.process import Process, serving
from tests.server.test_drain import HANGING, gate
from tests.server.test_refusals import assert_problem

__all__ = ["gate"]


def test_a_stuck_engine_makes_the_server_unready_until_it_moves(toy_repository: Path, gate: Path) -> None:
    settings = {"program": HANGING, "stuck_after_s": 1, "request_timeout_s": 3}
    with serving(toy_repository, **settings) as server, ThreadPoolExecutor(1) as pool:
        gate.touch()
        waiting = pool.submit(httpx.post, server.url + "/depth", files=files("depth"), timeout=60)
        server.until(lambda: stuck(server) == 1)
        refused = httpx.get(server.url + "/readyz")
        assert "restart" in assert_problem(refused, 503, "unavailable")["detail"]
        assert httpx.get(server.url + "/livez").status_code == 200
        assert "CRITICAL" in server.log.read_text()
        assert_problem(waiting.result(), 503, "timeout")
        assert stuck(server) == 1  # nobody asks it for anything now, and still it is stuck
        gate.unlink()
        server.until(server.ready)
        assert stuck(server) == 0
        assert "moves again" in server.log.read_text()


def stuck(server: Process) -> float:
    return server.counters()["saccade_engine_stuck"]


class Engine:
    """What a watchdog sees of a model."""

    name = "toy"
    finished, busy = 0, False

    @property
    def stepping(self) -> Engine:
        return self


def test_slow_is_not_stuck() -> None:
    lane, clock = Engine(), Clock()
    dog = Watchdog(lambda: [lane], 10, clock)  # type: ignore[list-item]
    lane.busy = True
    for _ in range(10):
        dog.look()
        clock.now += 9
        dog.look()
        assert dog.fault is None
        lane.finished += 1
    lane.busy = False
    dog.look()
    clock.now += 100
    dog.look()
    assert dog.fault is None  # it had nothing to do
    lane.busy = True
    dog.look()
    clock.now += 11
    dog.look()
    assert dog.fault
