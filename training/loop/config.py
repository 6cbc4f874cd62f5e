"""How a run is optimised, whatever it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from saccade.errors import InvalidInput
from training.config import BELOW_ONE, COUNT, NOT_NEGATIVE, Range, explained, within

SEED = Range(0, 2**63, below=True)


@dataclass(frozen=True)
class LoopConfig:
    """Steps, optimiser, precision, checkpoints. Raises InvalidInput for what no run can use."""

    steps: int = explained("optimizer steps of the whole run", 1000)
    batch: int = explained("rows of one optimizer step, over all processes", 64)
    accumulate: int = explained("parts that a process makes of its rows, one after another", 1)
    lr: float = explained("learning rate after the warm-up", 1e-4)
    lr_end: float = explained("learning rate at the end (with decay cosine or exponential)", 0.0)
    decay: Literal["cosine", "exponential", "constant"] = explained("how the learning rate falls", "constant")
    warmup: int = explained("steps over which the learning rate rises from nothing", 0)
    weight_decay: float = explained("AdamW's, on what has two dimensions or more", 0.0)
    betas: tuple[float, float] = explained("AdamW's", (0.9, 0.999))
    clip: float = explained("the gradient's greatest length (0: any)", 1.0)
    ema: float = explained("of the averaged weights; lower at the start: (step + 1) / (step + 10)", 0.9999)
    seed: int = explained("of everything random in a step", 0)
    bf16: bool = explained("forward in bfloat16 where that is safe; weights stay float32", False)
    compile: bool = explained("torch.compile, block by block", False)
    checkpoint_activations: bool = explained("recompute the blocks in the backward: less memory, slower", False)
    checkpoint_s: float = explained("seconds between checkpoints", 300.0)
    keep: int = explained("checkpoints that stay", 2)
    log_every: int = explained("steps between rows of the log", 20)

    def __post_init__(self) -> None:
        within(self, COUNT, "steps", "batch", "accumulate", "keep", "log_every")
        within(self, NOT_NEGATIVE, "lr", "lr_end", "warmup", "weight_decay", "clip", "checkpoint_s")
        within(self, BELOW_ONE, "ema", "betas")
        within(self, SEED, "seed")
        if self.decay not in ("cosine", "exponential", "constant"):
            raise InvalidInput(f"decay is cosine, exponential or constant, not {self.decay!r}", param="decay")
        if self.decay == "exponential" and not (self.lr_end > 0 and self.lr > 0):
            raise InvalidInput("an exponential decay needs lr and lr_end above 0", param="lr_end")

    def rate(self, step: int) -> float:
        """The learning rate of a step; past the end, the last one."""
        share = min(1.0, step / self.steps)
        if self.decay == "cosine":
            rate = self.lr_end + (self.lr - self.lr_end) * (1 + math.cos(math.pi * share)) / 2
        elif self.decay == "exponential":
            rate = self.lr * (self.lr_end / self.lr) ** share
        else:
            rate = self.lr
        return rate * warm(step, self.warmup)

    def ema_at(self, step: int) -> float:
        """Share of the average that stays at a step."""
        return min(self.ema, (step + 1) / (step + 10))


def warm(step: int, warmup: int) -> float:
    """1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / max(1, warmup))
