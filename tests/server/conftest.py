from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.repository import Repository
from tests.server.process import Process, started


@pytest.fixture(scope="session")
def backend(toy_repository: Path) -> Backend:
    """The toy model, in this process."""
    return Embedded.load(Repository(toy_repository), engine="onnxruntime", precision="fp32", threads=1)


@pytest.fixture
def server(toy_repository: Path) -> Iterator[Process]:
    """The toy model behind a real server process."""
    with started(toy_repository) as process:
        yield process
