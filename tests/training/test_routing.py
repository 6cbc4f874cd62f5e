"""Denoising task routing: the window of channels, and that a block leaves the others as they are."""

from __future__ import annotations

import pytest
import torch

from saccade.errors import InvalidInput
from training.models.dit import DiTBlock, DiTConfig
from training.models.routing import Routing, channel_masks


def test_windows_start_where_the_paper_says() -> None:
    masks = channel_masks(Routing(), 1024, 1000)
    assert masks.sum(1).unique().tolist() == [819]
    assert [masks[t].argmax().item() for t in (0, 250, 500, 750, 999)] == [0, 1, 13, 65, 205]
    assert masks[999, -1] == 1


def test_without_routing_every_channel_is_active() -> None:
    assert channel_masks(Routing(beta=1.0), 64, 1000).all()


@torch.no_grad()
def test_a_block_sees_its_channels_alone_and_its_branches_write_all() -> None:
    torch.manual_seed(0)
    block = DiTBlock(16, 2)
    for parameter in block.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    mask = channel_masks(Routing(beta=0.5), 16, 2)
    out, _ = block(x, c, mask)
    other = x + 10 * (1 - mask[:, None])  # what is hidden changes
    moved, _ = block(other, c, mask)
    torch.testing.assert_close(moved - other, out - x, atol=1e-5, rtol=1e-5)
    alone, _ = block(x * mask[:, None], c)
    torch.testing.assert_close(out, alone + x * (1 - mask[:, None]), atol=1e-6, rtol=1e-6)
    assert ((out - x).abs() > 1e-4).float().mean() > 0.9


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.8), (4.0, 0.0), (4.0, 1.1), (float("nan"), 0.8)])
def test_windows_that_cannot_be_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(InvalidInput, match="alpha > 0"):
        DiTConfig(16, 2, 1, routing=Routing(alpha, beta))
