"""The diffusion transformer (Peebles & Xie 2212.09748): adaLN-Zero blocks on patches of a latent.

Parameter names are Meta's, so their checkpoints load as they are. Sizes are those of the two papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Width, heads and depth of a transformer."""

    width: int
    heads: int
    depth: int


# "Scaling Properties of Diffusion Models for Perceptual Tasks", dense models; then DiT's own names.
SIZES: dict[str, Size] = {
    "a1": Size(256, 16, 12),
    "a2": Size(512, 16, 16),
    "a3": Size(768, 16, 20),
    "a4": Size(1024, 16, 24),
    "a5": Size(1536, 16, 28),
    "a6": Size(1792, 16, 32),
    "S": Size(384, 6, 12),
    "B": Size(768, 12, 12),
    "L": Size(1024, 16, 24),
    "XL": Size(1152, 16, 28),
}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[B, N, D] by [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """Timesteps [B] -> [B, width]: sinusoids of 256 frequencies' halves, then an MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        self.register_buffer("bands", torch.exp(-math.log(10000) * torch.arange(half) / half), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.bands[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, width]."""

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """adaLN-Zero: shift, scale and gate of both branches come from the condition; the gates start at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """[B, N, D] -> [B, N, patch^2 * channels]; starts at zero."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        for layer in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    """[B, C, h, w] -> [B, N, D]."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """Class-conditional DiT, as published. forward: x [B, C, h, w], t [B], y [B] -> [B, C or 2C, h, w].

    `grid`: tokens per edge (h = w = grid * patch). `labels` counts the null label too.
    """

    def __init__(
        self,
        size: Size,
        channels: int = 4,
        patch: int = 2,
        labels: int = 1001,
        grid: int = 16,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.patch, self.out_channels = patch, channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(channels, size.width, patch)
        self.t_embedder = TimestepEmbedder(size.width)
        self.y_embedder = LabelEmbedder(labels, size.width)
        self.pos_embed = nn.Parameter(sincos_positions(size.width, grid, grid, grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(size.width, size.heads) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, patch, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return unpatchify(self.final_layer(tokens, c), height, width, self.patch)


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
