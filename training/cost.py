"""What a transformer of the family costs: multiply-accumulates (MACs) by formula. One MAC is two FLOPs.

Counted are the matrix products, attention's two included; norms, activations, sums and embeddings' lookups are not. A
training step costs three forwards: the backward pass has a product for the inputs and one for the weights.
"""

from __future__ import annotations

from training.models.dit import DiTConfig
from training.models.moe import Experts

FREQUENCIES = 256  # of the timestep's sinusoids


def forward_macs(config: DiTConfig, height: int, width: int) -> int:
    """MACs of one sample's forward pass on a latent of height x width cells."""
    tokens, d = (height // config.patch) * (width // config.patch), config.width
    cells = config.patch**2
    out = config.channels * cells * (2 if config.learn_sigma else 1)
    embed = tokens * cells * (config.condition + config.channels) * d
    time = FREQUENCIES * d + d * d
    block = tokens * (_linear(config, d, 3 * d, "qkv") + _linear(config, d, d, "proj")) + 2 * tokens**2 * d
    block += _linear(config, d, 6 * d, "adaLN") + tokens * mlp_macs(config)
    final = tokens * _linear(config, d, out, "final") + _linear(config, d, 2 * d, "final")
    return embed + time + config.depth * block + final


def mlp_macs(config: DiTConfig) -> int:
    """Of one token in one block's MLP or experts."""
    d = config.width
    if config.experts is None:
        return _linear(config, d, 4 * d, "fc1") + _linear(config, 4 * d, d, "fc2")
    return experts_macs(config.experts, d)


def experts_macs(experts: Experts, d: int) -> int:
    """The router, the active experts (hidden width 4 d) and the shared one (2 d)."""
    layers = 3 if experts.gated else 2
    return d * experts.count + layers * 4 * d * d * experts.active + (layers * 2 * d * d if experts.shared else 0)


def training_macs(config: DiTConfig, height: int, width: int, samples: int) -> int:
    """Of all optimiser steps over `samples` rows. With a frozen base (adapters) it is an upper bound: the base's
    weights need no gradient."""
    return 3 * forward_macs(config, height, width) * samples


def _linear(config: DiTConfig, inputs: int, outputs: int, name: str) -> int:
    """A linear layer, with the low-rank branch of its adapter where it has one."""
    adapters = config.adapters
    branch = adapters.rank * (inputs + outputs) if adapters is not None and name in adapters.layers else 0
    return inputs * outputs + branch
