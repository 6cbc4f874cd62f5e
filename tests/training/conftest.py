"""Small stocks of textures and small shards, drawn once; one thread, so that sums come out the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.scenes import assets, make, raycast
from training.train import Recipe, Stage

SIZE = 48
TINY = {"width": 32, "heads": 2, "depth": 1, "encoder_depth": 1, "stem": (16, 16), "detail": 8}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


@pytest.fixture(scope="session")
def stock() -> assets.Assets:
    """Four procedural textures and four made-up objects."""
    return assets.load([], [], np.random.default_rng(0), textures=4, stamps=4)


@pytest.fixture(scope="session")
def atlas(stock: assets.Assets) -> raycast.Atlas:
    return raycast.Atlas.of(stock, np.random.default_rng(0))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two scenes from two textures, so that the command takes a second."""
    monkeypatch.setattr(make, "SCENES_PER_SHARD", 2)
    monkeypatch.setattr(make, "SHEETS", 2)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of each kind, eight scenes of 48 x 48; read it, never write to it."""
    out = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "SCENES_PER_SHARD", 8)
        patch.setattr(make, "SHEETS", 4)
        for kind in make.KINDS:
            make.write_shard(0, out, kind, SIZE, seed=1, photos=[], cutouts=[])
    return out


@pytest.fixture(scope="session")
def recipe(shards: Path) -> Recipe:
    """Two short stages of a network of a few ten thousand weights."""
    stages = (Stage(2, ((32, 48), (48, 32)), 2, 4e-3, 2e-3), Stage(2, ((32, 32),), 1, 1e-3, 1e-4, draws=3))
    return Recipe(scenes=str(shards), stages=stages, warmup=2, model=TINY, depth_knee=0.0)
