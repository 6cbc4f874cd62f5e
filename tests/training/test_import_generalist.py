"""The published generalist in all three tasks, through the whole pipeline, against a plain restatement of its recipe.

The restatement shares nothing with ours but the noise: loops over samples, tokens and experts, a DDIM walk of its own.
Pictures have the model's size, so nothing is resized; the autoencoder is diffusers' own object there.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from saccade import ddim
from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository
from tests.training import foreign
from training.backend import TorchBackend
from training.export import describe, export
from training.importers.imported import Imported
from training.importers.load import load
from training.perception import PerceptionConfig
from training.stages.started import config_of

GOLDEN = Path(__file__).parents[1] / "golden" / "generalist.safetensors"
EDGE, HEADS, SEED, STEPS = 64, 4, 11, 3
DRAW = np.random.default_rng(3)
IMAGE, SECOND = (DRAW.integers(0, 256, (EDGE, EDGE, 3)).astype(np.uint8) for _ in range(2))
VISIBLE = np.zeros((EDGE, EDGE), bool)
VISIBLE[20:40, 10:30] = True
INPUTS = {
    "depth": Inputs("depth", IMAGE),
    "flow": Inputs("flow", IMAGE, next_image=SECOND),
    "amodal": Inputs("amodal", IMAGE, mask=VISIBLE),
}
TOLERANCE = 1e-4


def weights() -> dict[str, Tensor]:
    found = load_file(GOLDEN)
    return {key.removeprefix("weights/"): value for key, value in found.items() if key.startswith("weights/")}


def autoencoder() -> Any:
    """One whose pictures are bright, so that objects have a white ground."""
    vae = foreign.autoencoder("AutoencoderTiny")
    with torch.no_grad():
        vae.decoder.layers[-1].bias += 1.5
    return vae


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    place = tmp_path_factory.mktemp("generalist")
    save_file(weights(), place / "generalist.safetensors")
    autoencoder().save_pretrained(place / "vae")
    return load(place / "generalist.safetensors", heads=HEADS, grid=4, codec=str(place / "vae"), steps=STEPS)


def ours(backend: Backend, task: str) -> Answer:
    options = Options(seed=SEED, reduction="mean").resolve(backend.card, task)  # type: ignore[arg-type]
    return asyncio.run(Pipeline(backend)(INPUTS[task], options))


def positions(edge: int, width: int) -> Tensor:
    """Fixed sinusoids: a quarter sin x, cos x, sin y, cos y."""
    bands = 1 / 10000 ** (np.arange(width // 4) / (width // 4))
    rows = []
    for y in range(edge):
        for x in range(edge):
            rows.append(np.concatenate([np.sin(x * bands), np.cos(x * bands), np.sin(y * bands), np.cos(y * bands)]))
    return torch.tensor(np.array(rows), dtype=torch.float32)


def denoised(w: dict[str, Tensor], x: Tensor, t: int, label: int) -> Tensor:
    """One sample [12, h, w] -> the first four output channels."""
    conv = f"x_embedder.proj.conv_in_{label - 999}"
    tokens = F.conv2d(x[None], w[f"{conv}.weight"], w[f"{conv}.bias"], stride=2)[0]
    edge, width = tokens.shape[-1], tokens.shape[0]
    tokens = tokens.flatten(1).T + positions(edge, width)

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    angles = t * torch.exp(-np.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    c = F.silu(linear("t_embedder.mlp.2", F.silu(c)) + w["y_embedder.embedding_table.weight"][label])

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, (width,), eps=1e-6) * (1 + scale) + shift

    for block in range(2):
        name = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", c).chunk(6)
        q, k, v = linear(f"{name}.attn.qkv", norm(tokens, shift1, scale1)).chunk(3, -1)
        heads = []
        for head in range(HEADS):
            part = slice(head * width // HEADS, (head + 1) * width // HEADS)
            scores = q[:, part] @ k[:, part].T / (width // HEADS) ** 0.5
            heads.append(scores.softmax(-1) @ v[:, part])
        tokens = tokens + gate1 * linear(f"{name}.attn.proj", torch.cat(heads, -1))
        seen = norm(tokens, shift2, scale2)
        mixed = torch.zeros_like(seen)
        for row, token in enumerate(seen):
            chosen = (w[f"{name}.moe.gate.weight"] @ token).softmax(0)
            for expert in chosen.argsort(descending=True)[:2].tolist():
                hidden = F.gelu(linear(f"{name}.moe.experts.{expert}.fc1", token), approximate="tanh")
                mixed[row] += chosen[expert] * linear(f"{name}.moe.experts.{expert}.fc2", hidden)
        tokens = tokens + gate2 * mixed
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2)
    patches = linear("final_layer.linear", norm(tokens, shift, scale)).reshape(edge, edge, 2, 2, 8)
    return patches.permute(4, 0, 2, 1, 3).reshape(8, 2 * edge, 2 * edge)[:4]


@torch.no_grad()
def decoded(prompt: np.ndarray, label: int) -> np.ndarray:
    """One run: pictures [3, H, W] in [-1, 1] -> the decoded picture [3, H, W]. Stable Diffusion 2's scheduler."""
    vae, w = autoencoder(), weights()
    image = torch.tensor(IMAGE.transpose(2, 0, 1) / 127.5 - 1, dtype=torch.float32)
    scale = vae.config.scaling_factor
    seen = [vae.encode(picture[None]).latents[0] * scale for picture in (image, torch.tensor(prompt).float())]
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    z = torch.tensor(ddim.noise(SEED, 0, (4, EDGE // 8, EDGE // 8)))
    stride = 1000 // STEPS
    for step in reversed(range(STEPS)):
        t = step * stride + 1
        before = t - stride
        v = denoised(w, torch.cat([*seen, z]), t, label)
        a, b = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
        clean, noise = a * z - b * v, a * v + b * z
        ahead = abar[before] if before >= 0 else abar[0]
        z = (ahead**0.5 * clean + (1 - ahead) ** 0.5 * noise).float()
    return vae.decode(z[None] / scale).sample[0].numpy()


def pixels(picture: np.ndarray) -> np.ndarray:
    return picture.transpose(2, 0, 1) / 127.5 - 1


def expected(task: str) -> Any:
    if task == "depth":
        depth = decoded(np.ones((3, EDGE, EDGE)), 1000).mean(0)
        return (depth - depth.min()) / (depth.max() - depth.min())
    if task == "flow":
        return np.stack([decoded(pixels(SECOND), label).mean(0) * 75 for label in (1002, 1003)], -1)
    prompt = np.repeat(np.where(VISIBLE, 1.0, -1.0)[None], 3, 0)
    return np.clip(decoded(prompt, 1001), -1, 1)


def check(answer: Answer, task: str, told: Any) -> None:
    """Depth and flow to 1e-4 of the map's scale; the painted object to a level of 255, its mask but for such levels."""
    if task != "amodal":
        scale = 1 if task == "depth" else 75
        assert np.abs(answer.prediction - told).max() <= TOLERANCE * scale
        return
    assert answer.completed is not None
    painted = (told.transpose(1, 2, 0) + 1) * 127.5
    off = np.abs(answer.completed[~VISIBLE][:, :3] - painted[~VISIBLE])
    assert off.max() <= 0.5 + 1e-4 * 127.5
    gray = painted @ [0.299, 0.587, 0.114]
    sure = np.abs(gray - 250.5) > 1.1  # each colour and the gray are rounded to levels
    assert sure.mean() > 0.9
    whole = (gray < 250.5) | VISIBLE
    assert 0.15 < whole.mean() < 0.9
    np.testing.assert_array_equal(answer.prediction[sure], whole[sure])


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return {task: expected(task) for task in INPUTS}


def test_eager_is_the_restatement(imported: Imported, told: dict[str, Any]) -> None:
    assert imported.servable is not None
    backend = TorchBackend(imported.servable, describe(imported.servable, {**imported.facts, "name": "g"}, {}))
    for task in INPUTS:
        check(ours(backend, task), task, told[task])


def test_the_exported_directory_is_the_restatement(imported: Imported, told: dict[str, Any], tmp_path: Path) -> None:
    assert imported.servable is not None
    export(imported.servable, {**imported.facts, "name": "generalist"}, tmp_path)
    repository = Repository(tmp_path)
    backend = Embedded.load(repository, "generalist", engine="onnxruntime", precision="fp32", threads=1)
    for task in INPUTS:
        check(ours(backend, task), task, told[task])


def test_the_card_says_the_conventions(imported: Imported) -> None:
    tasks = imported.facts["tasks"]
    assert {name: (task["label"], task.get("passes", [])) for name, task in tasks.items()} == {
        "depth": (1000, []),
        "amodal": (1001, []),
        "flow": (1002, [1003]),
    }
    assert tasks["depth"]["blank"] == 1
    assert imported.servable is not None
    assert imported.servable.noise.prediction == "v_prediction"
    assert imported.servable.latent.multiple == 16


def test_stages_can_start_from_it(imported: Imported) -> None:
    assert imported.about is not None
    config = config_of(imported.about, "imported")
    assert isinstance(config, PerceptionConfig)
    assert config.model == imported.config
    assert config.tasks == {"depth": 1000, "flow": 1002, "amodal": 1001}
