"""The default model: a conditioning encoder that runs once per request, a light DiT that runs steps x members times.

    encoder(image, prompt, task)               -> context [B, D, H/16, W/16], detail [B, 32 + C, H/8, W/8]
    denoiser(latent, timestep, task, context, detail) -> v [B, C, H/8, W/8]

The encoder looks at both pictures with one convolutional stem. For flow it matches the two frames' features globally
(a softmax over all places, as in GMFlow, Xu et al. 2111.13680), lets `correspond` track pixels from that guess, and
compares features once more around where that leads (a small cost volume, as in PWC-Net, Sun et al. 1709.02371). For
amodal the mask joins directly. Attention blocks finish the job. The encoder's own estimate of the latent rides in
`detail`: trained directly, it teaches the encoder to see without the noise in between, and the denoiser starts from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.schedule import NoiseSchedule
from saccade.tasks import FlowCoding
from training.models.codec import DCTCodec
from training.models.correspond import Correspondence, correspond, resized, warp
from training.models.dit import Attention, DiTBlock, FinalLayer
from training.models.embed import LabelEmbedder, RoutedPatchEmbed, TimestepEmbedder, sincos_positions, unpatchify
from training.models.mlp import Mlp

TASKS = ("depth", "flow", "amodal")
POSITION_SPAN = 16.0


@dataclass(frozen=True)
class Config:
    """`latent_std`: standard deviation of each latent channel over the training targets (sets the preconditioning).
    For comparison: `track` False leaves out what `correspond` sees; `fuse` False reads the estimate off tokens and
    eighth-cells apart; `centred` False has the denoiser start from nothing instead of the encoder's estimate."""

    latent_channels: int
    width: int = 192
    heads: int = 6
    depth: int = 4
    encoder_depth: int = 5
    detail: int = 32
    stem: tuple[int, int] = (64, 96)
    track: bool = True
    fuse: bool = True
    centred: bool = True
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
        for last in (self.attn.proj, self.mlp.fc2):  # a new block changes nothing yet
            nn.init.zeros_(last.weight)

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
    """Two frames -> motion features [B, eighth, H/8, W/8], the tracker's cues [B, CUES, H/8, W/8] and what training
    asks of it (`Motion`)."""

    STILL, MOVED = 3, 2  # radii of the cost volumes around no motion and around the guess, in quarter-cells
    CUES = 64  # 4 x 4 half-pixels of coded motion, trust and mismatch

    def __init__(self, quarter: int, eighth: int, track: bool, width: int = 64, fine: int = 24) -> None:
        super().__init__()
        self.track = track
        self.key = nn.Conv2d(eighth, width, 1)
        self.key_fine = nn.Conv2d(quarter, fine, 1)
        self.temperature = nn.Parameter(torch.tensor(2.5))
        self.nearness = nn.Parameter(torch.tensor(2.5))
        costs = sum((2 * radius + 1) ** 2 for radius in (self.MOVED, self.STILL))
        self.local = nn.Conv2d(costs + 2 * fine, 64, 3, padding=1)
        self.down = nn.Conv2d(64, eighth, 2, stride=2)
        self.join = nn.Conv2d(eighth + 3, eighth, 1)
        self.tracked = nn.Conv2d(self.CUES, eighth, 1)
        self.read = nn.Conv2d(64, 2, 3, padding=1)
        nn.init.zeros_(self.tracked.weight)
        nn.init.zeros_(self.tracked.bias)

    def forward(
        self, pictures: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Motion]:
        log_match = self.everywhere(first[1], second[1])
        guess, confidence = expected_motion(log_match.exp(), *first[1].shape[-2:])
        found = correspond(*pictures, guess)
        motion = resized(found.motion, 0.5) if self.track else resized(guess, 2)
        near = F.gelu(self.around(self.key_fine(first[0]), self.key_fine(second[0]), motion), approximate="tanh")
        hint = self.join(torch.cat([self.down(near), guess / 4, confidence], 1))
        cues = cues_of(found) * float(self.track)
        return hint + self.tracked(cues), cues, Motion(log_match, self.read(near))

    def everywhere(self, first: Tensor, second: Tensor) -> Tensor:
        """Every cell of the first frame against every cell of the second: log-probabilities [B, N, N]. Near cells are
        likelier before anything is seen, so that what looks the same everywhere stays where it is."""
        one, two = (directions(self.key(x)).flatten(2) for x in (first, second))
        alike = (one.transpose(1, 2) @ two).float() * self.temperature.exp()
        return (alike - self.nearness.exp() * distances(first)).log_softmax(-1)

    def around(self, first: Tensor, second: Tensor, motion: Tensor) -> Tensor:
        """Cost volumes around the motion [B, 2, H/4, W/4] and around none, with the features: [B, 64, H/4, W/4]."""
        one, two = directions(first), directions(second)
        warped = warp(two, motion)
        costs = [*cost_volume(one, warped, self.MOVED), one, warped, *cost_volume(one, two, self.STILL)]
        return self.local(torch.cat(costs, 1))


def cues_of(found: Correspondence) -> Tensor:
    """What the tracker found, motion in the flow's target code, folded to [B, 64, H/8, W/8]."""
    coding = FlowCoding()
    share = found.motion.abs() / longer_edge(found.motion)
    coded = found.motion.sign() * torch.log1p(share / coding.knee) / math.log1p(coding.reach / coding.knee)
    return F.pixel_unshuffle(torch.cat([coded, found.trust, found.mismatch.clamp(max=4) / 4], 1), 4)


def places(cells: Tensor) -> Tensor:
    """Column and row of every cell of [..., h, w], [N, 2] float32."""
    height, width = cells.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=cells.device), torch.arange(width, device=cells.device), indexing="ij"
    )
    return torch.stack([x.flatten(), y.flatten()], -1).float()


def distances(cells: Tensor) -> Tensor:
    """Between all cells of [..., h, w], [N, N], as a share of the longer edge."""
    at = places(cells)
    return (at[:, None] - at[None]).pow(2).sum(-1).sqrt() / longer_edge(cells)


def longer_edge(cells: Tensor) -> Tensor:
    """Of [..., h, w], as a tensor, so that exported graphs keep any size."""
    last = places(cells)[-1]
    return torch.maximum(last[0], last[1]) + 1


def expected_motion(match: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Probabilities [B, N, N] -> expected place minus own place [B, 2, h, w] in cells, and the peak [B, 1, h, w]."""
    at = places(match.new_empty(height, width))
    mean = torch.stack([(match * at[:, axis]).sum(-1) for axis in (0, 1)], -1)  # not a product that bf16 may round
    guess = (mean - at).transpose(1, 2).reshape(-1, 2, height, width)
    return guess, match.amax(-1).reshape(-1, 1, height, width)


def directions(features: Tensor) -> Tensor:
    """[B, C, H, W] in fp32, without each channel's mean (what all places share says nothing about which is which), of
    length 1 at every place."""
    features = features.float()
    return F.normalize(features - features.mean((2, 3), keepdim=True), dim=1)


def cost_volume(first: Tensor, second: Tensor, radius: int) -> list[Tensor]:
    """Products of every place with the places around it in the second frame: (2 radius + 1)^2 of [B, 1, h, w]."""
    height, width = first.shape[-2:]
    padded = F.pad(second, (radius, radius, radius, radius))
    reach = range(2 * radius + 1)
    return [
        (first * padded[..., dy : dy + height, dx : dx + width]).sum(1, keepdim=True) for dy in reach for dx in reach
    ]


class Fusion(nn.Module):
    """What the tokens know, brought to where the edges are: [B, D, H/16, W/16] with eighth- and quarter-cells ->
    eighth-cells [B, E, H/8, W/8] and a part of the estimate [B, C, H/8, W/8] read off quarter-cells."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        quarter, eighth = config.stem
        self.to_eighth = nn.Conv2d(config.width, 4 * eighth, 1)
        self.tracked = nn.Conv2d(Matcher.CUES, eighth, 1, bias=False)
        self.eighth = nn.Sequential(ResBlock(eighth), ResBlock(eighth))
        self.to_quarter = nn.Conv2d(eighth, 4 * quarter, 1)
        self.quarter = ResBlock(quarter)
        self.edges = nn.Conv2d(quarter, config.latent_channels, 2, stride=2)
        for layer in (self.to_eighth, self.tracked, self.edges):  # a new fusion changes nothing yet
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, deep: Tensor, fused: Tensor, quarter: Tensor, cues: Tensor | None) -> tuple[Tensor, Tensor]:
        fused = fused + F.pixel_shuffle(self.to_eighth(deep), 2)
        if cues is not None:
            fused = fused + self.tracked(cues)
        fused = self.eighth(fused)
        return fused, self.edges(self.quarter(quarter + F.pixel_shuffle(self.to_quarter(fused), 2)))


class Encoder(nn.Module):
    """forward: image, prompt [B, 3, H, W], task [B] -> context, detail. H and W are multiples of 16."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        quarter, eighth = config.stem
        self.stem = Stem(quarter, eighth)
        self.matcher = Matcher(quarter, eighth, config.track)
        self.mask = nn.Conv2d(64, eighth, 1)
        self.label = LabelEmbedder(len(TASKS), eighth)
        self.fused = nn.Sequential(ResBlock(eighth), ResBlock(eighth))
        self.detail = nn.Conv2d(eighth, config.detail, 1)
        self.down = nn.Conv2d(eighth, config.width, 2, stride=2)
        self.deep = ResBlock(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.fusion = Fusion(config) if config.fuse else None
        self.first = nn.Linear(config.width, 4 * config.latent_channels)
        self.first_fine = nn.Conv2d(eighth, config.latent_channels, 1)
        self.first_tracked = nn.Conv2d(Matcher.CUES, config.latent_channels, 1, bias=False)
        for head in (self.first, self.first_fine, self.first_tracked):
            nn.init.zeros_(head.weight)

    def forward(self, image: Tensor, prompt: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of mixed tasks: every hint is computed, each sample keeps its own. An exported graph does not compute
        what no sample keeps, where that is much (`training.branches`)."""
        seen = self.stem(image)
        moved, cues, _ = self.matcher((image, prompt), seen, self.stem(prompt))
        flow, amodal = ((task == TASKS.index(name))[:, None, None, None] for name in ("flow", "amodal"))
        nothing = torch.zeros_like(seen[1])
        hint = torch.where(flow, moved, torch.where(amodal, self.shape(prompt), nothing))
        cues = torch.where(flow, cues, nothing[:, :1].expand(-1, Matcher.CUES, -1, -1))
        return self.think(seen, hint, cues, task)

    def of_task(self, image: Tensor, prompt: Tensor, task: str) -> tuple[Tensor, Tensor, Motion | None]:
        """A batch of one task, without the other tasks' work; for flow also what the matcher found. For training."""
        seen = self.stem(image)
        hint, motion, cues = torch.zeros_like(seen[1]), None, None
        if task == "flow":
            hint, cues, motion = self.matcher((image, prompt), seen, self.stem(prompt))
        elif task == "amodal":
            hint = self.shape(prompt)
        labels = torch.full(image.shape[:1], TASKS.index(task), device=image.device)
        return *self.think(seen, hint, cues, labels), motion

    def shape(self, prompt: Tensor) -> Tensor:
        """The mask, lossless, to [B, eighth, H/8, W/8]."""
        return self.mask(F.pixel_unshuffle(prompt[:, :1], 8))

    def think(
        self, seen: tuple[Tensor, Tensor], hint: Tensor, cues: Tensor | None, task: Tensor
    ) -> tuple[Tensor, Tensor]:
        fused = self.fused(seen[1] + hint + self.label(task)[:, :, None, None])
        deep = self.deep(self.down(fused))
        height, width = deep.shape[-2:]
        tokens = deep.flatten(2).transpose(1, 2)
        tokens = tokens + sincos_positions(tokens.shape[-1], height, width, POSITION_SPAN).to(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        context = tokens.transpose(1, 2).reshape(-1, tokens.shape[-1], height, width)
        first = unpatchify(self.first(tokens), height, width, 2)
        if self.fusion is not None:
            fused, edges = self.fusion(context, fused, seen[0], cues)
            first = first + edges
        first = first + self.first_fine(fused)
        if cues is not None:
            first = first + self.first_tracked(cues)
        return context, torch.cat([self.detail(fused), first], 1)


class Denoiser(nn.Module):
    """A DiT on patches of 2 x 2 latent cells. It predicts what the encoder's own estimate m and a linear rule cannot.

    Let the data lie around m with variance s^2 per task and channel, and z = a x + b e. The best linear estimate of
    v = a e - b x is skip (z - a m) - b m with skip = a b (1 - s^2) / (a^2 s^2 + b^2), and what is left has deviation
    gain = s / sqrt(a^2 s^2 + b^2): v = skip (z - a m) - b m + gain F(z, ...). This is the preconditioning of Karras
    et al. (2206.00364), written for v and moved to m. `doubt` holds s^2; training keeps it up to date.
    """

    PATCH = 2

    def __init__(self, config: Config, alphas_cumprod: Tensor) -> None:
        super().__init__()
        width, channels = config.width, config.latent_channels + config.detail_channels
        self.own = config.detail if config.centred else None
        self.x_embedder = RoutedPatchEmbed(channels, width, self.PATCH, len(TASKS))
        self.context = nn.Linear(width, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(len(TASKS), width)
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads) for _ in range(config.depth))
        self.correction = FinalLayer(width, self.PATCH, config.latent_channels)
        self.register_buffer("signal", alphas_cumprod.float())
        self.register_buffer("noise", (1 - alphas_cumprod.double()).float())
        self.register_buffer("doubt", torch.tensor(config.latent_std).float().square().repeat(len(TASKS), 1))

    def forward(self, latent: Tensor, timestep: Tensor, task: Tensor, context: Tensor, detail: Tensor) -> Tensor:
        height, width = context.shape[-2:]
        tokens = self.x_embedder(torch.cat([latent, detail], 1), task)
        tokens = tokens + self.context(context.flatten(2).transpose(1, 2))
        tokens = tokens + sincos_positions(tokens.shape[-1], height, width, POSITION_SPAN).to(tokens)
        c = self.t_embedder(timestep) + self.y_embedder(task)
        for block in self.blocks:
            tokens, _ = block(tokens, c)
        rest = unpatchify(self.correction(tokens, c), height, width, self.PATCH)
        skip, gain = self.linear_part(timestep, task)
        if self.own is None:
            return skip * latent + gain * rest
        a, b = (values[timestep].sqrt()[:, None, None, None] for values in (self.signal, self.noise))
        own = detail[:, self.own :]
        return skip * (latent - a * own) - b * own + gain * rest

    def linear_part(self, timestep: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """skip and gain of rows with timesteps and tasks [B], [B, C, 1, 1] each."""
        a2, b2 = (values[timestep][:, None, None, None] for values in (self.signal, self.noise))
        s2 = self.doubt[task][:, :, None, None]
        total = a2 * s2 + b2
        return (a2 * b2).sqrt() * (1 - s2) / total, (s2 / total).sqrt()

    @torch.no_grad()
    def learn_doubt(self, error: Tensor, weight: Tensor, task: Tensor, rate: float = 0.01) -> None:
        """Take note of how wrong the encoder's estimates are: `error` [B, C, h, w] counts where `weight` [B, h, w] is
        not 0, `task` [B] says whose it is."""
        if self.own is None:
            return
        counted = (weight > 0).float()[:, None]
        for label in task.unique().tolist():
            rows = task == label
            square = (error[rows].square() * counted[rows]).sum((0, 2, 3)) / counted[rows].sum().clamp(min=1)
            self.doubt[label].lerp_(square.clamp(min=1e-6), rate)


class Model(nn.Module):
    """Encoder and denoiser, trained together; the codec is fixed."""

    def __init__(self, config: Config, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.denoiser = Denoiser(config, torch.tensor(schedule.alphas_cumprod))
        self.codec = DCTCodec()
