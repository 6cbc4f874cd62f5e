"""Marigold's folders through our pipeline, against diffusers' MarigoldDepthPipeline: whole pipelines, the same noise.

Made alike: the picture keeps its own size (no resizing; both pad to the autoencoder's cells), the peer is given our
noise as its latents, one member's map is stretched to 0 .. 1 as ours always are. Nothing else.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import ddim
from saccade.backends import Backend
from saccade.backends.embedded import Embedded
from saccade.errors import InvalidInput, ModelError
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository, replace_card
from tests.training import foreign
from training.backend import TorchBackend
from training.export import describe, export
from training.importers.autoencoders import open_autoencoder, open_codec, renamed
from training.importers.load import load

PICTURE = np.random.default_rng(0).integers(0, 256, (37, 52, 3)).astype(np.uint8)
SEED = 5
TOLERANCE = 1e-4
KINDS = ["AutoencoderKL", "AutoencoderTiny"]


@dataclass
class Variant:
    scheduler: dict[str, Any]
    told: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "v1.0": Variant(foreign.V1_0),
    "v1.1": Variant(foreign.V1_1),
    "one step": Variant(foreign.ONE_STEP, {"start": "zeros"}),
}


def theirs(pipeline: Any, backend: Backend, members: int, zeros: bool, steps: int) -> list[np.ndarray]:
    """Every member's map by diffusers, each [H, W]."""
    latent = backend.card.latent
    height, width = (-(-edge // latent.multiple) * latent.multiple // latent.stride for edge in PICTURE.shape[:2])
    maps = []
    for member in range(members):
        noise = ddim.noise(SEED, member, (latent.channels, height, width))[None] * (0 if zeros else 1)
        answer = pipeline(
            Image.fromarray(PICTURE), num_inference_steps=steps, ensemble_size=1, processing_resolution=0,
            latents=torch.from_numpy(noise.astype(np.float32)), output_type="np",
        )  # fmt: skip
        maps.append(answer.prediction[0, ..., 0])
    return maps


def stretched(depth: np.ndarray) -> np.ndarray:
    return (depth - depth.min()) / np.ptp(depth)


def ours(backend: Backend, **options: Any) -> Answer:
    chosen = Options(seed=SEED, **options).resolve(backend.card, "depth")
    return asyncio.run(Pipeline(backend)(Inputs("depth", PICTURE), chosen))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_eager_is_diffusers(tmp_path: Path, name: str, kind: str) -> None:
    variant = VARIANTS[name]
    pipeline = foreign.marigold(tmp_path, variant.scheduler, kind)
    imported = load(tmp_path, **variant.told)
    assert imported.servable is not None
    backend = TorchBackend(imported.servable, describe(imported.servable, {**imported.facts, "name": "m"}, {}))
    zeros = bool(variant.told)
    steps = 1 if zeros else 4
    members = 1 if zeros else 3
    peers = theirs(pipeline, backend, members, zeros, steps)
    assert backend.card.tasks["depth"].defaults.steps == steps
    single = ours(backend)
    assert np.abs(single.prediction - stretched(peers[0])).max() <= TOLERANCE
    if members > 1:
        several = ours(backend, ensemble_size=members, reduction="median")
        assert np.abs(several.prediction - stretched(np.median(peers, axis=0))).max() <= TOLERANCE


def test_the_exported_directory_is_diffusers(tmp_path: Path) -> None:
    """One export; the three variants differ in their cards alone, for weights are the same."""
    repository = tmp_path / "models"
    digests: dict[str, str] = {}
    for name, variant in VARIANTS.items():
        folder = tmp_path / name
        pipeline = foreign.marigold(folder, variant.scheduler, "AutoencoderTiny")
        imported = load(folder, **variant.told)
        assert imported.servable is not None
        facts = {**imported.facts, "name": "marigold"}
        if not digests:
            digests = export(imported.servable, facts, repository).digests
        replace_card(repository, "marigold", describe(imported.servable, facts, digests))
        backend = Embedded.load(Repository(repository), "marigold", engine="onnxruntime", precision="fp32", threads=1)
        steps = backend.card.tasks["depth"].defaults.steps
        peer = theirs(pipeline, backend, 1, bool(variant.told), steps)[0]
        assert np.abs(ours(backend).prediction - stretched(peer)).max() <= TOLERANCE, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("marigold")
    foreign.marigold(place, foreign.V1_0, steps=7)
    return place


def test_the_card_says_what_the_folder_says(folder: Path) -> None:
    imported = load(folder)
    assert imported.kind == "marigold"
    assert imported.servable is not None
    noise, defaults = imported.servable.noise, imported.facts["tasks"]["depth"]["defaults"]
    assert noise.model_dump() == {
        "schedule": "scaled_linear", "timesteps": 1000, "zero_terminal_snr": False, "beta_start": 0.00085,
        "beta_end": 0.012, "prediction": "v_prediction", "start": "noise", "steps_offset": 1, "final": "first",
    }  # fmt: skip
    assert defaults == {
        "steps": 7, "ensemble_size": 1, "reduction": "aligned_median", "spacing": "leading", "processing_resolution": 0,
    }  # fmt: skip
    assert load(folder, prediction="epsilon", spacing="trailing", steps=3, resolution=768).facts["tasks"]["depth"][
        "defaults"
    ] == defaults | {"steps": 3, "spacing": "trailing", "processing_resolution": 768}


@pytest.mark.parametrize("told", [{"dtr": True}, {"dtr_beta": 0.5}, {"active": 2}, {"heads": 4}, {"grid": 4}])
def test_options_of_transformers_are_refused(folder: Path, told: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"a U-Net has no use for {next(iter(told))}"):
        load(folder, **told)


def test_the_codec_is_the_autoencoders_mean_times_its_scale(folder: Path) -> None:
    peer, codec = foreign.autoencoder("AutoencoderKL"), open_codec(folder)
    pictures = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        latents = peer.encode(pictures).latent_dist.mode() * peer.config.scaling_factor
        torch.testing.assert_close(codec.encode(pictures), latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.decode(latents), peer.decode(latents / 0.18215).sample, atol=1e-5, rtol=1e-5)
    assert (codec.channels, codec.stride, codec.planes) == (4, 2, 3)


def test_attention_layers_under_older_names_are_read(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    today = load_file(file)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {}
    for key, value in today.items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        older[key] = value
    assert older.keys() != today.keys()
    save_file(older, file)
    found = open_autoencoder(tmp_path / "vae").inner.state_dict()
    assert all(torch.equal(found[key], value) for key, value in renamed(today).items() if key in found)


def broken(folder: Path, place: Path, file: str, **fields: Any) -> Path:
    """The folder with other fields in one of its configurations."""
    shutil.copytree(folder, place)
    said = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(said | fields))
    return place


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "normals": ("model_index.json", {"_class_name": "MarigoldNormalsPipeline"}, "only depth"),
    "disparity": ("model_index.json", {"prediction_type": "disparity"}, "only depth"),
    "consistency": ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "LCMScheduler"),
    "clipping": ("scheduler/scheduler_config.json", {"clip_sample": True}, "clips its estimates"),
    "betas": ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained betas"),
    "sigmoid": ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "sigmoid"),
    "text to image": ("unet/config.json", {"in_channels": 4}, "conv_in"),
    "classes": ("unet/config.json", {"num_class_embeds": 3}, "num_class_embeds"),
    "no levels": ("unet/config.json", {"block_out_channels": []}, "UNet2DConditionModel"),
    "nonsense": ("unet/config.json", {"block_out_channels": "many"}, "UNet2DConditionModel"),
    "another network": ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
    "another codec": ("vae/config.json", {"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
    "shifted": ("vae/config.json", {"shift_factor": 0.1}, "shift"),
    "wider": ("vae/config.json", {"block_out_channels": [8, 32]}, "vae"),
    "another text": ("text_encoder/config.json", {"hidden_size": 48, "projection_dim": 48}, "text encoder"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_folder_that_cannot_be_served_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    file, fields, told = FAULTS[case]
    with pytest.raises((ModelError, InvalidInput), match=told) as refusal:
        load(broken(folder, tmp_path / "broken", file, **fields))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", ["unet", "scheduler", "text_encoder", "tokenizer", "vae"])
def test_a_part_that_is_missing_is_named(folder: Path, tmp_path: Path, part: str) -> None:
    place = tmp_path / "incomplete"
    shutil.copytree(folder, place)
    shutil.rmtree(place / part)
    with pytest.raises(ModelError, match=part):
        load(place, "marigold")
