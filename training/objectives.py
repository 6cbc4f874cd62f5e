"""What a diffusion transformer is asked for in training: to find the noise in a noisy latent, whichever way it is put.

Every stage on a DiT shares this: the prediction (noise, velocity or sample), how much a timestep counts (all alike,
Min-SNR, or learned uncertainty), and the noise that is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saccade import ddim
from saccade.schedule import Kind, NoiseSchedule
from training import noise
from training.config import POSITIVE, Range, explained, within
from training.noise import NoiseConfig

Prediction = Literal["epsilon", "v_prediction", "sample"]
Weighting = Literal["none", "min_snr", "uncertainty"]
TIMESTEPS, SHIFT = Range(2, 1_000_000), Range(1e-6, 1e6)


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and the loss."""

    schedule: Kind = explained("noise schedule: linear, scaled_linear or cosine", "cosine")
    timesteps: int = explained("T, steps of the forward process", 1000)
    zero_terminal_snr: bool = explained(
        "the last timestep is pure noise (2305.08891); not with prediction = epsilon", True
    )
    beta_start: float | None = explained("first beta (not for cosine); none: the kind's", None)
    beta_end: float | None = explained("last beta (not for cosine); none: the kind's", None)
    prediction: Prediction = explained("what the model predicts: epsilon, v_prediction or sample", "v_prediction")
    weighting: Weighting = explained(
        "of timesteps: none, min_snr (2303.09556; with zero_terminal_snr the last timestep, where sampling begins, "
        "then counts nothing), or uncertainty (a learned log-variance over t)",
        "none",
    )
    gamma: float = explained("of Min-SNR: signal-to-noise ratios above it count as it", 5.0)
    shift: float = explained("above 1, noisy timesteps are drawn more often (2403.03206 eq. 23); 1: evenly", 1.0)
    noise: NoiseConfig = explained("", factory=NoiseConfig)

    def __post_init__(self) -> None:
        within(self, TIMESTEPS, "timesteps")
        ddim.check(self.process, self.prediction)
        within(self, POSITIVE, "gamma")
        within(self, SHIFT, "shift")

    @property
    def process(self) -> NoiseSchedule:
        return NoiseSchedule(self.schedule, self.timesteps, self.zero_terminal_snr, self.beta_start, self.beta_end)


class Uncertainty(nn.Module):
    """Timesteps [B] -> log-variance [B] of the loss there, learned beside the model (2312.02696 section 5, eq. 21).

    A loss L with log-variance u becomes L / exp(u) + u, whose best u is log L: all timesteps then weigh alike.
    """

    def __init__(self, timesteps: int, features: int = 64) -> None:
        super().__init__()
        self.timesteps = timesteps
        frequencies = torch.arange(1, features + 1) * torch.pi / 2
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.read = nn.Linear(features, 1)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.read(((t[:, None] + 0.5) / self.timesteps * self.frequencies).cos())[:, 0]


class Diffusion:
    """The loss of `config` for any model(noisy, t, y) -> prediction [B, C, h, w] (channels past C are dropped)."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.abar = torch.tensor(config.process.alphas_cumprod)

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Stratified draws [count] int64 on the generator's device, in random order."""
        device = generator.device
        u = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
        u = u / count
        t = self.config.shift * u / (1 + (self.config.shift - 1) * u)
        t = (t * self.config.timesteps).long().clamp(max=self.config.timesteps - 1)
        return t[torch.randperm(count, generator=generator, device=device)]

    def noise(self, shape: tuple[int, ...], t: Tensor, generator: torch.Generator) -> Tensor:
        return noise.draw(shape, t, self.config.timesteps, self.config.noise, generator)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps."""
        signal, spread = self.levels(t, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should say."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "sample":
            return clean
        signal, spread = self.levels(t, clean)
        return signal * noise - spread * clean

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) of timesteps [B], as [B, 1, 1, 1]."""
        abar = self.abar.to(like.device)[t][:, None, None, None]
        return abar.sqrt().to(like), (1 - abar).sqrt().to(like)

    def weight(self, t: Tensor) -> Tensor:
        """How much each row's squared error counts, [B] float32: 1, or Min-SNR's min(snr, gamma) put for the
        prediction (2303.09556 section 3.4; for v divided by snr + 1)."""
        if self.config.weighting != "min_snr":
            return torch.ones(t.shape, device=t.device)
        abar = self.abar.to(t.device)[t]
        snr = abar / (1 - abar).clamp(min=1e-12)
        kept = snr.clamp(max=self.config.gamma)
        over = {"epsilon": snr.clamp(min=1e-12), "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return (kept / over[self.config.prediction]).float()

    def loss(
        self,
        predicted: Tensor,
        wanted: Tensor,
        t: Tensor,
        *,
        channels: Tensor | None = None,
        known: Tensor | None = None,
        doubt: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and each row's own squared error [B] without gradient. `channels` [C] says how much each channel
        counts (1 on average), `known` [B, h, w] which cells do; `doubt` [B] is `Uncertainty`'s."""
        error = (predicted[:, : wanted.shape[1]].float() - wanted.float()).square()
        error = (error if channels is None else error * channels[:, None, None]).mean(1)
        known = torch.ones_like(error) if known is None else known
        rows = (error * known).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
        counted = rows * self.weight(t)
        if doubt is not None:
            counted = counted * (-doubt).exp() + doubt
        return counted.mean(), rows.detach()
