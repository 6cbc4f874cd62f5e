"""Noise to train with: plain, or of many resolutions at once.

Torch alone, so that it runs where the model is; what is drawn depends on the generator, whatever the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import SHARE, explained, within


@dataclass(frozen=True)
class NoiseConfig:
    """Multi-resolution noise as the authors' configuration has it (and Marigold's, 2312.02145 section 3.2)."""

    strength: float = explained(
        "how much each coarser octave of noise counts beside the finer, to 1; 0: plain noise", 0.0
    )
    annealed: bool = explained("the strength falls as strength * t / T, to plain noise at t = 0", True)

    def __post_init__(self) -> None:
        within(self, SHARE, "strength")


def draw(shape: tuple[int, ...], t: Tensor, steps: int, config: NoiseConfig, generator: torch.Generator) -> Tensor:
    """Noise [B, C, h, w] float32, each row of mean square 1, for rows with timesteps `t` [B] of `steps`; on the
    generator's device.

    Octave i is white noise of a map 2^i to 4^i times smaller, brought to full size; it counts with strength^i.
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if config.strength == 0:
        return noise
    batch, channels, height, width = shape
    strength = torch.full((batch,), float(config.strength), device=generator.device)
    if config.annealed:
        strength = strength * t.to(generator.device) / steps
    for octave in range(1, 10):
        shrunk = (2 + 2 * float(torch.rand((), generator=generator, device=generator.device))) ** octave
        size = max(1, int(height / shrunk)), max(1, int(width / shrunk))
        coarse = torch.randn((batch, channels, *size), generator=generator, device=generator.device)
        grown = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        noise = noise + strength[:, None, None, None] ** octave * grown
        if 1 in size:
            break
    return noise / noise.square().mean((1, 2, 3), keepdim=True).sqrt()
