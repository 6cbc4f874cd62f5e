"""The MLPs of blocks and of shared experts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from training.models import affiner
from training.models.affiner import Adapters, linear


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)) on [B, ..., D]; `hidden` is 4 D unless told. `task` [B]: the rows', where there are adapters."""

    def __init__(self, width: int, hidden: int | None = None, adapters: Adapters | None = None) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        self.fc1 = linear(width, hidden, "fc1", adapters)
        self.fc2 = linear(hidden, width, "fc2", adapters)

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        return affiner.apply(self.fc2, F.gelu(affiner.apply(self.fc1, x, task), approximate="tanh"), task)


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x), no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
