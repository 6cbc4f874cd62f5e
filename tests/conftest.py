from __future__ import annotations

from pathlib import Path

import pytest

from tests import toy


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that knows all three tasks and runs in a millisecond; read it, never write to it."""
    return toy.build(tmp_path_factory.mktemp("toy") / "model_repository")
