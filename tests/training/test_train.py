"""The default model's recipe on a network of a few ten thousand weights: runs, what stops them, losses, schedules."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saccade.errors import InvalidInput
from saccade.tasks import FlowCoding
from tests.training.conftest import TINY
from training import losses, train
from training.data import Batch
from training.loop import Diverged, checkpoint
from training.losses import timesteps
from training.models.perceiver import Motion
from training.train import Recipe, Run, Stage


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def ended(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, averages, and what the checkpoint says of the run."""
    return checkpoint.read(out, "model")[0], *checkpoint.read(out)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    Run(recipe, out).train()
    return out


def test_a_run_resumed_from_its_checkpoint_ends_where_a_whole_one_does(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    Run(recipe, tmp_path).loop.run(until=1)
    Run(recipe, tmp_path).loop.run(until=3)
    again = Run(recipe, tmp_path)
    assert again.loop.step == 3
    progress = again.train()
    weights, averages, facts = ended(tmp_path)
    assert same(weights, ended(whole)[0])
    assert same(averages, ended(whole)[1])
    assert (progress.step, progress.samples) == (facts["step"], facts["samples"]) == (4, 3 * (2 + 2 + 1 + 1))
    assert facts["about"]["recipe"]["model"]["width"] == TINY["width"]


def test_the_command_leaves_the_same_run(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "run.toml", tmp_path / "out"
    config.write_text(toml(recipe))
    train.main([str(config), "--out", str(out), "--threads", "1"])
    assert same(ended(out)[1], ended(whole)[1])
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4
    assert {"depth", "flow", "amodal", "own", "matching", "loss"} <= rows[-1].keys()


def test_a_finished_run_started_again_stays_as_it_is(recipe: Recipe, whole: Path) -> None:
    before = ended(whole)
    Run(recipe, whole).train()
    after = ended(whole)
    assert same(after[0], before[0])
    assert same(after[1], before[1])


def test_a_run_does_not_go_on_as_another_model(recipe: Recipe, whole: Path) -> None:
    for other in (replace(recipe, depth_knee=0.5), replace(recipe, model={**recipe.model, "heads": 4})):
        with pytest.raises(InvalidInput, match="was begun with"):
            Run(other, whole)


def test_parts_of_a_batch_add_up_to_it(recipe: Recipe, tmp_path: Path) -> None:
    """Stages of two samples a task, in two parts: every part has one; three parts are refused."""
    halves = replace(recipe, accumulate=2, stages=recipe.stages[:1])
    run = Run(halves, tmp_path)
    parts = [run.objective.batch(0, part, 2) for part in range(2)]
    assert [len(part["flow"].image) for part in parts] == [1, 1]
    assert not np.array_equal(parts[0]["flow"].image, parts[1]["flow"].image)
    assert run.train().samples == 2 * 6
    with pytest.raises(InvalidInput, match="3 equal parts"):
        run.objective.batch(0, 0, 3)


def toml(recipe: Recipe) -> str:
    """The recipe as people write it."""
    facts = asdict(recipe) | {"checkpoint_s": 0}
    stages, tables = facts.pop("stages"), {key: facts.pop(key) for key in ("model", "task_weights")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in facts.items()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    for stage in stages:
        lines += ["[[stages]]", *(f"{key} = {json.dumps(value)}" for key, value in stage.items())]
    return "\n".join(lines)


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """At its first step, without the time it takes to measure latents."""
    monkeypatch.setattr(train, "measure_latent_std", lambda scenes, codec: (0.3,) * 26)
    return Run(recipe, tmp_path)


def first_step(run: Run) -> tuple[Stage, dict[str, Batch]]:
    return run.recipe.stages[0], run.objective.batch(0, 0, 1)


def loss_of(run: Run, batches: dict[str, Batch]) -> torch.Tensor:
    """Of the first step, the same every time."""
    return run.objective.loss(run.model, batches, torch.Generator().manual_seed(0), 0)[0]


def test_it_learns(run: Run) -> None:
    """The loss of one batch, at the same noise, before and after a few steps on it."""
    _, batches = first_step(run)
    losses = []
    for _ in range(12):
        run.loop.step = 0
        run.loop.advance([(0, batches)])
        losses.append(run.loop.loss)
    assert losses[-1] < 0.9 * losses[0]


def test_a_bad_picture_stops_the_run_before_the_weights(run: Run) -> None:
    _, batches = first_step(run)
    batches["depth"].image[0, 0, 0, 0] = np.nan
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(Diverged, match=r"the loss is nan at step 0; its batch is in .*-part-0\.safetensors"):
        run.loop.advance([(0, batches)])
    assert same(run.model.state_dict(), before)


def test_a_bad_gradient_stops_the_run_before_the_weights(run: Run) -> None:
    run.model.denoiser.context.weight.register_hook(lambda gradient: gradient * np.inf)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(Diverged, match="gradient"):
        run.train()
    assert same(run.model.state_dict(), before)


def test_what_weighs_nothing_does_not_matter(run: Run) -> None:
    """At the start, where the denoiser answers cell by cell."""
    _, batches = first_step(run)
    depth = batches["depth"]
    depth.weight[:, :2] = 0
    target = depth.target.copy()
    target[:, :, :16] += 0.5
    other = batches | {"depth": Batch(depth.image, depth.prompt, target, depth.weight)}
    with torch.no_grad():
        one, two = (loss_of(run, b) for b in (batches, other))
        depth.weight[:] = 1
        three = loss_of(run, other)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
    assert abs(three - two) > 0.01


def test_unrolled_rows_are_asked_for_the_truth_whatever_their_latent_says(run: Run) -> None:
    """A model that knows the truth has no error on either kind of row; one that answers it to v's question has."""
    stage, batches = first_step(run)
    seen = losses.see(run.model, batches, run.recipe.task_weights, own_l1=True)
    schedule, truth = run.recipe.noise, seen.latent.repeat_interleave(stage.draws, 0)
    signal = torch.tensor(schedule.alphas_cumprod).float()

    def knowing(latent: torch.Tensor, t: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        a2 = signal[t][:, None, None, None]
        rows = truth if len(latent) == len(truth) else torch.zeros_like(latent)  # from noise it believes in nothing
        return (a2.sqrt() * latent - rows) / (1 - a2).sqrt()

    class Oracle(torch.nn.Module):
        codec = run.model.codec
        denoiser = staticmethod(knowing)

    for unroll in (0.0, 1.0):
        draw = torch.Generator().manual_seed(0)
        error, _ = losses.denoising_error(Oracle(), schedule, seen, stage.draws, 2.5, unroll, draw)  # type: ignore[arg-type]
        assert error.mean() < 1e-3 * (truth.square().sum(1) * seen.weight.repeat_interleave(stage.draws, 0)).mean()


def test_a_matcher_that_is_right_costs_nothing() -> None:
    """On 4 x 4 cells everything goes one cell right and one up; what leaves the picture does not count."""
    flow = np.stack([np.full((32, 32), 8.0), np.full((32, 32), -8.0)])
    coded = torch.from_numpy(FlowCoding().encode(flow, 32))[None]
    went = np.arange(16) - 4 + 1
    certain = torch.full((1, 16, 16), -50.0)
    certain[0, np.arange(16), np.clip(went, 0, 15)] = 0
    right = Motion(certain, coded[..., ::4, ::4])
    assert losses.matching_loss(right, coded, 32) < 1e-4
    assert losses.matching_loss(Motion(certain.roll(1, 2), right.coded), coded, 32) > 5
    assert losses.matching_loss(Motion(certain, -right.coded), coded, 32) > 0.5


def test_the_learning_rate_warms_up_and_falls_in_every_stage() -> None:
    stages = (Stage(100, ((32, 32),), 1, 1e-3, 2e-4), Stage(50, ((64, 64),), 1, 3e-4, 1e-5))
    recipe = Recipe(scenes="", stages=stages, warmup=10)
    at = [recipe.at(step) for step in range(recipe.steps)]
    rates = np.array([rate for _, rate in at])
    assert recipe.steps == 150
    assert [stage for stage, _ in at] == [stages[0]] * 100 + [stages[1]] * 50
    assert rates[0] == pytest.approx(1e-4)
    assert (np.diff(rates[:10]) > 0).all()
    assert (np.diff(rates[10:100]) < 0).all()
    assert (np.diff(rates[100:]) < 0).all()
    assert rates[50] == pytest.approx((1e-3 + 2e-4) / 2)
    assert rates[99] == pytest.approx(2e-4, rel=0.01)
    assert rates[100] == pytest.approx(3e-4)
    assert recipe.at(150) == recipe.at(1000) == (stages[1], pytest.approx(1e-5))


def test_a_recipe_without_warmup_starts_at_its_rate() -> None:
    recipe = Recipe(scenes="", stages=(Stage(4, ((32, 32),), 1, 1e-3, 1e-4),), warmup=0)
    assert recipe.at(0)[1] == pytest.approx(1e-3)


def test_a_recipe_reads_back_as_it_was_written(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml(recipe))
    read = Recipe.read(file)
    assert read.stages == recipe.stages
    assert replace(read, model={}) == replace(recipe, model={}, checkpoint_s=0)
    assert json.dumps(read.model) == json.dumps(recipe.model)


def test_an_unknown_setting_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("warm_up = 3\n" + toml(recipe))
    with pytest.raises(InvalidInput, match="warm_up"):
        Recipe.read(file)


@pytest.mark.parametrize("text", ["", "stages = 3", "stages = [", 'scenes = "x"\n[[stages]]\nsteps = 3'])
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        Recipe.read(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("count", "shift"), [(1, 2.5), (7, 1.0), (64, 2.5), (250, 4.0)])
def test_timesteps_are_stratified_and_shifted_to_noise(count: int, shift: float) -> None:
    """One draw in every count-th part of the unshifted range: u = t / (shift - (shift - 1) t)."""
    for seed in range(5):
        t = timesteps(count, shift, torch.Generator().manual_seed(seed)).double()
        assert (t >= 0).all()
        assert (t <= 999).all()
        middle = (t + 0.5) / 1000  # of what was rounded down
        u = (middle / (shift - (shift - 1) * middle)).sort().values
        slack = 0.5 * shift / 1000
        strata = torch.arange(count) / count
        assert (u >= strata - slack).all()
        assert (u <= strata + 1 / count + slack).all()


def test_timesteps_come_in_random_order_from_their_generator() -> None:
    one, same_seed, other = (timesteps(64, 2.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same_seed)
    assert not torch.equal(one, other)
    assert abs(np.corrcoef(np.arange(64), one.numpy())[0, 1]) < 0.4
