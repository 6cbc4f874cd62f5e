from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from saccade.local import Local


class Scene(NamedTuple):
    image: Path
    next_image: Path
    mask: Path


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Two frames of noise, 64 x 48 px, and a mask."""
    folder = tmp_path_factory.mktemp("scene")
    levels = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 255
    made = Scene(folder / "a.png", folder / "b.png", folder / "mask.png")
    for path, pixels in zip(made, (levels, np.roll(levels, 3, axis=1), mask), strict=True):
        Image.fromarray(pixels).save(path)
    return made


@pytest.fixture(scope="session")
def quiet() -> dict[str, str]:
    """Environment for the processes that tests start: no setting of the person who runs them, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SACCADE_")}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}


@pytest.fixture(scope="session", params=["embedded", pytest.param("triton", marks=pytest.mark.triton)])
def url(request: pytest.FixtureRequest, toy_repository: Path, quiet: dict[str, str]) -> Iterator[str]:
    """A server of the toy model in a process of its own, as `saccade serve` starts it; it must end well, too."""
    command = [sys.executable, "-m", "saccade", "serve", "--port", "0", "--batch-size", "2", "--threads", "1"]
    if request.param == "triton":
        command += ["--backend", "triton", "--triton-url", request.getfixturevalue("tritons")(toy_repository).url]
    else:
        command += ["--model-repository", str(toy_repository)]
    with subprocess.Popen(command, env=quiet, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            address = re.search(r"http://127\.0\.0\.1:\d+", "".join(said))
            if address and any("serves, in batches" in one for one in said):
                break
        assert address, "".join(said)
        yield address[0]
        server.terminate()
        rest = server.stderr.read()
        assert server.wait(20) == 0, rest
        assert "Traceback" not in rest


@pytest.fixture(scope="session")
def local(toy_repository: Path) -> Iterator[Local]:
    with Local(toy_repository, threads=1, batch_size=2) as opened:
        yield opened
