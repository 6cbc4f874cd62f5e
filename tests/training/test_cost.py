"""The formula's MACs are those that torch itself counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training import cost
from training.models import moe
from training.models.affiner import Adapters
from training.models.dit import DiT, DiTConfig, named
from training.models.moe import Experts
from training.models.routing import Routing

SMALL = DiTConfig(width=32, heads=2, depth=2, channels=5, condition=3, patch=2, labels=5, grid=4)
VARIANTS = {
    "dense": SMALL,
    "patch 1": replace(SMALL, patch=1),
    "variances": replace(SMALL, learn_sigma=True),
    "gated experts": replace(SMALL, experts=Experts(4, 2)),
    "plain experts": replace(SMALL, experts=Experts(4, 1, shared=False, gated=False)),
    "routed inputs": replace(SMALL, inputs=3),
    "masks": replace(SMALL, routing=Routing()),
    "adapters": replace(SMALL, adapters=Adapters(tasks=3, rank=4)),
}


def counted(config: DiTConfig, height: int, width: int, batch: int, backward: bool = False) -> float:
    """MACs a sample, by torch."""
    model = DiT(config)
    x = torch.randn(batch, config.condition + config.channels, height, width)
    inputs = x, torch.arange(batch) * 100, torch.arange(batch) % 3
    # the counter knows nothing of the CPU's fused attention, and counts its products where they are written out
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(*inputs)
        if backward:
            out.square().sum().backward()
    return counter.get_total_flops() / 2 / batch


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_as_torch_counts(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "exporting", lambda: True)  # experts one by one: grouped products are not counted
    assert cost.forward_macs(VARIANTS[name], *size) == pytest.approx(counted(VARIANTS[name], *size, 3), rel=1e-6)


def test_a_training_step_is_nearly_three_forwards() -> None:
    """Nearly: nothing is asked of the pictures' gradient, and the adaLN's condition is one row a sample."""
    config = replace(SMALL, width=64, depth=4)
    assert cost.training_macs(config, 8, 8, 10) == 30 * cost.forward_macs(config, 8, 8)
    assert counted(config, 8, 8, 2, backward=True) == pytest.approx(3 * cost.forward_macs(config, 8, 8), rel=0.05)


def test_the_papers_sizes() -> None:
    """DiT-S/2 and XL/2 at 256 px: 6.06 and 118.64 GFLOPs in the DiT paper's table 4, which counts MACs."""
    assert cost.forward_macs(named("S/2", learn_sigma=True), 32, 32) / 1e9 == pytest.approx(6.06, rel=0.01)
    assert cost.forward_macs(named("XL/2", learn_sigma=True), 32, 32) / 1e9 == pytest.approx(118.64, rel=0.01)
    assert cost.forward_macs(named("XL/2", learn_sigma=True), 64, 64) / 1e9 == pytest.approx(524.6, rel=0.01)
