"""Affiner adapters (DiffScaler, Nair et al. 2404.09976): one frozen base, a small set of parameters per task.

A frozen layer W x + b_hat becomes (1 + a) * (W x) + b_hat + b + s * U relu(D x), with a and b per output channel.
It starts as the layer itself: a = b = U = 0. The rows of a batch may belong to different tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.errors import InvalidInput
from training.config import explained

LAYERS = ("qkv", "proj", "fc1", "fc2", "adaLN", "final")


@dataclass(frozen=True)
class Adapters:
    """Experts have no adapters of their own: under them, attention and adaLN do the adapting. Raises InvalidInput."""

    tasks: int = explained("sets of adapters; a row's is its label - first_label")
    rank: int = explained("of the branch U relu(D x)", 8)
    scale: float = explained("the branch's factor s", 1.0)
    layers: tuple[str, ...] = explained(
        "linear layers with adapters in every block; final: the last projection, which new kinds of output need",
        LAYERS[:5],
    )

    def __post_init__(self) -> None:
        if self.tasks < 1 or self.rank < 0:
            raise InvalidInput(f"adapters need tasks >= 1 and rank >= 0, not {self.tasks} and {self.rank}")
        if unknown := set(self.layers) - set(LAYERS):
            raise InvalidInput(f"adapters know the layers {', '.join(LAYERS)}, not {', '.join(sorted(unknown))}")


class Affiner(nn.Linear):
    """A linear layer with one adapter per task. Its own weight and bias keep their names, so a base's state fits.

    forward: x [B, ..., in], task [B] -> [B, ..., out].
    """

    def __init__(self, inputs: int, outputs: int, adapters: Adapters) -> None:
        super().__init__(inputs, outputs)
        tasks, rank = adapters.tasks, adapters.rank
        self.factor = adapters.scale
        self.scale = nn.Parameter(torch.zeros(tasks, outputs))
        self.shift = nn.Parameter(torch.zeros(tasks, outputs))
        self.down = nn.Parameter(torch.empty(tasks, rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.up = nn.Parameter(torch.zeros(tasks, outputs, rank))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        branch = F.relu(rows @ self.down[task].transpose(1, 2)) @ self.up[task].transpose(1, 2)
        out = F.linear(rows, self.weight)
        scale, shift = (values[task][:, None].float() for values in (self.scale, self.shift))
        # In fp32: 1 + scale in bf16 would know no scale between 0 and 1/128.
        summed = out * (1 + scale) + (self.bias.float() + shift) + self.factor * branch
        return summed.to(out.dtype).reshape(*x.shape[:-1], out.shape[-1])


def linear(inputs: int, outputs: int, name: str, adapters: Adapters | None) -> nn.Linear:
    """A linear layer, with adapters where they are asked for under this name."""
    if adapters is not None and name in adapters.layers:
        return Affiner(inputs, outputs, adapters)
    return nn.Linear(inputs, outputs)


def apply(layer: nn.Linear, x: Tensor, task: Tensor | None) -> Tensor:
    """The layer on x [B, ..., in]; its adapters, where it has some, those of the rows' tasks [B]."""
    return layer(x, task) if isinstance(layer, Affiner) else layer(x)


def freeze_base(model: nn.Module) -> list[str]:
    """Leave only what is a task's own to be trained, and return its names: the adapters, the tasks' label offsets, and
    the input convolutions where there are several."""
    own = tuple(name for name in own_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    return list(own)


def own_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that belong to single tasks. Input convolutions may be more than the adapters' tasks."""
    config = model.config
    if config.adapters is None:
        raise InvalidInput(
            "a model without adapters has nothing that is a task's own: set adapters in its configuration"
        )
    found = ["y_embedder.task_offset"]
    for name, module in model.named_modules():
        if isinstance(module, Affiner):
            found += [f"{name}.{part}" for part in ("scale", "shift", "down", "up")]
    if config.inputs > 1:
        found += [name for name, _ in model.named_parameters() if name.startswith("x_embedder.")]
    return found
