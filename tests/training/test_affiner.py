"""Adapters: the formula, tasks that do not touch each other, a base that stays as it is, one graph for all tasks."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.parameters import adapters as adapter_millions
from saccade.errors import InvalidInput
from tests.training.test_dit import TOY, shaken
from training.models.affiner import Adapters, Affiner, freeze_base
from training.models.dit import DiT
from training.models.growth import adapt

ADAPTED = replace(TOY, adapters=Adapters(tasks=3, rank=2, scale=0.7), first_label=8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return noise(rows, 4, 8, 12), torch.tensor([999, 3, 400])[:rows], torch.tensor([9, 8, 10])[:rows]


@torch.no_grad()
def test_a_layer_computes_the_papers_formula_row_by_row() -> None:
    layer = shaken(Affiner(5, 7, Adapters(tasks=3, rank=2, scale=0.5)))
    x, task = noise(4, 6, 5), torch.tensor([2, 0, 0, 1])
    values = {name: p.double().numpy() for name, p in layer.named_parameters()}
    for row, k in enumerate(task.tolist()):
        seen = x[row].double().numpy()
        branch = np.maximum(seen @ values["down"][k].T, 0) @ values["up"][k].T
        wanted = (1 + values["scale"][k]) * (seen @ values["weight"].T)
        wanted = wanted + values["bias"] + values["shift"][k] + 0.5 * branch
        np.testing.assert_allclose(layer(x, task)[row].numpy(), wanted, atol=1e-5)
    torch.testing.assert_close(layer(x[:, 0], task), layer(x, task)[:, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("rank", "millions"), [(4, 3.9), (8, 6.9)])
def test_adapters_of_xl_2_have_the_calculated_parameters(rank: int, millions: float) -> None:
    assert round(adapter_millions(rank), 1) == millions


@torch.no_grad()
def test_an_adapted_model_is_at_first_its_base_with_the_unconditional_label() -> None:
    base, adapted = shaken(DiT(TOY)), DiT(ADAPTED)
    adapted.load_state_dict(adapt(base.state_dict(), TOY, ADAPTED))
    x, t, y = batch()
    null = torch.full_like(y, TOY.labels - 1)
    torch.testing.assert_close(adapted(x, t, y), base(x, t, null), atol=1e-6, rtol=1e-6)


def test_training_one_task_changes_neither_the_base_nor_the_others() -> None:
    torch.manual_seed(0)
    model = shaken(DiT(ADAPTED))
    trained = freeze_base(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, t, y = batch()
    others = [model(x, t, torch.full_like(y, label)).detach() for label in (8, 10)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    model(x, t, torch.full_like(y, 9)).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= set(trained)
    assert len(changed) > 0.9 * len(trained)  # a ReLU may be shut for all of a small batch
    for label, wanted in zip((8, 10), others, strict=True):
        assert torch.equal(model(x, t, torch.full_like(y, label)), wanted)


@torch.no_grad()
def test_more_tasks_leave_those_there_are_as_they_were() -> None:
    model = shaken(DiT(ADAPTED))
    wider = replace(ADAPTED, labels=12, adapters=replace(ADAPTED.adapters, tasks=4))
    grown = DiT(wider)
    grown.load_state_dict(adapt(model.state_dict(), ADAPTED, wider))
    torch.testing.assert_close(grown(*batch()), model(*batch()), atol=1e-6, rtol=1e-6)
    with pytest.raises(InvalidInput, match="keep their rank"):
        adapt(model.state_dict(), ADAPTED, replace(ADAPTED, adapters=Adapters(3, rank=4)))


@torch.no_grad()
def test_one_graph_serves_a_batch_of_mixed_tasks() -> None:
    model = shaken(DiT(replace(ADAPTED, adapters=Adapters(3, 2, layers=("qkv", "fc1", "adaLN", "final"))))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(model, batch(2), check_trace=False)
        x, t, y = batch(3)
        together = graph(x, t, y)
        for row in range(3):
            one = slice(row, row + 1)
            torch.testing.assert_close(graph(x[one], t[one], y[one]), together[one], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, model(x, t, y), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_small_scales_survive_bf16() -> None:
    """Scales far below the step of bf16 at 1: the exact sum, rounded once."""
    layer = Affiner(64, 64, Adapters(tasks=1, rank=2))
    layer.weight.copy_(torch.eye(64))
    layer.bias.copy_(noise(64, seed=1))
    layer.scale.copy_(torch.linspace(-0.0035, 0.0035, 64)[None])
    layer.shift.copy_(0.003 * noise(1, 64, seed=2))
    x = noise(20, 16, 64).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, torch.zeros(20, dtype=torch.int64))
    wanted = x * (1 + layer.scale) + (layer.bias + layer.shift)
    assert torch.equal(out, wanted.bfloat16())


@pytest.mark.parametrize("inputs", [3, 5])
def test_input_convolutions_are_a_tasks_own_where_there_are_several(inputs: int) -> None:
    own = replace(ADAPTED, inputs=inputs, condition=8, labels=20)
    assert {"x_embedder.weight", "x_embedder.bias"} <= set(freeze_base(DiT(own)))
    assert not [name for name in freeze_base(DiT(ADAPTED)) if name.startswith("x_embedder")]
    with pytest.raises(InvalidInput, match="task's own"):
        freeze_base(DiT(TOY))


@pytest.mark.parametrize("wrong", [{"tasks": 0}, {"tasks": 1, "rank": -1}, {"tasks": 1, "layers": ("qvk",)}])
def test_adapters_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Adapters(**wrong)
