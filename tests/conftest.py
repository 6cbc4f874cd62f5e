from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import toy


def pytest_configure() -> None:
    """Settings of whoever runs the tests are not the tests' settings."""
    for name in [name for name in os.environ if name.startswith("SACCADE_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that knows all three tasks and runs in a millisecond; read it, never write to it."""
    return toy.build(tmp_path_factory.mktemp("toy") / "model_repository")
