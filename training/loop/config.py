"""How a run is optimised, whatever it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from saccade.errors import InvalidInput


def _explained(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LoopConfig:
    """Steps, optimiser, precision, checkpoints. Raises InvalidInput for what no run can use."""

    steps: int = _explained(1000, "optimizer steps of the whole run")
    batch: int = _explained(64, "rows of one optimizer step, over all processes")
    accumulate: int = _explained(1, "parts that a process makes of its rows, one after another")
    lr: float = _explained(1e-4, "learning rate after the warm-up")
    lr_end: float = _explained(0.0, "learning rate at the end (with decay cosine or exponential)")
    decay: Literal["cosine", "exponential", "constant"] = _explained("constant", "how the learning rate falls")
    warmup: int = _explained(0, "steps over which the learning rate rises from nothing")
    weight_decay: float = _explained(0.0, "AdamW's, on what has two dimensions or more")
    betas: tuple[float, float] = _explained((0.9, 0.999), "AdamW's")
    clip: float = _explained(1.0, "the gradient's greatest length (0: any)")
    ema: float = _explained(0.9999, "of the averaged weights; lower at the start: (step + 1) / (step + 10)")
    seed: int = _explained(0, "of everything random in a step")
    bf16: bool = _explained(False, "forward in bfloat16 where that is safe; weights stay float32")
    compile: bool = _explained(False, "torch.compile, block by block")
    checkpoint_activations: bool = _explained(False, "recompute the blocks in the backward: less memory, slower")
    checkpoint_s: float = _explained(300.0, "seconds between checkpoints")
    keep: int = _explained(2, "checkpoints that stay")
    log_every: int = _explained(20, "steps between rows of the log")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, not {getattr(self, name)}", param=name)
        for name in ("lr", "lr_end", "warmup", "weight_decay", "clip", "checkpoint_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidInput(f"{name} must be a number from 0, not {getattr(self, name)}", param=name)
        if not 0 <= self.ema < 1:
            raise InvalidInput(f"ema must be from 0 to below 1, not {self.ema}", param="ema")
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
