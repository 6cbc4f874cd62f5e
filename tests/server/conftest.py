from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.repository import Repository
from tests.server import process
from tests.server.process import Process, serving
from tests.triton.behind import BehindTriton

PLACES = ["embedded", pytest.param("triton", marks=pytest.mark.triton)]


@pytest.fixture(scope="session", params=PLACES)
def backend(request: pytest.FixtureRequest, toy_repository: Path) -> Backend:
    """The toy model, in this process and behind the real Triton."""
    if request.param == "triton":
        return BehindTriton(request.getfixturevalue("tritons")(toy_repository))
    return Embedded.load(Repository(toy_repository), engine="onnxruntime", precision="fp32", threads=1)


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the models of the server processes run that the tests start."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "triton":
            tritons = request.getfixturevalue("tritons")
            patch.setattr(process, "placed", lambda path: {"backend": "triton", "triton_url": tritons(path).url})
        yield


@pytest.fixture
def server(toy_repository: Path) -> Iterator[Process]:
    """The toy model behind a real server process."""
    with serving(toy_repository) as process:
        yield process
