"""Denoising Task Routing (DTR, Park et al. 2310.07138): each timestep uses its own window of channels. No parameters.

Of C channels k = int(beta C) are active, and the window starts at
round((t / (T - 1))^alpha (C - k)), t being the original timestep, not the respaced index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import InvalidInput
from training.config import explained


@dataclass(frozen=True)
class Routing:
    """Raises InvalidInput for alpha <= 0 and for beta outside (0, 1]."""

    alpha: float = explained("how late in t the window of channels moves", 4.0)
    beta: float = explained("share of the channels that a block works on", 0.8)

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and 0 < self.beta <= 1):
            raise InvalidInput(f"routing needs alpha > 0 and 0 < beta <= 1, not {self.alpha} and {self.beta}")


def channel_masks(routing: Routing, width: int, timesteps: int) -> Tensor:
    """[timesteps, width] float32 of ones (active) and zeros."""
    active = int(routing.beta * width)
    share = torch.arange(timesteps).double() / max(timesteps - 1, 1)
    start = (share**routing.alpha * (width - active)).round()[:, None]
    channel = torch.arange(width)[None]
    return ((channel >= start) & (channel < start + active)).float()
