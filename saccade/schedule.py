"""Noise schedules of the forward process, and which of its timesteps a sampler visits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput

Kind = Literal["linear", "scaled_linear", "cosine"]
Spacing = Literal["leading", "linspace", "trailing"]
Float64 = NDArray[np.float64]

CLEAN = -1
DEFAULT_BETAS: dict[str, tuple[float, float]] = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012)}
MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each timestep carries: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps.

    `linear`: betas evenly spaced (DDPM, 2006.11239). `scaled_linear`: their square roots are (latent diffusion,
    2112.10752). `cosine`: 2102.09672 eq. 17, betas at most 0.999; it takes no `beta_start` or `beta_end`.
    `zero_terminal_snr`: the last timestep is pure noise (2305.08891 algorithm 1). A beta of None is the kind's default.
    Raises InvalidInput for an unknown kind, fewer than 2 timesteps, or betas outside 0 < beta_start <= beta_end < 1.
    """

    kind: Kind
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    beta_start: float | None = None
    beta_end: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidInput(
                f"schedule must be one of {', '.join(get_args(Kind))}, not {self.kind}", param="schedule"
            )
        if self.timesteps < 2:
            raise InvalidInput("a schedule needs at least 2 timesteps", param="timesteps")
        if self.kind == "cosine":
            self._refuse_betas()
        elif not 0 < self.betas[0] <= self.betas[1] < 1:
            raise InvalidInput("betas must satisfy 0 < beta_start <= beta_end < 1", param="beta_start")

    def _refuse_betas(self) -> None:
        if self.beta_start is not None or self.beta_end is not None:
            raise InvalidInput("the cosine schedule takes no beta_start or beta_end", param="beta_start")

    @property
    def betas(self) -> tuple[float, float]:
        """First and last beta; not for cosine."""
        start, end = DEFAULT_BETAS[self.kind]
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )

    @property
    def alphas_cumprod(self) -> Float64:
        """abar_t, [T] float64, falling; read-only, and computed once for all equal schedules."""
        return _alphas_cumprod(self)

    def abar(self, t: NDArray[np.int64]) -> Float64:
        """abar of each timestep, [B] -> [B] float64; CLEAN (-1) has abar 1. Raises InvalidInput outside -1 .. T-1."""
        if np.any((t < CLEAN) | (t >= self.timesteps)):
            raise InvalidInput(f"timesteps must be {CLEAN} to {self.timesteps - 1}", param="timestep")
        return np.where(t == CLEAN, 1.0, self.alphas_cumprod[t])


def timesteps(n: int, spacing: Spacing, total: int = 1000, *, steps_offset: int = 0) -> NDArray[np.int64]:
    """The n timesteps a sampler visits, [n] int64, falling (2305.08891 table 2, rounded as by diffusers' DDIM).

    `leading`: multiples of total // n from 0, plus `steps_offset` (Stable Diffusion's 1; it moves no other spacing).
    `linspace`: evenly from total - 1 to 0. `trailing`: evenly down from total - 1, the last about total / n - 1.
    One `leading` or `linspace` step is a step from t = 0, so only `trailing` can answer in one step.
    Raises InvalidInput unless 1 <= n <= total and the offset keeps every timestep inside 0 .. total - 1.
    """
    if not 1 <= n <= total:
        raise InvalidInput(f"steps must be 1 to {total}", param="steps")
    if spacing == "leading":
        steps = np.arange(n)[::-1] * (total // n) + steps_offset
    elif spacing == "linspace":
        steps = np.linspace(0, total - 1, n)[::-1].round().astype(np.int64)
    elif spacing == "trailing":
        # arange rounds halves the way diffusers does, and for some n ends with one value too many.
        steps = np.arange(total, 0, -total / n)[:n].round().astype(np.int64) - 1
    else:
        raise InvalidInput(f"spacing must be one of {', '.join(get_args(Spacing))}, not {spacing}", param="spacing")
    if steps[-1] < 0 or steps[0] >= total:
        raise InvalidInput(f"steps_offset {steps_offset} leaves the schedule's {total} timesteps", param="steps_offset")
    return steps


def pairs(timesteps: NDArray[np.int64], last: int = CLEAN) -> list[tuple[int, int]]:
    """(t, t_prev) of every step of a sampler: from each timestep to the next in the list, at last to `last`.

    The way ends at the clean picture (CLEAN, -1) or, with 0, at the first timestep's little noise.
    diffusers steps by total // n instead, whatever comes next in its list.
    Raises InvalidInput where no step is left.
    """
    taken = [(t, t_prev) for t, t_prev in pairwise([*timesteps.tolist(), last]) if t > t_prev]
    if not taken:
        raise InvalidInput("one step from the last timestep leads nowhere: ask for trailing spacing", param="spacing")
    return taken


@lru_cache(maxsize=64)
def _alphas_cumprod(schedule: NoiseSchedule) -> Float64:
    abar: Float64 = np.cumprod(1 - _betas(schedule), dtype=np.float64)
    if schedule.zero_terminal_snr:
        abar = _with_zero_terminal_snr(abar)
    abar.flags.writeable = False
    return abar


def _betas(schedule: NoiseSchedule) -> Float64:
    if schedule.kind == "cosine":
        return _cosine_betas(schedule.timesteps)
    start, end = schedule.betas
    if schedule.kind == "linear":
        return np.linspace(start, end, schedule.timesteps)
    return np.square(np.linspace(start**0.5, end**0.5, schedule.timesteps))


def _cosine_betas(total: int) -> Float64:
    signal: Float64 = np.square(np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2))
    return np.minimum(1 - signal[1:] / signal[:-1], MAX_BETA)


def _with_zero_terminal_snr(abar: Float64) -> Float64:
    """Shift sqrt(abar) so that it ends at 0, scale it so that it still starts where it did."""
    root = np.sqrt(abar)
    shifted: Float64 = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return np.square(shifted)
