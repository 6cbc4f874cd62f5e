"""What tokens and conditions are made of: patches, positions, timesteps, labels.

Parameter names are Meta's (Peebles & Xie 2212.09748).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off: for the parts whose rounding would be heard everywhere (conditions, routers)."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class TimestepEmbedder(nn.Module):
    """Timesteps [B] -> [B, width]: sinusoids of 256 frequencies' halves, then an MLP.

    Frequencies fall from 1 by 10000^(-i / (half - shift)); `shift` is 0 in Meta's code and 1 in diffusers'.
    """

    def __init__(self, width: int, frequencies: int = 256, shift: int = 0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        bands = torch.exp(-math.log(10000) * torch.arange(half) / (half - shift))
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.bands[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, width]. With adapters, every one of `tasks` adds an offset of its own, at first nothing."""

    def __init__(self, labels: int, width: int, tasks: int = 0) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, width)
        self.task_offset = nn.Parameter(torch.zeros(tasks, width)) if tasks else None

    def forward(self, y: Tensor, task: Tensor | None = None) -> Tensor:
        found = self.embedding_table(y)
        return found if self.task_offset is None else found + self.task_offset[task]


class PatchEmbed(nn.Module):
    """[B, C, h, w] -> [B, N, D]."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class RoutedPatchEmbed(nn.Module):
    """Each sample through its own task's input convolution (the paper's PatchEmbedRouter), as one batched product.

    `weight[k]` [C * patch^2, D] is the transpose of convolution k's weight [D, C, patch, patch], flattened.
    """

    def __init__(self, channels: int, width: int, patch: int, tasks: int) -> None:
        super().__init__()
        self.patch = patch
        fan_in = channels * patch * patch
        self.weight = nn.Parameter(torch.empty(tasks, fan_in, width).uniform_(-(fan_in**-0.5), fan_in**-0.5))
        self.bias = nn.Parameter(torch.zeros(tasks, width))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        return patches @ self.weight[task] + self.bias[task][:, None]


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """[B, height * width, patch^2 * C] -> [B, C, height * patch, width * patch]."""
    channels = tokens.shape[-1] // patch**2
    grid = tokens.reshape(-1, height, width, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height * patch, width * patch)


def sincos_positions(width: int, height: int, across: int, span: float) -> Tensor:
    """Fixed 2-D sinusoids [height * across, width]; the longer edge runs over [0, span), so that any size is an
    interpolation of the one trained on. Columns first, as in MAE's and DiT's code."""
    rows, columns = torch.arange(height).float(), torch.arange(across).float()
    step = span / (torch.maximum(rows[-1], columns[-1]) + 1)  # of tensors, so that exported graphs keep any size
    bands = (1 / 10000 ** (torch.arange(width // 4).double() / (width // 4))).float()

    def waves(positions: Tensor) -> Tensor:
        angles = (positions * step)[:, None] * bands
        return torch.cat([angles.sin(), angles.cos()], -1)

    x = waves(columns)[None].expand(height, across, -1)
    y = waves(rows)[:, None].expand(height, across, -1)
    return torch.cat([x, y], -1).reshape(height * across, width)
