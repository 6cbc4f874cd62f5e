"""Torch modules behind the serving protocol answer as the exported graphs; validation folders can be evaluated."""

from __future__ import annotations

import asyncio
from pathlib import Path

import cv2
import numpy as np
import pytest

from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository
from saccade.tasks import TaskName
from training import evalset, validation
from training.backend import TorchBackend
from training.scenes import make

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def example(task: TaskName) -> Inputs:
    def picture(name: str) -> np.ndarray:
        return read_picture((EXAMPLES / name).read_bytes())

    if task == "depth":
        return Inputs(task, picture("photo.jpg"))
    if task == "flow":
        return Inputs(task, picture("frame_1.png"), next_image=picture("frame_2.png"))
    return Inputs(task, picture("occluded.jpg"), mask=read_mask((EXAMPLES / "occluded_mask.png").read_bytes()))


async def ask(backend: Backend, task: TaskName) -> Answer:
    pipeline = Pipeline(backend)
    answer = await pipeline(example(task), Options(steps=2, ensemble_size=1).resolve(pipeline.card, task))
    await backend.aclose()
    return answer


@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_the_shipped_weights_answer_alike_in_torch_and_in_the_graphs(task: TaskName) -> None:
    repository = Repository(ROOT / "model_repository")
    served = asyncio.run(ask(Embedded.load(repository, engine="onnxruntime"), task)).prediction
    eager = asyncio.run(ask(TorchBackend.load(repository), task)).prediction
    assert np.abs(served.astype(np.float32) - eager.astype(np.float32)).mean() < 1e-3


def test_a_validation_folder_holds_scenes_and_real_depth_in_the_evaluations_layout(tmp_path: Path) -> None:
    for kind in make.KINDS:
        make.write_shard(0, tmp_path / "shards", kind, 64, 5, (), ())
    real = tmp_path / "kitchen"
    real.mkdir()
    cv2.imwrite(str(real / "a.jpg"), np.full((30, 40, 3), 90, np.uint8))
    cv2.imwrite(str(real / "a_depth_mm.png"), np.linspace(500, 3000, 1200).reshape(30, 40).astype(np.uint16))
    out = tmp_path / "val"
    validation.main([str(out), "--scenes", str(tmp_path / "shards"), "--real", str(real), "--count", "3"])
    names = {item.name for item in evalset.find(out, ("depth", "flow", "amodal"))}
    assert {"kitchen_a", "solid_000", "layered_002", "layered_000_00"} <= names
