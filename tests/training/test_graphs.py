"""Graphs of any servable: weights inside a file or beside it, conditioning tensors or none, what a digest covers."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from saccade.backends import Ticket
from saccade.backends.embedded import Embedded
from saccade.card import Card, Latent, Noise
from saccade.errors import InvalidInput, ModelError
from saccade.repository import Repository
from training.codecs import CodecConfig
from training.export import export
from training.graphs import disagreement, write_torchscript
from training.models.affiner import Adapters
from training.models.dit import named
from training.models.moe import Experts
from training.models.routing import Routing
from training.objectives import DiffusionConfig
from training.perception import Perception, PerceptionConfig
from training.servable import PARTS, Servable, Spec


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(6, 5, 4, stride=4)
        self.wide = nn.Conv2d(6, 2, 8, stride=8)

    def forward(self, image: Tensor, prompt: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([image, prompt], 1)
        return self.down(both), self.wide(both) * task[:, None, None, None]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3 + 5, 3, 3, padding=1)
        self.coarse = nn.Conv2d(2, 3, 1)
        self.tables = nn.Embedding(1000, 3)

    def forward(self, latent: Tensor, timestep: Tensor, task: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        far = nn.functional.interpolate(self.coarse(coarse), scale_factor=2.0)
        return (
            self.mix(torch.cat([latent, fine], 1))
            + far
            + self.tables(timestep)[:, :, None, None] * task[:, None, None, None]
        )


def servable() -> Servable:
    torch.manual_seed(0)
    return Servable(
        Encoder(),
        Denoiser(),
        nn.ConvTranspose2d(3, 4, 4, stride=4),
        (Spec("fine", 5, 4), Spec("coarse", 2, 8)),
        Latent(channels=3, stride=4, scale=1.0, multiple=8),
        Noise(schedule="cosine", prediction="v_prediction"),
        planes=4,
        labels=(2, 3),
        sizes=((2, 24, 40),),
    ).eval()


def facts(**more: Any) -> dict[str, Any]:
    defaults = {"steps": 1, "ensemble_size": 1, "reduction": "mean", "processing_resolution": 64}
    return {
        "name": "odd",
        "summary": "odd",
        "licence": "none",
        "tasks": {"depth": {"label": 2, "defaults": defaults}},
        "training": {"data": [], "samples": 0, "wall_clock_s": 0, "device": "none"},
        **more,
    }


def test_an_answer_of_another_shape_is_no_agreement() -> None:
    """NumPy would have compared them all the same."""
    model = servable()

    size = 3, 16, 32
    assert disagreement(model, "denoiser", lambda inputs: model.denoiser(*inputs), size) == 0
    assert disagreement(model, "denoiser", lambda inputs: model.denoiser(*inputs)[:1], size) == float("inf")


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card]:
    """Exported with the denoiser's weights beside its graph, as if they were too many."""
    path = tmp_path_factory.mktemp("beside") / "repository"
    return path, export(servable(), facts(), path, external_above=8000)


def test_too_many_weights_lie_beside_their_graph_and_have_a_digest(beside: tuple[Path, Card]) -> None:
    path, card = beside
    assert [file.name for file in sorted((path / "odd" / "1").iterdir())] == ["model.onnx", "model.onnx.data"]
    assert [file.name for file in (path / "odd-encoder" / "1").iterdir()] == ["model.onnx"]
    graph = onnx.load(path / "odd" / "1" / "model.onnx", load_external_data=False).graph
    places = {e.value for i in graph.initializer for e in i.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}
    assert set(card.digests) == {"odd", "odd-encoder", "odd-decoder", "odd/model.onnx.data"}
    Repository(path).verify(card)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_read_weights_that_lie_beside(beside: tuple[Path, Card], engine: str) -> None:
    model = servable()
    inputs = model.examples(3, 16, 32, seed=1)["denoiser"]
    seen = {"fine": inputs[3].numpy(), "coarse": inputs[4].numpy()}

    async def run() -> np.ndarray:
        backend = Embedded.load(Repository(beside[0]), engine=engine, precision="fp32", threads=1)
        try:
            return await backend.denoise(*(value.numpy() for value in inputs[:3]), seen, Ticket())
        finally:
            await backend.aclose()

    with torch.no_grad():
        np.testing.assert_allclose(asyncio.run(run()), model.denoiser(*inputs).numpy(), atol=1e-5)


def test_changed_or_missing_weights_are_found_out(beside: tuple[Path, Card], tmp_path: Path) -> None:
    path = shutil.copytree(beside[0], tmp_path / "copy")
    file = path / "odd" / "1" / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"odd/model\.onnx\.data: .* has sha256"):
        Repository(path).verify(beside[1])
    file.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data"):
        Repository(path).verify(beside[1])
    with pytest.raises(ModelError, match="odd"):
        Embedded.load(Repository(path), engine="onnxruntime", threads=1)


def test_a_model_without_tasks_or_conditioning_encodes_pictures(tmp_path: Path) -> None:
    """A class-conditional generator: nothing asks the pipeline for it, but its graphs are there."""

    class Picture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 3, 4, stride=4)

        def forward(self, image: Tensor, prompt: Tensor, task: Tensor) -> Tensor:
            return self.down(image)

    class Plain(nn.Module):
        def forward(self, latent: Tensor, timestep: Tensor, task: Tensor) -> Tensor:
            return latent * timestep[:, None, None, None] + task[:, None, None, None]

    plain = replace(servable(), encoder=Picture(), denoiser=Plain(), conditioning=(), labels=(0, 1, 2))
    card = export(plain, facts(tasks={}), tmp_path / "repository")
    assert (card.tasks, card.conditioning) == ({}, [])
    config = Repository(tmp_path / "repository").config("odd-encoder")
    assert [(output.name, list(output.dims)) for output in config.output] == [("image_latent", [3, -1, -1])]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"name": "../odd"}, ModelError),
        ({"tasks": {"depth": {"label": 9}}}, InvalidInput),
    ],
)
def test_facts_are_looked_at_before_anything_is_written(tmp_path: Path, changed: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        export(servable(), facts(**changed), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_parameters_are_those_of_the_three_modules_each_once() -> None:
    model = servable()
    shared = replace(model, decoder=nn.Sequential(model.encoder))
    assert model.parameters == sum(p.numel() for part in PARTS for p in model.module(part).parameters())
    assert shared.parameters == sum(p.numel() for part in PARTS[:2] for p in model.module(part).parameters())


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "patch 4": {"patch": 4},
    "task routing": {"routing": Routing()},
    "input convolution for each task": {"inputs": 3, "learn_sigma": True},
    "gated experts and a shared one": {"experts": Experts(4, 2)},
    "plain experts": {"experts": Experts(3, 2, shared=False, gated=False, renormalise=True)},
    "adapters": {"adapters": Adapters(3, 2), "inputs": 3},
    "everything": {"experts": Experts(3, 1), "routing": Routing(), "adapters": Adapters(3, 2), "inputs": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_paper_model_as_torchscript_answers_as_eager_torch_on_fresh_inputs(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = named("a1", width=32, heads=2, depth=2, condition=32, channels=26, labels=3, **KINDS[kind])
    config = PerceptionConfig(shape, CodecConfig(), DiffusionConfig(), {"depth": 0, "flow": 1, "amodal": 2})
    model = Perception(config)
    with torch.no_grad():
        for parameter in model.dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made = model.servable()
    write_torchscript(made, "denoiser", tmp_path / "model.pt")
    for seed, size in enumerate(((1, 64, 96), (4, 96, 32), (7, 64, 64))):
        assert disagreement(made, "denoiser", tmp_path / "model.pt", size, seed=50 + seed) <= 1e-5
