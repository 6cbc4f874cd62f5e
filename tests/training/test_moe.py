"""Experts: every way to run them gives one result, that of a plain loop; what the router says, and its balance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.plain import MoE as PlainMoE
from bench.plain import PlainDiT, plain_state
from saccade.errors import InvalidInput
from training.models import moe
from training.models.dit import DiT, DiTConfig
from training.models.moe import Experts, GatedExperts, MoE, PlainExperts, Stack, grouped_product

WIDTH = 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixture(**fields: object) -> MoE:
    torch.manual_seed(0)
    return MoE(WIDTH, Experts(**{"count": 4, "active": 2} | fields))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("active", [1, 2, 4])
def test_exported_and_grouped_forms_agree_with_their_gradients(
    gated: bool, active: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = mixture(gated=gated, active=active)
    found = []
    for exporting in (False, True):
        monkeypatch.setattr(moe, "exporting", lambda said=exporting: said)
        x = noise(2, 5, WIDTH).requires_grad_()
        layer.zero_grad()
        out, uneven = layer(x)
        (out.square().sum() + uneven).backward()
        found.append([out, uneven, x.grad, *(p.grad.clone() for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_mixture_is_the_plain_restatement() -> None:
    ours, plain = mixture(), PlainMoE(WIDTH, 4, 2)
    plain.load_state_dict({k.removeprefix("x."): v for k, v in renamed(ours).items()})
    x = noise(2, 9, WIDTH)
    out, uneven = ours(x)
    torch.testing.assert_close(out, plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(uneven, plain.uneven)


def renamed(layer: MoE) -> dict[str, Tensor]:
    state = plain_state({f"x.moe.{key}": value for key, value in layer.state_dict().items()})
    return {key.removeprefix("x.moe."): value for key, value in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("experts", [None, Experts(4, 2)])
def test_what_bench_step_compares_computes_the_same(experts: Experts | None) -> None:
    config = DiTConfig(width=32, heads=2, depth=2, labels=5, grid=3, experts=experts)
    ours, plain = DiT(config), PlainDiT(config)
    for parameter in ours.parameters():
        parameter.add_(0.1 * noise(*parameter.shape))
    plain.load_state_dict(plain_state(ours.state_dict()))
    batch = noise(2, 4, 6, 6), torch.tensor([3, 800]), torch.tensor([4, 0])
    torch.testing.assert_close(ours(*batch), plain(*batch), atol=1e-5, rtol=1e-5)
    if experts:
        torch.testing.assert_close(ours.balance(), plain.balance())


def test_experts_that_no_token_chose_are_left_alone() -> None:
    """All tokens to experts 1 and 2: groups may be empty at the start, in between and at the end."""
    layer = mixture(shared=False)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[1:3] = 1
    out, _ = layer(noise(1, 6, WIDTH).abs())
    out.sum().backward()
    touched = layer.experts.up_proj.weight.grad.abs().amax((1, 2)) > 0
    assert touched.tolist() == [False, True, True, False]


def test_grouped_products_pass_torchs_gradient_check() -> None:
    x, weight = noise(7, 3).double().requires_grad_(), noise(4, 5, 3, seed=1).double().requires_grad_()
    ends = torch.tensor([2, 2, 7, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(grouped_product, (x, weight, ends))
    torch.library.opcheck(grouped_product, (x, weight, ends))


@pytest.mark.parametrize(("widths", "whole"), [((16, 64), True), ((12, 48), False), ((64, 20), False)])
def test_torchs_grouped_product_gets_only_rows_that_it_bears(widths: tuple[int, int], whole: bool) -> None:
    """It demands whole pieces of 16 bytes, 8 values of bf16, of both matrices and of both their gradients."""
    assert moe.whole_rows(*widths) is whole


@torch.no_grad()
def test_weights_are_scores_over_all_experts_unless_renormalised() -> None:
    rows = noise(6, WIDTH)
    for renormalise in (False, True):
        layer = mixture(renormalise=renormalise)
        scores, weight, chosen = layer.route(rows)
        torch.testing.assert_close(scores.sum(-1), torch.ones(6))
        assert torch.equal(chosen.sort().values, scores.argsort(descending=True)[:, :2].sort().values)
        torch.testing.assert_close(weight.sum(-1).allclose(torch.ones(6)), renormalise)


@torch.no_grad()
def test_the_router_chooses_in_single_precision_under_autocast() -> None:
    layer, rows = mixture(count=16), noise(200, WIDTH)
    plain = layer.route(rows)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer.route(rows)
    assert all(torch.equal(a, b) for a, b in zip(plain, rounded, strict=True))


def test_balance_is_one_where_experts_share_evenly_and_grows_to_their_number() -> None:
    layer = mixture(active=1)
    even = torch.full((8, 4), 0.25)
    assert layer.unevenness(even, torch.arange(8)[:, None] % 4).item() == pytest.approx(1)
    one = torch.eye(4)[torch.zeros(8, dtype=torch.int64)]
    assert layer.unevenness(one, torch.zeros(8, 1, dtype=torch.int64)).item() == pytest.approx(4)


def test_the_balance_loss_evens_out_a_lopsided_router() -> None:
    config = DiTConfig(width=16, heads=2, depth=2, labels=5, grid=2, experts=Experts(4, 2, balance=0.5))
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.gate.weight[0] *= 8
    batch = noise(16, 4, 4, 4), torch.randint(1000, (16,)), torch.randint(5, (16,))
    gates = [block.moe.gate.weight for block in model.blocks]
    optimizer = torch.optim.Adam(gates, lr=0.02)
    values = []
    for _ in range(40):
        model(*batch)
        values.append(model.balance_value.item())
        assert model.balance().item() == pytest.approx(0.5 * 2 * values[-1], rel=1e-4)
        optimizer.zero_grad()
        model.balance().backward()
        optimizer.step()
    assert values[-1] < 1.05 < 1.2 < values[0]


@pytest.mark.parametrize(("count", "active"), [(4, 5), (4, 0), (0, 0)])
def test_more_active_experts_than_there_are_is_refused(count: int, active: int) -> None:
    with pytest.raises(InvalidInput, match="cannot be active"):
        Experts(count, active)


def test_experts_are_of_the_papers_shapes() -> None:
    gated, plain = GatedExperts(3, WIDTH), PlainExperts(3, WIDTH)
    shapes = {name: tuple(p.shape) for name, p in [*gated.named_parameters(), *plain.named_parameters()]}
    assert shapes["down_proj.weight"] == (3, WIDTH, 4 * WIDTH)
    assert shapes["fc1.bias"] == (3, 4 * WIDTH)
    assert isinstance(gated.up_proj, Stack)
    assert gated.up_proj.bias is None
