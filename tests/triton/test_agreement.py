"""The shipped repository, as it stands, answers alike in Triton and in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from saccade.backends.embedded import Embedded
from saccade.backends.triton import Triton
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository
from saccade.tasks import TASKS, TaskName
from tests.triton.server import Tritons

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]
PICTURES: dict[TaskName, tuple[str, ...]] = {
    "depth": ("photo.jpg",),
    "flow": ("frame_1.png", "frame_2.png"),
    "amodal": ("occluded.jpg",),
}


def example(task: TaskName) -> Inputs:
    image, *others = (read_picture((ROOT / "examples" / name).read_bytes()) for name in PICTURES[task])
    mask = read_mask((ROOT / "examples" / "occluded_mask.png").read_bytes()) if task == "amodal" else None
    return Inputs(task, image, others[0] if others else None, mask)


def answers(tritons: Tritons, engine: str, precision: str, task: TaskName) -> Sequence[Answer]:
    """Triton's and the engine's, with the model's default options and the uncertainty, which shows more."""
    server = tritons(ROOT / "model_repository")

    async def ask() -> Sequence[Answer]:
        embedded = Embedded.load(Repository(server.repository), engine=engine, precision=precision, threads=1)
        triton = await Triton.connect([server.url], timeout_s=60)
        options = Options(output_uncertainty=True).resolve(embedded.card, task)
        found = [await Pipeline(backend)(example(task), options) for backend in (triton, embedded)]
        await triton.aclose()
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize("task", TASKS)
def test_to_1e_4_with_onnx_runtime_in_fp32(tritons: Tritons, task: TaskName) -> None:
    theirs, ours = answers(tritons, "onnxruntime", "fp32", task)
    scale = float(np.abs(ours.prediction).max())
    np.testing.assert_allclose(theirs.prediction.astype(np.float32), ours.prediction, atol=1e-4 * scale)
    np.testing.assert_allclose(theirs.uncertainty, ours.uncertainty, atol=1e-4 * scale)


@pytest.mark.parametrize("task", TASKS)
def test_to_1_percent_with_the_default_engine(tritons: Tritons, task: TaskName) -> None:
    """Root mean square, relative to the answer's largest value; of a mask, pixels that differ."""
    theirs, ours = (np.asarray(a.prediction, np.float32) for a in answers(tritons, "auto", "auto", task))
    assert np.sqrt(np.mean((theirs - ours) ** 2)) <= 1e-2 * np.abs(ours).max()
