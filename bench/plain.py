"""The reference recipe's model, restated plainly: eager, explicit attention, experts in a Python loop.

What `bench.step` measures against. Written from the papers (Peebles & Xie 2212.09748, Fei et al. 2407.11633); weights
of `training.models.dit` load into it, and it answers the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.models.dit import DiTConfig
from training.models.embed import TimestepEmbedder, sincos_positions


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Every token repeated for each of its experts, then one expert after the other on the rows that chose it."""

    def __init__(self, width: int, count: int, active: int) -> None:
        super().__init__()
        self.active, self.uneven = active, torch.zeros(())
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Expert(width, 4 * width) for _ in range(count))
        self.shared_experts = Expert(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores = self.gate(rows).softmax(-1)
        weight, chosen = scores.topk(self.active, sorted=False)
        share = F.one_hot(chosen, len(self.experts)).float().mean((0, 1))
        self.uneven = len(self.experts) * (share * scores.mean(0)).sum()
        repeated, flat = rows.repeat_interleave(self.active, 0), chosen.flatten()
        out = torch.empty_like(repeated)
        for index, expert in enumerate(self.experts):
            out[flat == index] = expert(repeated[flat == index])
        out = (out.reshape(*weight.shape, -1) * weight[..., None]).sum(1)
        return (out + self.shared_experts(rows)).reshape(x.shape)


class Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, experts = config.width, config.experts
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, config.heads)
        if experts is None:
            self.mlp = Mlp(width)
        else:
            self.moe = MoE(width, experts.count, experts.active)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        branch = self.mlp if hasattr(self, "mlp") else self.moe
        return x + gate2 * branch(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """forward: x [B, C, h, w], t [B], y [B] -> [B, C, h, w]; class-conditional, h and w of grid * patch cells."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, width, patch = config, config.width, config.patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, width, patch, stride=patch)})
        self.register_buffer("positions", sincos_positions(width, config.grid, config.grid, config.grid), False)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.labels, width)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, patch * patch * config.channels)})
        self.final_layer["adaLN_modulation"] = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer["norm"] = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.positions
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        tokens = self.final_layer["linear"](self.final_layer["norm"](tokens) * (1 + scale) + shift)
        grid, patch = self.config.grid, self.config.patch
        cells = tokens.reshape(-1, grid, grid, patch, patch, self.config.channels)
        return torch.einsum("nhwpqc->nchpwq", cells).reshape(x.shape)

    def balance(self) -> Tensor | None:
        found = [block.moe.uneven for block in self.blocks if hasattr(block, "moe")]
        return self.config.experts.balance * torch.stack(found).sum() if found else None


def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of `training.models.dit` under this model's names: experts apart."""
    found = {}
    for key, value in state.items():
        if ".moe.experts." in key:
            block, layer = key.split(".experts.")
            found |= {f"{block}.experts.{index}.{layer}": expert for index, expert in enumerate(value)}
        else:
            found[key] = value
    return found
