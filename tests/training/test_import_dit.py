"""Transformers of others in ours: their outputs to rounding, what a card and a run say of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade.errors import InvalidInput, ModelError
from saccade.repository import Repository
from tests.training import foreign
from training.importers.command import run_import
from training.importers.imported import Imported
from training.importers.load import load
from training.models.dit import DiT
from training.models.routing import Routing, channel_masks

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = {"dit": "meta-dit", "dtr": "meta-dit", "dit_moe": "dit-moe", "generalist": "generalist"}


def golden(tmp_path: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint as a training script writes it, and the vectors."""
    found = load_file(GOLDEN / f"{name}.safetensors")
    weights = {k.removeprefix("weights/"): v for k, v in found.items() if k.startswith("weights/")}
    file = tmp_path / f"{name}.pt"
    torch.save({"ema": weights, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model=name)}, file)
    return file, found


def computed(imported: Imported, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    assert imported.config is not None
    dit = DiT(imported.config).eval()
    dit.load_state_dict(imported.state)
    with torch.no_grad():
        return dit(x, t, y)


@pytest.mark.parametrize("name", GOLDENS)
def test_an_imported_file_computes_what_its_reference_does(tmp_path: Path, name: str) -> None:
    file, vectors = golden(tmp_path, name)
    imported = load(file, heads=4, grid=4, dtr=name == "dtr")
    assert imported.kind == GOLDENS[name]
    ours = computed(imported, vectors["in/x"], vectors["in/t"], vectors["in/y"])
    assert (ours - vectors["out"]).abs().max() <= 1e-5


def routed(tmp_path: Path, change: Callable[[Tensor], Tensor] = lambda table: table, blocks: int = 2) -> Path:
    """DTR's file as its authors save it: a table of masks in every block."""
    file, vectors = golden(tmp_path, "dtr")
    weights = torch.load(file, weights_only=False)["ema"]
    table = change(vectors["mask"].float())
    weights |= {f"blocks.{block}.routing._unit_mapping": table.clone() for block in range(blocks)}
    torch.save({"model": weights, "ema": weights}, file)
    return file


def test_the_authors_tables_of_task_routing_are_read(tmp_path: Path) -> None:
    vectors = golden(tmp_path, "dtr")[1]
    for told in ({}, {"dtr": True}, {"dtr_alpha": 4.0}):
        imported = load(routed(tmp_path), heads=4, grid=4, **told)
        assert imported.config is not None
        assert imported.config.routing == Routing(4.0, 0.8)
        ours = computed(imported, vectors["in/x"], vectors["in/t"], vectors["in/y"])
        assert (ours - vectors["out"]).abs().max() <= 1e-5


@pytest.mark.parametrize("wanted", [Routing(2.0, 0.5), Routing(1.5, 0.37), Routing(6.0, 1.0), Routing(1.0, 0.05)])
def test_a_window_of_another_shape_is_found_by_its_table(tmp_path: Path, wanted: Routing) -> None:
    theirs = channel_masks(wanted, 64, 1000)
    config = load(routed(tmp_path, lambda _: theirs), heads=4, grid=4, dtr=True).config
    assert config is not None
    assert config.routing is not None
    assert torch.equal(channel_masks(config.routing, 64, 1000), theirs)


@pytest.mark.parametrize(
    ("change", "blocks", "told", "said"),
    [
        (lambda table: table[:, torch.randperm(64)], 2, {}, "not DTR's"),  # the paper's random routing
        (lambda table: table * 0, 2, {}, "0 of 64 channels"),
        (lambda table: table * 0.5, 2, {}, "not DTR's"),
        (lambda table: table[:500], 2, {}, r"is \[500, 64\], not \[1000, 64\]"),
        (lambda table: table, 1, {}, "1 tables of task routing .* in 2 blocks"),
        (lambda table: table, 2, {"dtr_alpha": 2.0}, "windows of alpha 2, beta 0.8"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], blocks: int, told: dict[str, float], said: str
) -> None:
    with pytest.raises(ModelError, match=said) as error:
        load(routed(tmp_path, change, blocks), heads=4, grid=4, **told)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["dit", "dit_moe", "generalist"])
def test_routing_can_be_told_of_every_transformer(tmp_path: Path, name: str) -> None:
    file, _ = golden(tmp_path, name)
    for told, wanted in (
        ({}, None),
        ({"dtr": True}, Routing()),
        ({"dtr": True, "dtr_alpha": 2.0}, Routing(alpha=2.0)),
        ({"dtr_beta": 0.5}, Routing(beta=0.5)),
    ):
        config = load(file, heads=4, grid=4, **told).config
        assert config is not None
        assert config.routing == wanted
    with pytest.raises(InvalidInput, match="beta"):
        load(file, heads=4, grid=4, dtr_beta=2.0)


@pytest.mark.parametrize("name", ["dit_moe", "generalist"])
def test_how_many_experts_answer_can_be_told(tmp_path: Path, name: str) -> None:
    file, _ = golden(tmp_path, name)
    for told in (1, 3):
        config = load(file, heads=4, grid=4, active=told).config
        assert config is not None
        assert config.experts is not None
        assert config.experts.active == told
    with pytest.raises(InvalidInput, match="cannot be active"):
        load(file, heads=4, grid=4, active=99)


@pytest.mark.parametrize(
    "told",
    [
        {"active": 2},
        {"steps": 3},
        {"resolution": 64},
        {"spacing": "trailing"},
        {"steps": -1},
        {"resolution": -8},
        {"heads": 0},
        {"grid": -1},
    ],
)
def test_options_that_a_generator_has_no_use_for_are_refused(tmp_path: Path, told: dict[str, Any]) -> None:
    file, _ = golden(tmp_path, "dit")
    with pytest.raises(InvalidInput, match=next(iter(told))):
        load(file, **({"heads": 4, "grid": 4} | told))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiTPipeline's folder: transformer/, vae/, scheduler/."""
    from diffusers import DDIMScheduler

    place = tmp_path_factory.mktemp("pipeline")
    foreign.dit().save_pretrained(place / "transformer")
    foreign.autoencoder("AutoencoderTiny").save_pretrained(place / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(place / "scheduler")
    return place


@pytest.mark.parametrize("edge", [8, 16])
def test_ours_is_diffusers_dit(folder: Path, edge: int) -> None:
    """Same weights, same input, at the size of training and at twice that: at most 1e-4, of outputs of deviation 2."""
    draw = torch.Generator().manual_seed(edge)
    x = torch.randn(4, 4, edge, edge, generator=draw)
    t, y = torch.tensor([0, 321, 700, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        theirs = foreign.dit()(x, t, y).sample
    assert theirs.std() > 1
    assert (computed(load(folder), x, t, y) - theirs).abs().max() <= 1e-4


def test_the_noise_comes_from_the_scheduler_beside_it(folder: Path) -> None:
    imported = load(folder)
    assert imported.kind == "diffusers-dit"
    assert imported.servable is not None
    noise = imported.servable.noise
    assert (noise.schedule, noise.prediction, noise.beta_start, noise.beta_end) == ("linear", "epsilon", 0.0001, 0.02)
    told = load(folder, schedule="cosine", prediction="v_prediction").servable
    assert told is not None
    assert (told.noise.schedule, told.noise.prediction, told.noise.beta_start) == ("cosine", "v_prediction", None)


def test_copies_that_differ_between_blocks_are_refused(tmp_path: Path) -> None:
    model = foreign.dit()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3, 3] += 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"copies of y_embedder\.embedding_table\.weight differ"):
        load(tmp_path)


def test_routing_can_be_told_of_diffusers_folders(folder: Path) -> None:
    config = load(folder, dtr=True, dtr_beta=0.5).config
    assert config is not None
    assert config.routing == Routing(beta=0.5)


def edited(folder: Path, tmp_path: Path, **fields: Any) -> Path:
    """The transformer with another configuration."""
    import json
    import shutil

    place = tmp_path / "edited"
    shutil.copytree(folder / "transformer", place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | fields))
    return place


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "PixArtTransformer2DModel"},
        {"norm_type": "layer_norm"},
        {"norm_eps": 1e-2},
        {"num_layers": 2},
        {"num_layers": 4},
        {"num_layers": "3"},
        {"num_layers": 10**9},
        {"num_attention_heads": 0},
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as told:
        load(edited(folder, tmp_path, **fields))
    assert "\n" not in str(told.value)


def test_a_generator_becomes_a_directory_without_tasks_and_a_run_to_start_from(folder: Path, tmp_path: Path) -> None:
    import asyncio

    import numpy as np

    from saccade.backends import Ticket
    from saccade.backends.embedded import Embedded
    from training.stages.started import ClassesConfig, open_start

    repository, run = tmp_path / "models", tmp_path / "run"
    card = run_import(str(folder), repository, name="classes", checkpoint=run, licence="CC-BY-NC 4.0")
    assert card is not None
    assert Repository(repository).card("classes") == card
    assert (card.tasks, card.classes, card.licence) == ({}, 11, "CC-BY-NC 4.0")

    started = open_start(str(run))
    assert isinstance(started.config, ClassesConfig)
    assert started.config.classes == 10
    draw = torch.Generator().manual_seed(0)
    x, t, y = torch.randn(3, 4, 8, 8, generator=draw), torch.tensor([7, 400, 999]), torch.tensor([2, 10, 0])
    dit = DiT(started.config.model).eval()
    dit.load_state_dict(started.state)
    with torch.no_grad():
        ours, theirs = dit(x, t, y)[:, :4], foreign.dit()(x, t, y).sample[:, :4]
    assert (ours - theirs).abs().max() <= 1e-4

    async def asked() -> tuple[Any, Any, Any]:
        backend = Embedded.load(Repository(repository), "classes", engine="onnxruntime", precision="fp32", threads=1)
        picture = np.linspace(-1, 1, 3 * 48 * 80, dtype=np.float32).reshape(1, 3, 48, 80)
        seen = await backend.encode(picture, picture, np.array([0]), Ticket())
        prediction = await backend.denoise(x.numpy(), t.numpy(), y.numpy(), {}, Ticket())
        return seen["image_latent"], prediction, await backend.decode(seen["image_latent"], Ticket())

    latent, prediction, picture = asyncio.run(asked())
    assert latent.shape == (1, 4, 6, 10)
    assert picture.shape == (1, 3, 48, 80)
    assert np.abs(prediction - theirs.numpy()).max() <= 1e-4
