"""The model as TorchScript, served by `backend: "pytorch"`, answers as eager torch does."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.backends import Ticket
from saccade.backends.triton import Triton
from tests.training.conftest import TINY
from tests.triton.server import Tritons
from training import export, loading
from training.backend import TorchBackend
from training.models.perceiver import Config
from training.train import Model, Recipe, Stage

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FACTS = Path(export.__file__).parent / "configs" / "saccade-s.json"
NAME = "saccade-s-torchscript"


def test_torchscript_answers_as_eager_torch(tritons: Tritons, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = Recipe(scenes="nowhere", stages=(Stage(1, ((32, 32),), 1, 1e-3, 1e-4),), warmup=1, model=TINY)
    config = Config(latent_channels=26, latent_std=tuple(np.linspace(0.1, 1.2, 26).tolist()), **TINY)
    model = Model(config, recipe.noise).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    facts = {**json.loads(FACTS.read_text()), "name": NAME}
    facts["training"] = {**facts["training"], "samples": 0, "wall_clock_s": 0}
    servable = loading.default_servable(model, recipe.schedule, recipe.zero_terminal_snr)
    servable = replace(servable, sizes=((1, 48, 64),))  # what the others add is in tests/training
    card = export.export(servable, facts, tmp_path / "ts", kinds=("torchscript",))
    server = tritons(tmp_path / "ts")
    inputs = servable.examples(3, 64, 96, seed=5)
    image, prompt, task = (value.numpy() for value in inputs["encoder"])
    latent, timestep = (value.numpy() for value in inputs["denoiser"][:2])

    async def answers() -> tuple[list[np.ndarray], list[np.ndarray]]:
        triton = await Triton.connect([server.url])
        assert triton.card == card
        eager = TorchBackend(servable, card)
        both = []
        for backend in (triton, eager):
            seen = await backend.encode(image, prompt, task, Ticket())
            output = await backend.denoise(latent, timestep, task, seen, Ticket())
            both.append([*seen.values(), output, await backend.decode(output, Ticket())])
        await triton.aclose()
        return both[0], both[1]

    theirs, ours = asyncio.run(answers())
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(b).max()))
