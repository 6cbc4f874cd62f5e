"""The loop in one process: against a plain one, resumed, stopped, and what it says of itself."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.errors import InvalidInput, ModelError
from tests.training.tiny import CONFIG, STEPS, Net, Tiny
from training.loop import Diverged, Loop, LoopConfig, checkpoint, log, speed, tree
from training.loop.loop import seed_of
from training.models.moe import grouped_product

RARELY = replace(CONFIG, checkpoint_s=1e9)
SHORT = replace(RARELY, steps=9)


def begin(out: Path, config: LoopConfig = SHORT, objective: Tiny | None = None) -> Loop:
    return Loop(objective or Tiny(), config, out, "tiny", {"width": 16})


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Still(Tiny):
    """Nothing random in a step, so that a plain loop can follow it."""

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator, step: int) -> Any:
        model.eval()
        picture = batch["picture"]
        return (picture.mean((1, 2, 3)) - F.silu(model.out(model.into(picture).mean((2, 3))))[:, 0]).square().mean(), {}


def test_it_does_what_a_plain_loop_does(tmp_path: Path) -> None:
    """Warm-up, cosine, decay of matrices alone, clipping, AdamW and the average, each written out."""
    config = replace(SHORT, clip=0.05)
    begin(tmp_path, config, Still()).run()
    objective = Still()
    model, average = objective.model, {k: v.detach().clone() for k, v in objective.model.named_parameters()}
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad and k.split(".")[0] in ("into", "out")}
    first, second = ({k: torch.zeros_like(p) for k, p in trained.items()} for _ in range(2))
    for step in range(config.steps):
        rate = (1e-3 + 9e-3 * (1 + math.cos(math.pi * step / config.steps)) / 2) * min(1, (step + 1) / 3)
        model.zero_grad()
        objective.loss(model, objective.batch(step, 0, 1), torch.Generator(), step)[0].backward()
        length = math.sqrt(sum(float(p.grad.square().sum()) for p in trained.values()))
        decay = min(0.9, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in trained.items():
                gradient = p.grad * min(1.0, 0.05 / length)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                p *= 1 - rate * 0.1 * (p.ndim > 1)
                one, two = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p -= rate * one / (two.sqrt() + 1e-8)
                average[name] = decay * average[name] + (1 - decay) * p
    weights, averages = (checkpoint.read(tmp_path, which)[0] for which in ("model", "average"))
    for name, p in trained.items():
        torch.testing.assert_close(weights[name], p.detach(), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(averages[name], average[name], atol=2e-6, rtol=1e-5)


def test_two_do_not_train_in_one_folder(tmp_path: Path) -> None:
    loop = begin(tmp_path)
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match="another process trains in"):
            loop.run()
    assert loop.run().step == SHORT.steps


def test_parts_one_after_another_are_the_whole_batch(tmp_path: Path) -> None:
    class Whole(Still):
        def batch(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
            rows = super().batch(step, 0, 1)["picture"]
            return {"picture": rows.chunk(parts)[part]}

    begin(tmp_path / "1", SHORT, Whole()).run()
    begin(tmp_path / "4", replace(SHORT, accumulate=4), Whole()).run()
    one, four = (checkpoint.read(tmp_path / n)[0] for n in ("1", "4"))
    for name, value in one.items():
        torch.testing.assert_close(value, four[name], atol=1e-5, rtol=1e-4)


def test_a_run_in_pieces_has_the_bits_and_the_log_of_a_whole_one(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    ended = begin(whole, RARELY).run()
    for until in (1, 17, 18, None):
        progress = begin(pieces, RARELY).run(until)
    assert (progress.step, progress.samples, progress.loss) == (STEPS, 8 * STEPS, ended.loss)
    for which in ("model", "average"):
        assert same(checkpoint.read(whole, which)[0], checkpoint.read(pieces, which)[0])
    figures = ("step", "samples", "loss", "gradient", "lr", "size")
    one, other = ([[row[name] for name in figures] for row in rows(out)] for out in (whole, pieces))
    assert [step for step, *_ in one] == [*range(3, STEPS, 3), STEPS]
    assert other == one


def test_rows_beyond_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    """As a kill leaves them: rows of steps that are done again, and half a row."""
    begin(tmp_path).run(until=3)
    file = tmp_path / "log.jsonl"
    kept = file.read_text()
    file.write_text(kept + '{"step": 6, "loss": 1}\n{"step": 9, "lo')
    begin(tmp_path).run()
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 9]
    assert file.read_text().startswith(kept)


def test_the_log_has_means_since_the_row_before(tmp_path: Path) -> None:
    begin(tmp_path / "often", replace(SHORT, log_every=1)).run()
    begin(tmp_path / "rarely").run()
    often, rarely = rows(tmp_path / "often"), rows(tmp_path / "rarely")
    for place, row in enumerate(rarely):
        for name in ("loss", "gradient", "size"):
            assert row[name] == pytest.approx(np.mean([o[name] for o in often[3 * place : 3 * place + 3]]))
        assert row["samples_per_s"] > 0
        assert 0 < row["mfu"] < 1


def test_tensorboard_shows_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_file_loader as loader

    begin(tmp_path).run()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = list(loader.LegacyEventFileLoader(str(file)).Load())
    shown = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    for row in rows(tmp_path):
        assert shown[row["step"], "loss"] == pytest.approx(row["loss"])


def test_a_full_disk_keeps_rows_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = log.Rows(tmp_path / "log.jsonl", 0)
    file.add({"step": 1})
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        file.add({"step": 2})
    assert rows(tmp_path) == [{"step": 1}]
    file.add({"step": 3})
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@dataclass(frozen=True)
class Pictures:
    picture: Any
    labels: Any


class Rotten(Tiny):
    """The batch of step 5 has a value that is none."""

    def batch(self, step: int, part: int, parts: int) -> Any:
        picture = super().batch(step, part, parts)["picture"]
        if (step, part) == (5, 1):
            picture[0, 0, 0, 0] = torch.inf
        return {"of": [Pictures(picture, np.arange(3))]}

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator, step: int) -> Any:
        return super().loss(model, {"picture": batch["of"][0].picture}, generator, step)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_batch(tmp_path: Path) -> None:
    loop = begin(tmp_path, replace(SHORT, accumulate=2), Rotten())
    loop.run(until=5)
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    with pytest.raises(Diverged, match=r"the loss is nan at step 5; its batch is in .*-part-1\.safetensors"):
        loop.run()
    assert same(dict(loop.model.state_dict()), before)
    (file,) = (tmp_path / "diverged").iterdir()
    kept = load_file(file)
    assert torch.equal(kept["batch.of.0.picture"], Rotten().batch(5, 1, 2)["of"][0].picture)
    assert kept["batch.of.0.labels"].tolist() == [0, 1, 2]
    assert checkpoint.find(tmp_path).name == "step-00000005"


def test_a_gradient_that_is_none_stops_the_run_too(tmp_path: Path) -> None:
    loop = begin(tmp_path)
    loop.run(until=2)
    loop.model.out.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(Diverged, match="gradient's length is nan at step 2"):
        loop.run()


def test_sigterm_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    class Ended(Tiny):
        def after(self, model: nn.Module, step: int) -> None:
            super().after(model, step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        begin(tmp_path / "ended", SHORT, Ended()).run()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert checkpoint.find(tmp_path / "ended").name == "step-00000004"
    begin(tmp_path / "ended").run()
    begin(tmp_path / "whole").run()
    assert same(checkpoint.read(tmp_path / "ended")[0], checkpoint.read(tmp_path / "whole")[0])


def test_a_last_checkpoint_that_finds_no_room_is_an_error_that_names_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path).run(until=2)
    loop = begin(tmp_path)
    monkeypatch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(checkpoint.NotSaved, match=r"came to step 9, .*No space left.*; the last one is of step 2"):
        loop.run()
    monkeypatch.undo()
    assert begin(tmp_path).run().step == 9


def test_what_is_frozen_stays_and_is_in_both_sets_of_weights(tmp_path: Path) -> None:
    objective = Tiny()
    objective.model.blocks.requires_grad_(False)
    start = {name: value.clone() for name, value in objective.model.state_dict().items()}
    begin(tmp_path, SHORT, objective).run()
    for which in ("model", "average"):
        weights, _ = checkpoint.read(tmp_path, which)
        assert weights.keys() == start.keys()
        frozen = [name for name in start if name.startswith("blocks") or name == "base"]
        assert all(torch.equal(weights[name], start[name]) for name in frozen)
        assert not torch.equal(weights["out.weight"], start["out.weight"])
        assert weights["met"] == 9
    stored = load_file(next((checkpoint.find(tmp_path) / "average").iterdir()))
    assert not any(name.startswith("blocks") for name in stored)


def test_bfloat16_leaves_weights_in_float32(tmp_path: Path) -> None:
    begin(tmp_path / "half", replace(SHORT, bf16=True)).run()
    begin(tmp_path / "full").run()
    half, full = (checkpoint.read(tmp_path / name)[0] for name in ("half", "full"))
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert not same(half, full)
    torch.testing.assert_close(half["out.weight"], full["out.weight"], atol=0.02, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"steps": 0}, "steps"),
        ({"ema": 1.0}, "ema"),
        ({"betas": (2.0, 2.0)}, "betas"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"decay": "linear"}, "decay"),
        ({"decay": "exponential", "lr_end": 0.0}, "lr_end"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        replace(CONFIG, **changes)
    assert refused.value.param == param


def test_a_run_is_refused_what_does_not_fit_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="3 equal parts"):
        begin(tmp_path, replace(SHORT, accumulate=3))
    with pytest.raises(InvalidInput, match="recompute"):
        begin(tmp_path, replace(SHORT, checkpoint_activations=True))
    begin(tmp_path).run(until=1)
    with pytest.raises(InvalidInput, match="holds a run of the stage tiny, not other"):
        Loop(Tiny(), SHORT, tmp_path, "other", {})
    objective = Tiny()
    objective.model.requires_grad_(False)
    with pytest.raises(InvalidInput, match="no parameter to train"):
        begin(tmp_path / "2", SHORT, objective)


def test_learning_rates_fall_as_they_are_told_to() -> None:
    base = LoopConfig(steps=100, lr=1e-3, lr_end=1e-5, warmup=10)
    cosine, exponential = (replace(base, decay=decay) for decay in ("cosine", "exponential"))
    assert [base.rate(step) for step in (0, 4, 9, 50, 99)] == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    assert cosine.rate(50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert exponential.rate(50) == pytest.approx(1e-4)
    assert exponential.rate(100) == cosine.rate(100) == cosine.rate(1000) == pytest.approx(1e-5)


def test_seeds_are_all_different() -> None:
    seeds = {seed_of(seed, step, part) for seed in range(5) for step in range(20) for part in range(8)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_operations_are_those_of_the_products(tmp_path: Path) -> None:
    """6 a weight and row forward and back; none for the gradient of the input."""
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(5, 8)
    assert speed.operations(lambda: net(x)) == 2 * 5 * (8 * 16 + 16 * 4)
    assert speed.operations(lambda: net(x).sum().backward()) == 5 * (4 * 8 * 16 + 6 * 16 * 4)


def test_fused_attention_counts_its_products() -> None:
    """Two forward; back four for the gradients and one again."""
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 20 * 20 * 8
    assert speed.operations(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert speed.operations(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * product


def test_grouped_products_count_as_their_parts() -> None:
    a, b = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(3, 16, 32, dtype=torch.bfloat16)
    ends = torch.tensor([8, 16, 24], dtype=torch.int32)
    assert speed.operations(lambda: torch._grouped_mm(a, b, ends)) == 2 * 24 * 16 * 32


def test_grouped_products_of_ours_count_as_their_parts_back_too() -> None:
    a, b = torch.randn(24, 16, requires_grad=True), torch.randn(3, 32, 16, requires_grad=True)
    ends = torch.tensor([8, 8, 24], dtype=torch.int32)
    assert speed.operations(lambda: grouped_product(a, b, ends)) == 2 * 24 * 16 * 32
    assert speed.operations(lambda: grouped_product(a, b, ends).sum().backward()) == 3 * 2 * 24 * 16 * 32


def test_trees_keep_their_shape() -> None:
    batch = {"a": [torch.ones(2), (np.ones(3), "word")], "b": Pictures(torch.zeros(1), None)}
    doubled = tree.mapped(batch, lambda tensor: 2 * tensor)
    assert doubled["a"][0].tolist() == [2, 2]
    assert doubled["a"][1] == batch["a"][1]
    assert isinstance(doubled["b"], Pictures)
    assert tree.shapes(batch) == (("batch.a.0", (2,)), ("batch.a.1.0", (3,)), ("batch.b.picture", (1,)))


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (200, "3 min"), (7500, "2 h 05 min"), (3.17 * 86400, "3 d 4 h")]
)
def test_time_left_is_told_in_words(seconds: float, words: str) -> None:
    assert log.duration(seconds) == words


def test_a_terminal_gets_a_line_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    begin(tmp_path).run()
    told = capsys.readouterr().err
    assert "9/9" in told
    assert "samples/s" in told


def test_the_tiny_net_has_what_shards_badly() -> None:
    assert sorted(p.ndim for p in Net().parameters())[:2] == [0, 1]
