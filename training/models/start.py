"""The first weights of a model, as the reference implementations draw them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.moe import Stack


def start_as_published(model: nn.Module) -> None:
    """Meta's first weights: Xavier's uniform for what is not zero, labels and timesteps from N(0, 0.02^2). Routers keep
    torch's own start, as in DiT-MoE."""
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    for name, module in model.named_modules():
        if name.startswith("t_embedder.mlp.") and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Stack) or (
            isinstance(module, nn.Linear) and not name.endswith((".gate", "adaLN_modulation.1", "final_layer.linear"))
        ):
            xavier(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj if model.config.inputs == 1 else model.x_embedder
    xavier(patches.weight.flatten(1) if model.config.inputs == 1 else patches.weight)
    nn.init.zeros_(patches.bias)


@torch.no_grad()
def xavier(weight: Tensor) -> None:
    """Glorot & Bengio's uniform start of matrices [..., a, b]."""
    bound = (6 / (weight.shape[-1] + weight.shape[-2])) ** 0.5
    weight.uniform_(-bound, bound)
