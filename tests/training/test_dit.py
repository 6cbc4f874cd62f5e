"""The papers' family: sizes, positions, options, precision, and surgery that changes nothing it should not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.parameters import PUBLISHED, counted, options_table, sizes_table
from saccade.errors import InvalidInput, ModelError
from training.models.dit import NAMES, Adapters, DiT, DiTConfig, Experts, Routing, named, parameters_of
from training.models.embed import sincos_positions
from training.models.growth import upcycle, widen_input

TOY = DiTConfig(width=32, heads=2, depth=2, labels=11, grid=4)
GATED = Experts(4, 2)
OPTIONS = {
    "dense": TOY,
    "experts": replace(TOY, experts=GATED),
    "plain experts": replace(TOY, experts=Experts(4, 2, gated=False, renormalise=True)),
    "routing": replace(TOY, routing=Routing()),
    "adapters": replace(TOY, adapters=Adapters(tasks=3, rank=2), first_label=5),
    "inputs": replace(TOY, condition=8, inputs=3, first_label=5, learn_sigma=True),
    "all": replace(
        TOY, condition=8, inputs=3, first_label=5, experts=GATED, routing=Routing(), adapters=Adapters(3, 2)
    ),
}


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights everywhere, also where training starts from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(config: DiTConfig, rows: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(rows, config.condition + config.channels, height, width, generator=draw)
    return x, torch.tensor([999, 3, 400])[:rows], config.first_label + torch.arange(rows)


@pytest.fixture(params=OPTIONS)
def model(request: pytest.FixtureRequest) -> DiT:
    torch.manual_seed(0)
    return shaken(DiT(OPTIONS[request.param]))


@pytest.mark.parametrize("name", NAMES)
def test_named_sizes_have_the_papers_parameters(name: str) -> None:
    for ours, theirs in zip(counted(name), PUBLISHED[name], strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


def test_mixtures_have_exactly_the_calculated_parameters() -> None:
    totals = {name: parameters_of(named(name, learn_sigma=True)).total / 1e6 for name in NAMES if "E2A" in name}
    assert {name: round(total, 1) for name, total in totals.items()} == {
        "S/2-8E2A": 199.2, "S/2-16E2A": 369.1, "L/2-8E2A": 2823.5,
    }  # fmt: skip


def test_the_document_shows_these_tables() -> None:
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert sizes_table() in document
    assert options_table() in document


@pytest.mark.parametrize("name", ["", "a7", "S", "S/3", "a1/", "XL/2-8E", "S/2-8E9A", "s/2", "a1\n"])
def test_other_names_are_refused_by_naming_those_there_are(name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        named(name)
    assert "XL/8" in str(error.value) or "9 of 8" in str(error.value)


def test_a_field_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidInput, match="no field widht"):
        named("a1", widht=3)


@pytest.mark.parametrize(
    "wrong",
    [{"width": 30}, {"depth": 0}, {"condition": -1}, {"first_label": 11}, {"inputs": 12}, {"adapters": Adapters(12)}],
)
def test_configurations_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        replace(TOY, **wrong)


def test_a_fresh_model_says_nothing() -> None:
    assert not DiT(TOY)(*inputs(TOY)).any()


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 8), (6, 20), (24, 4)])
def test_any_size_and_shape_goes_through(model: DiT, height: int, width: int) -> None:
    config = model.config
    x, t, y = inputs(config, height=height, width=width)
    out = model(x, t, y)
    assert out.shape == (3, config.channels * (2 if config.learn_sigma else 1), height, width)
    assert out.isfinite().all()
    assert torch.equal(model.predict(x, t, y), out[:, : config.channels])


@torch.no_grad()
def test_a_sample_does_not_know_its_neighbours(model: DiT) -> None:
    x, t, y = inputs(model.config)
    together = model(x, t, y)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], model(x[one], t[one], y[one]), atol=1e-5, rtol=1e-5)


def test_positions_are_meta_s_at_the_trained_size_and_lie_between_them_at_others() -> None:
    """Against the published formula in float64; the longer edge of a larger picture spans the same range."""
    width, grid = 32, 4

    def waves(place: np.ndarray) -> np.ndarray:
        angles = place[:, None] / 10000 ** (np.arange(width // 4) / (width // 4))
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    def table(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        y, x = np.meshgrid(rows, columns, indexing="ij")
        return np.concatenate([waves(x.ravel()), waves(y.ravel())], 1)

    trained, larger = sincos_positions(width, 4, 4, grid), sincos_positions(width, 6, 8, grid)
    np.testing.assert_allclose(trained.numpy(), table(np.arange(4.0), np.arange(4.0)), atol=1e-6)
    np.testing.assert_allclose(larger.numpy(), table(np.arange(6) / 2, np.arange(8) / 2), atol=1e-6)


def gradients(model: DiT) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(*inputs(model.config)).square().mean()
    balance = model.balance()
    (loss if balance is None else loss + balance).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_learns_and_recomputing_activations_changes_no_gradient(model: DiT) -> None:
    kept = gradients(model)
    assert set(kept) == {name for name, _ in model.named_parameters()}
    assert all(gradient.any() for gradient in kept.values())
    model.checkpointing = True
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, kept[name], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at every input's
def test_a_block_compiles_whole(model: DiT) -> None:
    """Into one graph, without breaks, forward and backward; `bench.step` has the compiler that makes it fast."""
    wanted = gradients(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_autocast_rounds_the_branches_and_neither_conditions_nor_routers(model: DiT) -> None:
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if name.endswith(("adaLN_modulation.1", "t_embedder", "attn")):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    x, t, y = inputs(model.config)
    wanted = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert seen.pop("t_embedder") is torch.float32
    for name, dtype in seen.items():
        assert dtype is (torch.bfloat16 if name.endswith("attn") else torch.float32), name
    assert (out.float() - wanted).std() < 0.03 * wanted.std()
    out.float().square().mean().backward()


def test_states_have_metas_names_and_nothing_that_can_be_computed() -> None:
    keys = {re.sub(r"blocks\.\d+\.", "blocks.", key) for key in DiT(OPTIONS["routing"]).state_dict()}
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1", "blocks.adaLN_modulation.1", "blocks.attn.qkv", "blocks.attn.proj"]
    layers += ["blocks.mlp.fc1", "blocks.mlp.fc2"]
    assert keys == {f"{a}.{b}" for a in layers for b in ("weight", "bias")} | {"y_embedder.embedding_table.weight"}


# Surgery


@torch.no_grad()
def test_a_widened_input_sees_a_third_of_each_copy() -> None:
    """Where condition and latent are one picture thrice, the answer is the narrow model's; labels are unconditional."""
    old = replace(TOY, learn_sigma=True)
    new = replace(TOY, condition=8, inputs=2, labels=13, first_label=10)
    narrow, wide = shaken(DiT(old)), DiT(new)
    wide.load_state_dict(widen_input(narrow.state_dict(), old, new))
    x, t, _ = inputs(old)
    for label in (10, 11, 12):
        if label < 12:
            out = wide(x.repeat(1, 3, 1, 1), t, torch.full((3,), label))
            torch.testing.assert_close(out, narrow.predict(x, t, torch.full((3,), 10)), atol=1e-5, rtol=1e-5)
        assert torch.equal(wide.y_embedder.embedding_table.weight[label], narrow.y_embedder.embedding_table.weight[10])
    assert torch.equal(wide.y_embedder.embedding_table.weight[:10], narrow.y_embedder.embedding_table.weight[:10])


@torch.no_grad()
def test_channels_may_be_picked_one_by_one() -> None:
    """From 4 channels to a condition of 2 and a latent of 3: each new channel says which old one it repeats."""
    new = replace(TOY, condition=2, channels=3)
    sources, outputs = (0, 1, 1, 3, 2), (1, 3, 2)
    narrow, wide = shaken(DiT(TOY)), DiT(new)
    wide.load_state_dict(widen_input(narrow.state_dict(), TOY, new, sources, outputs))
    x, t, y = inputs(TOY)
    out, wanted = wide(x[:, sources], t, y), narrow(x, t, y)
    torch.testing.assert_close(out, wanted[:, outputs], atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidInput, match="5 numbers from 0 to 3"):
        widen_input(narrow.state_dict(), TOY, new, (0, 1, 2, 3, 4), outputs)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_an_upcycled_model_is_at_first_the_dense_one(shared: bool) -> None:
    new = replace(TOY, experts=Experts(8, 2, shared=shared, gated=False, renormalise=True))
    dense, mixture = shaken(DiT(TOY)), DiT(new)
    mixture.load_state_dict(upcycle(dense.state_dict(), TOY, new))
    batch = inputs(TOY)
    assert (mixture(*batch) - dense(*batch)).abs().max() < 1e-5
    assert mixture.balance_value < 3, "an upcycled router sends nearly all tokens to the same experts"


@pytest.mark.parametrize(
    "experts", [None, Experts(4, 2, gated=False, renormalise=False), Experts(4, 2, gated=True, renormalise=True)]
)
def test_upcycling_that_would_change_the_function_is_refused(experts: Experts | None) -> None:
    with pytest.raises(InvalidInput):
        upcycle(DiT(TOY).state_dict(), TOY, replace(TOY, experts=experts))


@pytest.mark.parametrize(
    "change", [{"width": 64}, {"patch": 1}, {"condition": 3}, {"channels": 8}, {"learn_sigma": True}]
)
def test_surgery_that_cannot_be_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as error:
        widen_input(DiT(TOY).state_dict(), TOY, replace(TOY, **change))
    assert error.value.param in change


def test_a_state_of_another_model_is_refused() -> None:
    other = DiT(replace(TOY, depth=1)).state_dict()
    with pytest.raises(ModelError, match=r"blocks\.1\."):
        widen_input(other, TOY, replace(TOY, condition=4))
