"""The real server in a process of its own, on loopback and a free port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx

from tests.server.house import parse_metrics

PROGRAM = "from server.app import serve; from server.settings import Settings; serve(Settings.load())"
ADDRESS = re.compile(r"starts on (https?://[\d.]+:\d+)")
PATIENCE_S = 60


class Process:
    def __init__(self, popen: subprocess.Popen[str], log: Path) -> None:
        self.popen, self.log = popen, log
        self.url = ""

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def counters(self) -> dict[str, float]:
        return parse_metrics(httpx.get(self.url + "/metrics").text)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition; the process must not die meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"waited in vain; the server's log:\n{self.log.read_text()}")
            time.sleep(0.02)

    def find_address(self) -> bool:
        found = ADDRESS.search(self.log.read_text())
        self.url = found[1] if found else ""
        return bool(found)

    def alive(self) -> bool:
        return self._is_fine("/livez")

    def ready(self) -> bool:
        return self._is_fine("/readyz")

    def _is_fine(self, path: str) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(self.url + path, timeout=20).status_code == 200
        return False


def placed(repository: Path) -> dict[str, object]:
    """Settings that say where the repository's model runs; see the fixture `place`."""
    return {"model_repository": repository, "engine": "onnxruntime", "threads": 1}


def environment(repository: Path, **settings: object) -> dict[str, str]:
    chosen = {"port": 0, "batch_size": 4, **placed(repository), **settings}
    named = {f"SACCADE_{name.upper()}": str(value) for name, value in chosen.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SACCADE_")}
    return kept | named


def spawn(repository: Path, log: IO[str], program: str = PROGRAM, **settings: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment(repository, **settings), stdout=log, stderr=log, text=True
    )


@contextmanager
def started(repository: Path, **settings: object) -> Iterator[Process]:
    """A server that accepts requests; killed at the end if it still runs."""
    with listening(repository, **settings) as process:
        process.until(process.alive)
        yield process


@contextmanager
def listening(repository: Path, program: str = PROGRAM, **settings: object) -> Iterator[Process]:
    """A server that has said where it will be."""
    path = repository.parent / f"server-{time.monotonic_ns()}.log"
    with path.open("w") as log, spawn(repository, log, program, **settings) as popen:
        process = Process(popen, path)
        try:
            process.until(process.find_address)
            yield process
        finally:
            popen.kill()


@contextmanager
def serving(repository: Path, **settings: object) -> Iterator[Process]:
    """A server whose model answers."""
    with started(repository, **settings) as process:
        process.until(process.ready)
        yield process
