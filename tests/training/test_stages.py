"""The stages one after another on tiny models: each begins with what the one before ended with, and what comes out is
served. One chain of runs serves all tests."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.backends import Ticket
from saccade.backends.embedded import Embedded
from saccade.errors import InvalidInput, ModelError
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository
from tests.training.conftest import SIZE
from training import evaluate, validation
from training.backend import TorchBackend
from training.codecs import CodecConfig, pictures_of, sources_of_targets, targets_of
from training.config import build
from training.data import LatentWriter
from training.graphs import disagreement, write_torchscript
from training.loading import open_run
from training.loop import checkpoint
from training.models.dit import named
from training.objectives import DiffusionConfig
from training.stages import adapt, classify, encode, finetune, pretrain, upcycle
from training.stages.command import main, parser
from training.stages.exporting import export_run
from training.stages.perceive import labels_for
from training.stages.sources import Shares
from training.stages.started import ClassesConfig, open_start

NET = {"width": 32, "heads": 2, "depth": 1}
LOOP = {"steps": 2, "batch": 4, "lr": 1e-2, "seed": 3, "ema": 0.5}
TASKS = ("depth", "flow", "amodal")


@dataclass(frozen=True)
class Chain:
    """Folders of runs."""

    folder: Path
    shards: Path

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name)

    def tuning(self, **more: Any) -> dict[str, Any]:
        data = [{"kind": "scenes", "path": str(self.shards)}]
        return {"data": data, "sizes": [[32, 48]], "loop": LOOP, **more}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Chain:
    """pretrain, finetune from it, upcycle and adapt from that; adapt from pretrain too."""
    made = Chain(tmp_path_factory.mktemp("runs"), shards)
    images = {"kind": "scenes", "path": str(shards)}
    first = {"images": images, "sizes": [[32, 32]], "model": NET, "loop": LOOP}
    pretrain.run(build(pretrain.Config, first), Path(made.pretrain))
    finetune.run(build(finetune.Config, made.tuning(start=made.pretrain, routed=True)), Path(made.finetune))
    experts = {"count": 3, "active": 2, "shared": False, "gated": False, "renormalise": True}
    upcycle.run(build(upcycle.Config, made.tuning(start=made.finetune, experts=experts)), Path(made.upcycle))
    adapt.run(build(adapt.Config, made.tuning(start=made.finetune, rank=2)), Path(made.adapt))
    return made


@pytest.fixture(scope="module")
def served(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The adapted model, exported."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    export_run(Path(chain.adapt), repository, name="adapted")
    return Repository(repository)


def inputs_of(task: Any) -> Inputs:
    draw = np.random.default_rng(1)
    picture = draw.integers(0, 256, (40, 56, 3), np.uint8)
    mask = np.zeros((40, 56), bool)
    mask[8:30, 10:40] = True
    more = {"flow": {"next_image": np.roll(picture, 2, 1)}, "amodal": {"mask": mask}}
    return Inputs(task, picture, **more.get(task, {}))


async def ask(backend: Any, task: Any) -> Answer:
    options = Options(steps=3, ensemble_size=2, reduction="mean", processing_resolution=48)
    try:
        return await Pipeline(backend)(inputs_of(task), options.resolve(backend.card, task))
    finally:
        await backend.aclose()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_was_tuned_and_exported_answers_as_eager_torch_does(
    chain: Chain, served: Repository, engine: str, task: str
) -> None:
    theirs = asyncio.run(ask(Embedded.load(served, engine=engine, precision="fp32", threads=1), task)).prediction
    ours = asyncio.run(ask(TorchBackend.of_run(Path(chain.adapt)), task)).prediction
    scale = max(1.0, float(np.abs(ours.astype(np.float64)).max()))
    assert np.abs(theirs.astype(np.float64) - ours.astype(np.float64)).max() <= 1e-4 * scale
    assert theirs.shape == {"flow": (40, 56, 2)}.get(task, (40, 56))


def test_one_graph_serves_a_batch_of_several_tasks_each_by_its_own_adapters(chain: Chain, served: Repository) -> None:
    """Rows of a mixed batch are what they are alone, and what eager torch says; the same input differs by its task."""
    servable, _ = open_run(Path(chain.adapt))
    card = served.card("adapted")
    labels = np.array([card.tasks[task].label for task in (*TASKS, "depth")], np.int64)
    latent, timestep, _, condition = servable.examples(1, 32, 48, seed=4)["denoiser"]
    rows = [np.repeat(value.numpy(), 4, 0) for value in (latent, timestep)]
    seen = {"condition": np.repeat(condition.numpy(), 4, 0)}

    async def run() -> tuple[np.ndarray, list[np.ndarray]]:
        backend = Embedded.load(served, engine="onnxruntime", threads=1)
        mixed = await backend.denoise(*rows, labels, seen, Ticket())
        alone = [
            await backend.denoise(
                rows[0][:1], rows[1][:1], labels[i : i + 1], {"condition": seen["condition"][:1]}, Ticket()
            )
            for i in range(4)
        ]
        await backend.aclose()
        return mixed, alone

    mixed, alone = asyncio.run(run())
    np.testing.assert_allclose(mixed, np.concatenate(alone), atol=1e-5)
    with torch.no_grad():
        eager = servable.denoiser(*map(torch.from_numpy, (*rows, labels, seen["condition"]))).numpy()
    np.testing.assert_allclose(mixed, eager, atol=1e-5 * np.abs(eager).max())
    assert all(np.abs(mixed[i] - mixed[j]).max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))
    np.testing.assert_array_equal(mixed[0], mixed[3])


def test_adapting_trains_what_is_a_tasks_own_and_nothing_else(chain: Chain) -> None:
    before, after = (checkpoint.read(Path(run), "model")[0] for run in (chain.finetune, chain.adapt))
    base, _ = checkpoint.read(Path(chain.finetune), "average")
    own = ("scale", "shift", "down", "up", "task_offset")
    for key, value in after.items():
        if key.rpartition(".")[2] in own:
            assert key.endswith("down") or value.abs().max() > 0, f"{key} has not learned"
        elif not key.startswith("x_embedder"):
            assert torch.equal(value, base[key]), key
    assert before.keys() < after.keys()


def test_upcycling_begins_where_the_dense_model_ended(chain: Chain) -> None:
    made, started = upcycle.objective(build(upcycle.Config, chain.tuning(start=chain.finetune)))
    dense, _ = open_run(Path(chain.finetune))
    inputs = dense.examples(3, 32, 48, seed=7)["denoiser"]
    with torch.no_grad():
        expected = dense.denoiser(*inputs)
        found = made.model.eval()(torch.cat([inputs[3], inputs[0]], 1), inputs[1], inputs[2])
    assert made.model.config.experts.count == 8
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert [stage["stage"] for stage in started.lineage] == ["pretrain", "finetune"]


def test_adapting_begins_where_the_frozen_model_ended(chain: Chain) -> None:
    made, _ = adapt.objective(build(adapt.Config, chain.tuning(start=chain.finetune, rank=3)))
    base, _ = open_run(Path(chain.finetune))
    inputs = base.examples(3, 32, 48, seed=7)["denoiser"]
    with torch.no_grad():
        expected = base.denoiser(*inputs)
        found = made.model.eval()(torch.cat([inputs[3], inputs[0]], 1), inputs[1], inputs[2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_pretrained_model_can_be_adapted_without_finetuning(chain: Chain) -> None:
    made, _ = adapt.objective(build(adapt.Config, chain.tuning(start=chain.pretrain, rank=2)))
    config = made.perception.config
    assert (config.model.inputs, config.model.condition, config.model.channels) == (3, 32, 26)
    loss, parts = made.loss(made.model, made.batch(0, 0, 1), torch.Generator().manual_seed(0), 0)
    assert torch.isfinite(loss)
    assert parts.keys() <= set(TASKS)


def test_finetuning_keeps_what_pretraining_learned_of_alike_inputs(chain: Chain) -> None:
    """If all inputs are the same picture, the widened model sees what the pretrained one saw, and says of each target
    channel what that one said of its source (the paper's widening)."""
    started = open_start(chain.pretrain)
    made, _ = finetune.objective(build(finetune.Config, chain.tuning(start=chain.pretrain)))
    draw = torch.Generator().manual_seed(0)
    picture, t = torch.randn((2, 16, 4, 6), generator=draw), torch.tensor([10, 900])
    old = pretrain.network(started.config.model, started.config.diffusion)
    old.load_state_dict(started.state)
    sources = list(sources_of_targets())
    null, depth = torch.tensor([2, 2]), torch.full((2,), made.perception.config.tasks["depth"])
    with torch.no_grad():
        expected = old.eval()(picture, t, null)[:, sources]
        found = made.model.eval()(torch.cat([picture, picture, picture[:, sources]], 1), t, depth)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_every_run_of_a_configuration_ends_alike_and_its_losses_are_logged(chain: Chain, tmp_path: Path) -> None:
    config = build(finetune.Config, chain.tuning(start=chain.pretrain, routed=True))
    finetune.run(replace(config, loop=replace(config.loop, log_every=1)), tmp_path / "again")
    first, second = (checkpoint.read(Path(run), "model")[0] for run in (chain.finetune, tmp_path / "again"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    rows = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert {"loss", *TASKS} <= set().union(*rows)


@pytest.mark.parametrize(
    "model",
    [
        {**NET, "routing": {"alpha": 4.0, "beta": 0.8}},
        {**NET, "name": "S/2-8E2A", "experts": {"count": 4, "active": 2}},
        {**NET, "patch": 4, "routing": {"beta": 0.5}, "experts": {"count": 3, "active": 1, "gated": False}},
    ],
)
@pytest.mark.parametrize("weighting", ["min_snr", "uncertainty"])
def test_new_models_of_every_kind_learn(chain: Chain, tmp_path: Path, model: dict[str, Any], weighting: str) -> None:
    diffusion = {"weighting": weighting, "noise": {"strength": 0.9}}
    tasks = {"flow": 1, "depth": 2}
    config = build(finetune.Config, chain.tuning(model=model, diffusion=diffusion, tasks=tasks, sizes=[[32, 64]]))
    made, _ = finetune.objective(config)
    batch = made.batch(0, 0, 1)
    optimizer = torch.optim.Adam(made.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, parts = made.loss(made.model, batch, torch.Generator().manual_seed(0), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert ("balance" in parts) == ("experts" in model)
    assert "amodal" not in made.perception.config.tasks


def test_a_mixture_of_experts_as_torchscript_answers_as_eager_torch(chain: Chain, tmp_path: Path) -> None:
    servable, _ = open_run(Path(chain.upcycle))
    for part in ("encoder", "denoiser", "decoder"):
        write_torchscript(servable, part, tmp_path / part / "model.pt")
        for size in ((1, 96, 32), (5, 48, 64)):
            assert disagreement(servable, part, tmp_path / part / "model.pt", size, seed=9) <= 1e-5


def test_latents_that_were_encoded_train_as_the_pictures_do(chain: Chain, tmp_path: Path) -> None:
    images = {"kind": "scenes", "path": str(chain.shards), "mirror": False}
    count = encode.run(build(encode.Config, {"images": images, "size": [32, 32], "per_shard": 5}), tmp_path / "latents")
    assert count == 16
    made = {"images": {"kind": "latents", "path": str(tmp_path / "latents")}, "model": NET, "loop": LOOP}
    objective, _ = pretrain.objective(build(pretrain.Config, made))
    assert (objective.config.classes, objective.config.model.channels, objective.config.size) == (2, 16, (32, 32))
    rows = objective.batch(0, 0, 1).rows
    assert rows.shape == (4, 16, 4, 4)
    codec = pictures_of(objective.config.codec)
    again = codec.encode(codec.decode(rows))
    torch.testing.assert_close(again, rows, atol=0.05, rtol=0.05)  # they lie where pictures of this codec do
    pretrain.run(build(pretrain.Config, made), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_latents_have_about_the_deviation_of_noise(chain: Chain) -> None:
    config = json.loads((Path(chain.finetune) / "config.json").read_text())["about"]["perception"]["codec"]
    std = np.array(config["target_std"])
    assert std.shape == (26,)
    assert (std >= 0.03).all()
    assert std[0] > 5 * std[9]


def test_codecs_give_back_what_they_can_say() -> None:
    """A smooth picture comes back through either codec, and a target's planes do not leak into each other."""
    at = np.linspace(-1, 1, 32)
    smooth = torch.from_numpy(
        np.stack([at[:, None] * np.ones(32), at * np.ones((32, 1)), -at[:, None] * at])[None]
    ).float()
    codec = pictures_of(CodecConfig(picture_std=tuple(np.linspace(0.5, 2, 16))))
    assert float((codec.decode(codec.encode(smooth)) - smooth).abs().mean()) < 0.03
    planes = torch.zeros(1, 4, 32, 32)
    planes[:, 1] = smooth[:, 1]
    targets = targets_of(CodecConfig(target_std=tuple(np.linspace(0.5, 2, 26))))
    back = targets.decode(targets.encode(planes))
    assert float((back - planes).abs().max()) < 0.05


def test_shares_are_exact_and_rows_are_counted_without_counting() -> None:
    shares = Shares({"depth": 1, "flow": 2, "amodal": 1}, seed=5)
    counted = dict.fromkeys(TASKS, 0)
    for part in range(3 * 1024 // 7):
        for task, (rows, before) in shares.rows(part * 7, 7).items():
            assert before == counted[task]
            counted[task] += rows
    assert sum(counted.values()) == 3 * 1024 // 7 * 7
    assert abs(counted["flow"] - 2 * counted["depth"]) < 12


def test_parts_of_a_step_share_no_rows(chain: Chain) -> None:
    made, _ = finetune.objective(build(finetune.Config, chain.tuning(model=NET)))
    one, two = made.batch(5, 0, 2), made.batch(5, 1, 2)
    assert len(one.image) == len(two.image) == 2
    assert not torch.equal(one.image, two.image)
    assert torch.equal(made.batch(5, 1, 2).image, two.image)


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        (finetune, {"start": "nowhere"}, "no such run: nowhere"),
        (finetune, {"data": []}, "no dataset has depth, flow, amodal"),
        (finetune, {"data": [{"kind": "scenes", "path": "nowhere"}]}, "no such folder: nowhere"),
        (finetune, {"data": [{"kind": "hypersin", "path": "."}]}, "hypersim"),
        (upcycle, {}, "begins with a dense model"),
        (adapt, {}, "begins with a trained model"),
        (finetune, {"model": {"name": "a9"}}, "a1"),
        (finetune, {"model": {**NET, "patch": 4}}, r"multiples of 32 pixels, not \[32, 48\]"),
        (finetune, {"sizes": [[0, 0]]}, "sizes must be from 1 to 65536, not 0"),
        (finetune, {"sizes": [[32, -8]]}, "sizes must be from 1"),
        (finetune, {"sizes": [[20, 20]]}, r"multiples of 8 pixels, not \[20, 20\]"),
        (finetune, {"amodal_context": -0.1}, "amodal_context must be at least 0"),
        (finetune, {"depth_knee": -1}, "depth_knee must be at least 0"),
        (finetune, {"data": [{"weight": 0}]}, "data.*weight must be above 0, not 0"),
        (finetune, {"data": [{"real_share": 1.5}]}, "real_share must be from 0 to 1, not 1.5"),
        (finetune, {"data": [{"threads": 0}]}, "threads must be at least 1"),
        (upcycle, {"dropout": 2}, "dropout must be from 0 to below 1"),
        (finetune, {"loop": {"seed": -1}}, "loop: seed must be from 0"),
        (finetune, {"loop": {"seed": 1e30}}, "loop: seed must be from 0"),
        (finetune, {"diffusion": {"noise": {"strength": 1.5}}}, "diffusion.noise: strength must be from 0 to 1"),
        (finetune, {"diffusion": {"shift": 1e-9}}, "diffusion: shift must be from 1e-06"),
    ],
)
def test_what_cannot_be_run_says_why(chain: Chain, stage: Any, change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        stage.objective(build(stage.Config, chain.tuning(**change)))


def class_folders(root: Path, classes: int) -> dict[str, Any]:
    for number in range(classes):
        (root / f"n{number}").mkdir(parents=True)
        picture = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(picture).save(root / f"n{number}" / "one.png")
    return {"kind": "folders", "path": str(root)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sizes": [[0, 0]]}, "sizes must be from 1"),
        ({"sizes": [[20, 20]]}, "multiples of 8 pixels"),
        ({"classes": 2}, "there are 3 classes, the model knows 2"),
        ({"classes": -1}, "classes must be at least 0"),
        ({"images": {"broken_share": 2}}, "broken_share must be from 0 to 1"),
        ({"images": {"threads": 0}}, "threads must be at least 1"),
    ],
)
def test_what_cannot_be_pretrained_says_why(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    images = class_folders(tmp_path, 3) | change.pop("images", {})
    with pytest.raises(InvalidInput, match=told):
        pretrain.objective(build(pretrain.Config, {"images": images, "sizes": [[16, 16]], "model": NET, **change}))


def latents(folder: Path, shape: tuple[int, int, int], label: int, **about: Any) -> dict[str, Any]:
    with LatentWriter(folder, {"codec": asdict(CodecConfig()), **about}) as writer:
        for _ in range(4):
            writer.add(np.zeros(shape), label)
    return {"images": {"kind": "latents", "path": str(folder)}, "model": NET, "loop": LOOP, "classes": 3}


def test_latents_of_other_channels_or_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the latents have 4 channels, the model 16"):
        pretrain.objective(build(pretrain.Config, latents(tmp_path / "4", (4, 4, 4), 0)))
    with pytest.raises(InvalidInput, match="not whole patches of 2"):
        pretrain.objective(build(pretrain.Config, latents(tmp_path / "odd", (16, 3, 4), 0)))
    with pytest.raises(InvalidInput, match="there are 9 classes, the model knows 3"):
        pretrain.objective(build(pretrain.Config, latents(tmp_path / "9", (16, 4, 4), 0, classes=9)))
    untold, _ = pretrain.objective(build(pretrain.Config, latents(tmp_path / "3", (16, 4, 4), 3)))
    with pytest.raises(InvalidInput, match="of class 3, the model knows the classes 0 to 2"):
        untold.batch(0, 0, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": [0, 16]}, "size must be from 1"),
        ({"size": [20, 16]}, "multiples of 8"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"limit": -1}, "limit must be at least 0"),
    ],
)
def test_what_cannot_be_encoded_says_why(chain: Chain, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        encode.run(build(encode.Config, encoding(chain, **change)), tmp_path / "latents")


def encoding(chain: Chain, **change: Any) -> dict[str, Any]:
    return {"images": {"kind": "scenes", "path": str(chain.shards)}, "size": [16, 16], **change}


def test_encoding_again_what_is_encoded_says_so(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The deviations are those of the shards, though others would be measured today."""
    assert encode.run(build(encode.Config, encoding(chain, limit=6)), tmp_path) == 6
    monkeypatch.setattr(classify, "MEASURED_ROWS", 3)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with caplog.at_level("INFO"):
        assert encode.run(build(encode.Config, encoding(chain, limit=6)), tmp_path) == 6
    assert "has all 6 latents already" in caplog.text
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


@pytest.fixture(scope="module")
def begun(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of finetune with new weights, and its configuration."""
    out, given = tmp_path_factory.mktemp("begun"), chain.tuning(model=NET, sizes=[[32, 32]])
    finetune.run(build(finetune.Config, given), out)
    return out, given


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {**NET, "heads": 4}}, "begun with model.heads = 2, not 4"),
        ({"diffusion": {"prediction": "sample"}}, "begun with diffusion.prediction = v_prediction, not sample"),
        ({"diffusion": {"schedule": "linear"}}, "begun with diffusion.schedule = cosine, not linear"),
        ({"tasks": {"depth": 1, "flow": 1}}, "begun with tasks.amodal = 2, not nothing"),
        ({"depth_knee": 0.5}, "coding.depth"),
        ({"codec": {"target_std": [2.0] * 26}}, "begun with codec.target_std"),
    ],
)
def test_a_run_does_not_go_on_as_another_model(
    begun: tuple[Path, dict[str, Any]], change: dict[str, Any], told: str
) -> None:
    out, given = begun
    said = (out / "config.json").read_text()
    with pytest.raises(InvalidInput, match=told):
        finetune.run(build(finetune.Config, {**given, **change}), out)
    assert (out / "config.json").read_text() == said


def test_a_run_goes_on_with_other_sizes_steps_and_rates_and_its_own_deviations(
    begun: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, given = shutil.copytree(begun[0], tmp_path / "run"), begun[1]
    before = json.loads((out / "config.json").read_text())["about"]["perception"]
    loop, diffusion = {**LOOP, "steps": 3, "lr": 1e-3}, {"weighting": "min_snr"}
    finetune.run(build(finetune.Config, {**given, "sizes": [[48, 32]], "loop": loop, "diffusion": diffusion}), out)
    after = json.loads((out / "config.json").read_text())["about"]["perception"]
    assert checkpoint.read(out)[1]["step"] == 3
    assert (after["codec"], after["size"]) == (before["codec"], [48, 32])


def test_pretraining_does_not_go_on_as_another_model(chain: Chain) -> None:
    given = {"images": {"kind": "scenes", "path": str(chain.shards)}, "sizes": [[48, 32]], "model": NET, "loop": LOOP}
    made, _ = pretrain.objective(build(pretrain.Config, given), Path(chain.pretrain))
    assert made.config.codec == open_start(chain.pretrain).config.codec
    with pytest.raises(InvalidInput, match=r"begun with model\.labels = 3, not 6"):
        pretrain.run(build(pretrain.Config, {**given, "classes": 5}), Path(chain.pretrain))


def test_a_field_of_experts_alone_lies_over_those_of_upcycling(chain: Chain) -> None:
    config = build(upcycle.Config, chain.tuning(start=chain.finetune, experts={"count": 4}))
    assert config.experts == replace(upcycle.PLAIN, count=4)
    told = parser("upcycle").format_help()
    assert "experts.renormalise (true or false) [default: true]" in told
    assert "experts.shared (true or false) [default: false]" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--device", "foo"], "a device is cpu, cuda or cuda:N, not 'foo'"),
        (["--device", "cpu", "--threads", "-3"], "threads must be at least 1"),
    ],
)
@pytest.mark.parametrize("stage", ["finetune", "encode"])
def test_devices_and_threads_that_are_none_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, more: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([stage, "-o", str(tmp_path), *more])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_tasks_keep_the_labels_that_they_have() -> None:
    """The published generalist's: depth 1000, amodal 1001, flow 1002 (and 1003)."""
    model = named("a1", labels=1005, first_label=1000)
    assert labels_for(TASKS, model, {"depth": 1000, "amodal": 1001, "flow": 1002}) == {
        "depth": 1000, "flow": 1002, "amodal": 1001,
    }  # fmt: skip
    assert labels_for(TASKS, model, {}) == {"depth": 1000, "flow": 1001, "amodal": 1002}
    assert labels_for(TASKS, model, {"amodal": 1001}) == {"depth": 1000, "flow": 1002, "amodal": 1001}
    with pytest.raises(InvalidInput, match="no label left for amodal"):
        labels_for(TASKS, named("a1", labels=2), {})


def test_a_pretrained_model_is_no_answer(chain: Chain) -> None:
    with pytest.raises(InvalidInput, match="finetune or adapt it first"):
        open_run(Path(chain.pretrain))


def test_upcycling_a_mixture_is_refused(chain: Chain) -> None:
    with pytest.raises(InvalidInput, match="dense"):
        upcycle.objective(build(upcycle.Config, chain.tuning(start=chain.upcycle)))


def test_a_run_with_another_models_weights_is_refused(chain: Chain, tmp_path: Path) -> None:
    state, said = checkpoint.read(Path(chain.finetune))
    said["about"]["perception"]["model"]["depth"] = 2
    checkpoint.write_weights(tmp_path / "other", state, "finetune", said["about"])
    with pytest.raises(ModelError, match=r"lacks: blocks\.1\."):
        open_run(tmp_path / "other")
    said["about"]["perception"]["model"]["depth"] = "deep"
    checkpoint.write_weights(tmp_path / "broken", state, "finetune", said["about"])
    with pytest.raises(ModelError, match=r"model\.depth is 'deep'"):
        open_run(tmp_path / "broken")


def test_pretraining_goes_on_from_a_start(chain: Chain) -> None:
    images = {"kind": "scenes", "path": str(chain.shards)}
    given = {"images": images, "sizes": [[32, 32]], "loop": LOOP, "start": chain.pretrain, "start_weights": "model"}
    made, started = pretrain.objective(build(pretrain.Config, {**given, "diffusion": {"weighting": "min_snr"}}))
    wanted = checkpoint.read(Path(chain.pretrain), "model")[0]
    assert all(torch.equal(value, wanted[key]) for key, value in made.model.state_dict().items())
    assert made.config.diffusion.weighting == "min_snr"
    assert started is not None
    assert made.config.codec == started.config.codec
    with pytest.raises(InvalidInput, match="class-conditional"):
        pretrain.objective(build(pretrain.Config, {**given, "start": chain.finetune}))


def test_a_start_brings_its_own_network(chain: Chain) -> None:
    images = {"kind": "scenes", "path": str(chain.shards)}
    for stage, given in ((finetune, chain.tuning()), (pretrain, {"images": images, "sizes": [[32, 32]]})):
        given = {**given, "start": chain.pretrain}
        stage.objective(build(stage.Config, {**given, "model": NET}))  # says what is so
        for other, told in (({**NET, "width": 64}, "width 32, model says 64"), ({**NET, "patch": 4}, "patch 2")):
            with pytest.raises(InvalidInput, match=f"{told}.*drop model, or drop start"):
                stage.objective(build(stage.Config, {**given, "model": other}))


def test_a_model_on_an_autoencoders_latents_is_tuned_and_asked(chain: Chain, tmp_path: Path) -> None:
    """As the papers have it: four channels, targets of three planes, read back as their conventions say."""
    import diffusers

    torch.manual_seed(0)
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**small, **blocks, latent_channels=4).save_pretrained(tmp_path / "vae")
    codec = CodecConfig("autoencoder", str(tmp_path / "vae"))
    model = named("a1", **NET, channels=4, labels=6, learn_sigma=True)
    config = ClassesConfig(model, codec, DiffusionConfig(zero_terminal_snr=False, prediction="epsilon"), classes=5)
    dit = pretrain.network(model, config.diffusion)
    checkpoint.write_weights(tmp_path / "imported", dit.state_dict(), "import", {"classes": asdict(config)})
    tuning = chain.tuning(start=str(tmp_path / "imported"), sizes=[[32, 32]])
    finetune.run(build(finetune.Config, tuning), tmp_path / "run")
    servable, facts = open_run(tmp_path / "run")
    assert (servable.planes, servable.latent.channels, servable.latent.stride) == (3, 4, 2)
    assert facts["tasks"]["depth"]["coding"] == {"channels": 3}
    for task in TASKS:
        answer = asyncio.run(ask(TorchBackend.of_run(tmp_path / "run"), task))
        assert np.isfinite(answer.prediction).all()
        assert answer.prediction.shape[:2] == (40, 56)


def test_a_run_is_evaluated_without_exporting_it(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, on torch; members go through together and answer as they do one by one, bf16 nearly so."""
    validation.main([str(tmp_path / "val"), "--scenes", str(chain.shards), "--count", "1"])
    means = []
    for more in ({}, {"batch_size": 3}, {"precision": "bf16"}):
        report = evaluate.main(
            tmp_path / "val", steps=2, ensemble_size=3, torch=evaluate.OnTorch(Path(chain.adapt), **more)
        )
        means.append([mean.value for mean in report.means()])
    assert {mean.task for mean in report.means()} == set(TASKS)
    np.testing.assert_allclose(means[0], means[1], rtol=1e-3)
    np.testing.assert_allclose(means[0], means[2], rtol=0.1)
    assert report.model == "adapt"
    capsys.readouterr()


def test_evaluation_on_torch_wants_a_device_that_is_there(chain: Chain) -> None:
    with pytest.raises(InvalidInput, match="cuda:9"):
        TorchBackend.of_run(Path(chain.adapt), device="cuda:9")


def test_a_stage_is_a_command_whose_errors_are_one_line(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(chain.tuning(model=NET, loop={**LOOP, "steps": 1}, sizes=[[SIZE, SIZE]])))
    main(["finetune", str(file), "-o", str(tmp_path / "run"), "--threads", "1", "--device", "cpu", "model.width=16"])
    assert checkpoint.read(tmp_path / "run")[0]["x_embedder.proj.weight"].shape[0] == 16
    with pytest.raises(SystemExit) as ended:
        main(["finetune", str(file), "-o", str(tmp_path / "run"), "model.wide=16"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.rstrip().splitlines()[-1].startswith("saccade finetune: ")
