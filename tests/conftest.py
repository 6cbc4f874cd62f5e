from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import toy
from tests.triton.server import Installation, Tritons


def pytest_configure() -> None:
    """Settings of whoever runs the tests are not the tests' settings."""
    for name in [name for name in os.environ if name.startswith("SACCADE_") and name != "SACCADE_TEST_CACHE"]:
        del os.environ[name]


@pytest.fixture(scope="session")
def tritons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tritons]:
    """Real Triton servers, one for each repository that is asked for; they leave nothing behind."""
    installation = Installation.here()
    if obstacle := installation.obstacle():
        pytest.skip(f"Triton cannot run here: {obstacle}")
    installation.prepare()
    with Tritons(tmp_path_factory.mktemp("triton")) as started:
        yield started
        leftovers = started.stop()
    assert not leftovers, "shared memory is left"


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that knows all three tasks and runs in a millisecond; read it, never write to it."""
    return toy.build(tmp_path_factory.mktemp("toy") / "model_repository")
