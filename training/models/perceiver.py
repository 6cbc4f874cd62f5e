"""The default model: a conditioning encoder that runs once per request, a light DiT that runs steps x members times.

    encoder(image, prompt, task)               -> context [B, D, H/16, W/16], detail [B, 32 + C, H/8, W/8]
    denoiser(latent, timestep, task, context, detail) -> v [B, C, H/8, W/8]

The encoder looks at both pictures with one convolutional stem. For flow it matches the two frames' features, first
globally (a softmax over all places, as in GMFlow, Xu et al. 2111.13680), then locally around that guess (a small cost
volume, as in PWC-Net, Sun et al. 1709.02371). For amodal the mask joins directly. Attention blocks finish the job.
The encoder's own estimate of the latent rides in `detail`: trained directly, it teaches the encoder to see without the
noise in between, and the denoiser starts from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.models.dit import (
    Attention,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    Size,
    TimestepEmbedder,
    sincos_positions,
    unpatchify,
)

TASKS = ("depth", "flow", "amodal")
POSITION_SPAN = 16.0


@dataclass(frozen=True)
class Config:
    """`latent_std`: standard deviation of each latent channel over the training targets (sets the preconditioning)."""

    latent_channels: int
    width: int = 192
    heads: int = 6
    depth: int = 6
    encoder_depth: int = 4
    detail: int = 32
    stem: tuple[int, int] = (64, 96)
    latent_std: tuple[float, ...] = ()

    @property
    def detail_channels(self) -> int:
        """Of the encoder's second output: features, then its own estimate of the latent."""
        return self.detail + self.latent_channels


class ResBlock(nn.Module):
    """x + conv(gelu(conv(norm(x)))), 3 x 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(self.norm(x)), approximate="tanh"))


class Block(nn.Module):
    """A pre-norm transformer block on [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stem(nn.Module):
    """Picture [B, 3, H, W] -> quarter [B, c4, H/4, W/4] and eighth [B, c8, H/8, W/8]; nothing is lost on the way in."""

    def __init__(self, quarter: int, eighth: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(48, quarter, 3, padding=1)
        self.fine = ResBlock(quarter)
        self.down = nn.Conv2d(quarter, eighth, 2, stride=2)
        self.coarse = nn.Sequential(ResBlock(eighth), ResBlock(eighth))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        quarter = self.fine(self.into(F.pixel_unshuffle(picture, 4)))
        return quarter, self.coarse(self.down(quarter))


class Motion(NamedTuple):
    """`log_match` [B, N, N]: how likely each of the N eighth-cells went to each. `coded` [B, 2, H/4, W/4]: read off the
    local cost volumes, in the flow's target code. Only training looks at them."""

    log_match: Tensor
    coded: Tensor


class Matcher(nn.Module):
    """Two frames' features -> motion features [B, eighth, H/8, W/8], and what training asks of it (`Motion`)."""

    STILL, MOVED = 3, 2  # radii of the cost volumes around no motion and around the guess, in quarter-cells

    def __init__(self, quarter: int, eighth: int, width: int = 64, fine: int = 24) -> None:
        super().__init__()
        self.key = nn.Conv2d(eighth, width, 1)
        self.key_fine = nn.Conv2d(quarter, fine, 1)
        self.temperature = nn.Parameter(torch.tensor(2.5))
        self.nearness = nn.Parameter(torch.tensor(2.5))
        costs = sum((2 * radius + 1) ** 2 for radius in (self.MOVED, self.STILL))
        self.local = nn.Conv2d(costs + 2 * fine, 64, 3, padding=1)
        self.down = nn.Conv2d(64, eighth, 2, stride=2)
        self.join = nn.Conv2d(eighth + 3, eighth, 1)
        self.read = nn.Conv2d(64, 2, 3, padding=1)

    def forward(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Motion]:
        log_match = self.everywhere(first[1], second[1])
        guess, confidence = expected_motion(log_match.exp(), *first[1].shape[-2:])
        near = F.gelu(self.around(self.key_fine(first[0]), self.key_fine(second[0]), guess))
        hint = torch.cat([self.down(near), guess / 4, confidence], 1)
        return self.join(hint), Motion(log_match, self.read(near))

    def everywhere(self, first: Tensor, second: Tensor) -> Tensor:
        """Every cell of the first frame against every cell of the second: log-probabilities [B, N, N]. Near cells are
        likelier before anything is seen, so that what looks the same everywhere stays where it is."""
        one, two = (directions(self.key(x)).flatten(2) for x in (first, second))
        alike = (one.transpose(1, 2) @ two).float() * self.temperature.exp()
        return (alike - self.nearness.exp() * distances(*first.shape[-2:])).log_softmax(-1)

    def around(self, first: Tensor, second: Tensor, guess: Tensor) -> Tensor:
        """Cost volumes around the guess and around no motion, with the features themselves, [B, 64, H/4, W/4]."""
        one, two = directions(first), directions(second)
        warped = warp(two, guess)
        costs = [*cost_volume(one, warped, self.MOVED), one, warped, *cost_volume(one, two, self.STILL)]
        return self.local(torch.cat(costs, 1))


def places(height: int, width: int) -> Tensor:
    """Column and row of every cell, [N, 2] float32."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1).float()


def distances(height: int, width: int) -> Tensor:
    """Between all cells, [N, N], as a share of the longer edge."""
    at = places(height, width)
    apart = (at[:, None] - at[None]).pow(2).sum(-1).sqrt()
    return apart / (torch.maximum(at[-1, 0], at[-1, 1]) + 1)


def expected_motion(match: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Probabilities [B, N, N] -> expected place minus own place [B, 2, h, w] in cells, and the peak [B, 1, h, w]."""
    at = places(height, width)
    guess = (match @ at - at).transpose(1, 2).reshape(-1, 2, height, width)
    return guess, match.amax(-1).reshape(-1, 1, height, width)


def directions(features: Tensor) -> Tensor:
    """[B, C, H, W] in fp32, without each channel's mean (what all places share says nothing about which is which), of
    length 1 at every place."""
    features = features.float()
    return F.normalize(features - features.mean((2, 3), keepdim=True), dim=1)


def warp(features: Tensor, cells: Tensor) -> Tensor:
    """[B, C, h, w] looked up where motions [B, 2, h/2, w/2], in cells of twice the size, lead."""
    height, width = features.shape[-2:]
    motion = F.interpolate(cells, size=(height, width), mode="bilinear", align_corners=False) * 2
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at_x = (x + motion[:, 0] + 0.5) / width * 2 - 1
    at_y = (y + motion[:, 1] + 0.5) / height * 2 - 1
    grid = torch.stack([at_x, at_y], -1)
    return F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=False)


def cost_volume(first: Tensor, second: Tensor, radius: int) -> list[Tensor]:
    """Products of every place with the places around it in the second frame: (2 radius + 1)^2 of [B, 1, h, w]."""
    height, width = first.shape[-2:]
    padded = F.pad(second, (radius, radius, radius, radius))
    reach = range(2 * radius + 1)
    return [
        (first * padded[..., dy : dy + height, dx : dx + width]).sum(1, keepdim=True) for dy in reach for dx in reach
    ]


class Encoder(nn.Module):
    """forward: image, prompt [B, 3, H, W], task [B] -> context, detail. H and W are multiples of 16."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        quarter, eighth = config.stem
        self.stem = Stem(quarter, eighth)
        self.matcher = Matcher(quarter, eighth)
        self.mask = nn.Conv2d(64, eighth, 1)
        self.label = LabelEmbedder(len(TASKS), eighth)
        self.fused = nn.Sequential(ResBlock(eighth), ResBlock(eighth))
        self.detail = nn.Conv2d(eighth, config.detail, 1)
        self.down = nn.Conv2d(eighth, config.width, 2, stride=2)
        self.deep = ResBlock(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.first = nn.Linear(config.width, 4 * config.latent_channels)
        self.first_fine = nn.Conv2d(eighth, config.latent_channels, 1)
        for head in (self.first, self.first_fine):
            nn.init.zeros_(head.weight)

    def forward(self, image: Tensor, prompt: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of mixed tasks: every hint is computed, each sample keeps its own."""
        seen = self.stem(image)
        moved, _ = self.matcher(seen, self.stem(prompt))
        hint = moved * (task == 1)[:, None, None, None] + self.shape(prompt) * (task == 2)[:, None, None, None]
        return self.think(seen[1], hint, task)

    def of_task(self, image: Tensor, prompt: Tensor, task: str) -> tuple[Tensor, Tensor, Motion | None]:
        """A batch of one task, without the other tasks' work; for flow also what the matcher found. For training."""
        seen = self.stem(image)
        hint, motion = torch.zeros_like(seen[1]), None
        if task == "flow":
            hint, motion = self.matcher(seen, self.stem(prompt))
        elif task == "amodal":
            hint = self.shape(prompt)
        labels = torch.full(image.shape[:1], TASKS.index(task), device=image.device)
        return *self.think(seen[1], hint, labels), motion

    def shape(self, prompt: Tensor) -> Tensor:
        """The mask, lossless, to [B, eighth, H/8, W/8]."""
        return self.mask(F.pixel_unshuffle(prompt[:, :1], 8))

    def think(self, seen: Tensor, hint: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.fused(seen + hint + self.label(task)[:, :, None, None])
        deep = self.deep(self.down(fused))
        height, width = deep.shape[-2:]
        tokens = deep.flatten(2).transpose(1, 2)
        tokens = tokens + sincos_positions(tokens.shape[-1], height, width, POSITION_SPAN).to(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        first = unpatchify(self.first(tokens), height, width, 2) + self.first_fine(fused)
        context = tokens.transpose(1, 2).reshape(-1, tokens.shape[-1], height, width)
        return context, torch.cat([self.detail(fused), first], 1)


class RoutedPatchEmbed(nn.Module):
    """Each sample through its own task's input convolution (the paper's PatchEmbedRouter), as one batched product."""

    def __init__(self, channels: int, width: int, patch: int, tasks: int) -> None:
        super().__init__()
        self.patch = patch
        fan_in = channels * patch * patch
        self.weight = nn.Parameter(torch.empty(tasks, fan_in, width).uniform_(-(fan_in**-0.5), fan_in**-0.5))
        self.bias = nn.Parameter(torch.zeros(tasks, width))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        return patches @ self.weight[task] + self.bias[task][:, None]


class Denoiser(nn.Module):
    """A DiT on patches of 2 x 2 latent cells. It predicts what a linear one cannot: v = skip * z + gain * F(z, ...).

    With data of variance s^2 per channel and z = a x + b e, the best linear estimate of v = a e - b x is
    skip = a b (1 - s^2) / (a^2 s^2 + b^2), and the rest has deviation gain = s / sqrt(a^2 s^2 + b^2)
    (the preconditioning of Karras et al. 2206.00364, written for v).
    """

    PATCH = 2

    def __init__(self, config: Config, alphas_cumprod: Tensor) -> None:
        super().__init__()
        size = Size(config.width, config.heads, config.depth)
        channels = config.latent_channels + config.detail_channels
        self.x_embedder = RoutedPatchEmbed(channels, size.width, self.PATCH, len(TASKS))
        self.context = nn.Linear(size.width, size.width)
        self.t_embedder = TimestepEmbedder(size.width)
        self.y_embedder = LabelEmbedder(len(TASKS), size.width)
        self.blocks = nn.ModuleList(DiTBlock(size.width, size.heads) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, self.PATCH, config.latent_channels)
        a2 = alphas_cumprod.double()[:, None]
        s2 = torch.tensor(config.latent_std).double()[None] ** 2
        spread = a2 * s2 + 1 - a2
        skip, gain = (a2 * (1 - a2)).sqrt() * (1 - s2) / spread, (s2 / spread).sqrt()
        self.register_buffer("skip", skip.float())
        self.register_buffer("gain", gain.float())

    def forward(self, latent: Tensor, timestep: Tensor, task: Tensor, context: Tensor, detail: Tensor) -> Tensor:
        height, width = context.shape[-2:]
        tokens = self.x_embedder(torch.cat([latent, detail], 1), task)
        tokens = tokens + self.context(context.flatten(2).transpose(1, 2))
        tokens = tokens + sincos_positions(tokens.shape[-1], height, width, POSITION_SPAN).to(tokens)
        c = self.t_embedder(timestep) + self.y_embedder(task)
        for block in self.blocks:
            tokens = block(tokens, c)
        rest = unpatchify(self.final_layer(tokens, c), height, width, self.PATCH)
        return self.skip[timestep][..., None, None] * latent + self.gain[timestep][..., None, None] * rest
