"""The trainer on a network of a few ten thousand weights: resumed runs, what stops it, its schedules."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saccade.tasks import FlowCoding
from tests.training.conftest import TINY
from training import losses, train
from training.data import Batch
from training.losses import timesteps
from training.models.perceiver import Motion
from training.train import Recipe, Run, Stage

ROOT = Path(__file__).parents[2]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    Run(recipe, out).train()
    return out


def steps_of(run: Run, count: int) -> list[dict[str, float]]:
    return [run.update(*run.draw(run.step)) for _ in range(count)]


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_resumed_from_its_checkpoint_ends_where_a_whole_one_does(
    recipe: Recipe, whole: Path, tmp_path: Path, after: int
) -> None:
    first = Run(recipe, tmp_path)
    losses = steps_of(first, after)
    first.save()
    second = Run(recipe, tmp_path)
    assert second.step == after
    second.train()
    ended, expected = checkpoint(tmp_path), checkpoint(whole)
    assert same(ended["model"], expected["model"])
    assert same(ended["average"], expected["average"])
    assert (ended["step"], ended["samples"]) == (expected["step"], expected["samples"]) == (4, 3 * (2 + 2 + 1 + 1))
    assert all(np.isfinite(list(parts.values())).all() for parts in losses)


TORN = """
import os, signal, sys, torch
from training import train

save, saves = torch.save, []

def torn(state, path):
    saves.append(path)
    if len(saves) < 3:
        return save(state, path)
    path.write_bytes(b"half a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = torn
train.main(sys.argv[1:])
"""


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


def test_a_run_killed_while_it_wrote_its_checkpoint_goes_on_from_the_one_before(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    config, out = tmp_path / "run.toml", tmp_path / "out"
    config.write_text(toml(recipe))
    command = [str(config), "--out", str(out), "--threads", "1"]
    killed = subprocess.run([sys.executable, "-c", TORN, *command], cwd=ROOT, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (out / "checkpoint.part").read_bytes() == b"half a checkpoint"
    assert checkpoint(out)["step"] == 2
    train.main(command)
    assert same(checkpoint(out)["model"], checkpoint(whole)["model"])
    assert same(checkpoint(out)["average"], checkpoint(whole)["average"])
    assert json.loads((out / "recipe.json").read_text())["model"]["width"] == TINY["width"]


def test_a_finished_run_started_again_stays_as_it_is(recipe: Recipe, whole: Path) -> None:
    before = checkpoint(whole)
    Run(recipe, whole).train()
    assert same(checkpoint(whole)["model"], before["model"])


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """At its first step, without the time it takes to measure latents."""
    monkeypatch.setattr(train, "measure_latent_std", lambda scenes, codec: (0.3,) * 26)
    return Run(recipe, tmp_path)


def test_it_learns(run: Run) -> None:
    """The loss of one batch, at the same noise, before and after a few steps on it."""
    stage, batches = run.draw(0)
    losses = []
    for _ in range(12):
        run.step = 0
        losses.append(sum(run.update(stage, batches).values()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_bad_picture_stops_the_run_before_the_weights(run: Run) -> None:
    stage, batches = run.draw(0)
    batches["depth"].image[0, 0, 0, 0] = np.nan
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        run.update(stage, batches)
    assert same(run.model.state_dict(), before)


def test_a_bad_gradient_stops_the_run_before_the_weights(run: Run) -> None:
    run.model.denoiser.context.weight.register_hook(lambda gradient: gradient * np.inf)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="gradient"):
        steps_of(run, 1)
    assert same(run.model.state_dict(), before)


def test_what_weighs_nothing_does_not_matter(run: Run) -> None:
    """At the start, where the denoiser answers cell by cell."""
    stage, batches = run.draw(0)
    depth = batches["depth"]
    depth.weight[:, :2] = 0
    target = depth.target.copy()
    target[:, :, :16] += 0.5
    other = batches | {"depth": Batch(depth.image, depth.prompt, target, depth.weight)}
    with torch.no_grad():
        one, two = (run.loss(stage, b)[0] for b in (batches, other))
        depth.weight[:] = 1
        three = run.loss(stage, other)[0]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
    assert abs(three - two) > 0.01


def test_unrolled_rows_are_asked_for_the_truth_whatever_their_latent_says(run: Run) -> None:
    """A model that knows the truth has no error on either kind of row; one that answers it to v's question has."""
    stage, batches = run.draw(0)
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


def test_the_average_follows_the_weights(run: Run) -> None:
    """Early on the decay is (1 + step) / (10 + step)."""
    start = {key: value.clone() for key, value in run.average.named_parameters()}
    steps_of(run, 1)
    now = dict(run.model.named_parameters())
    for key, value in run.average.named_parameters():
        torch.testing.assert_close(value, 0.1 * start[key] + 0.9 * now[key], atol=1e-6, rtol=1e-5)


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


def test_a_report_is_a_row_of_the_log(run: Run) -> None:
    run.step, run.seconds, run.samples = 20, 2.0, 90
    run.report({"depth": 0.5})
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": 20, "samples": 90, "seconds": 2.0, "depth": 0.5}]


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
    with pytest.raises(TypeError, match="warm_up"):
        Recipe.read(file)


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
