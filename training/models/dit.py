"""The diffusion transformer (Peebles & Xie 2212.09748): adaLN-Zero blocks on patches of a latent.

The whole family is one model with options: experts (`moe`), routing by timestep (`routing`), adapters (`affiner`),
an input convolution per task. Parameter names are Meta's, so their checkpoints load as they are; sizes are the papers'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from saccade.errors import InvalidInput
from training.config import explained
from training.models import affiner
from training.models.affiner import Adapters, linear
from training.models.embed import (
    LabelEmbedder,
    PatchEmbed,
    RoutedPatchEmbed,
    TimestepEmbedder,
    full_precision,
    sincos_positions,
    unpatchify,
)
from training.models.mlp import Mlp
from training.models.moe import Experts, MoE, exporting
from training.models.routing import Routing, channel_masks
from training.models.start import start_as_published


@dataclass(frozen=True)
class DiTConfig:
    """A model of the family. Raises InvalidInput for what cannot be built."""

    width: int = explained("channels of a token")
    heads: int = explained("attention heads")
    depth: int = explained("blocks")
    channels: int = explained("of the noisy latent, and of what is predicted", 4)
    condition: int = explained("channels of the latents concatenated in front of the noisy one", 0)
    patch: int = explained("latent cells per token and edge", 2)
    labels: int = explained("rows of the label table, the unconditional one (the last) counted in", 1001)
    grid: int = explained("tokens per edge at which positions are those of training; other sizes interpolate", 16)
    learn_sigma: bool = explained("twice the output channels, the second half variances that nothing here uses", False)
    inputs: int = explained("input convolutions; more than one: the label's own (PatchEmbedRouter)", 1)
    first_label: int = explained("label of the first task, for input convolutions and adapters", 0)
    frequency_shift: int = explained("0 for Meta's timestep sinusoids, 1 for those of diffusers", 0)
    experts: Experts | None = field(default=None, metadata={"help": "mixture of experts instead of every block's MLP"})
    routing: Routing | None = field(
        default=None, metadata={"help": "denoising task routing: each timestep its own channels"}
    )
    adapters: Adapters | None = field(
        default=None, metadata={"help": "Affiner adapters on the linear layers of a frozen base"}
    )

    def __post_init__(self) -> None:
        counts = ("width", "heads", "depth", "channels", "patch", "labels", "grid", "inputs")
        if low := [name for name in counts if getattr(self, name) < 1]:
            raise InvalidInput(f"{low[0]} must be at least 1, not {getattr(self, low[0])}", param=low[0])
        if self.width % self.heads or self.width % 4:
            raise InvalidInput(f"width {self.width} must be a multiple of 4 and of heads {self.heads}", param="width")
        if self.condition < 0:
            raise InvalidInput(f"condition must not be negative, not {self.condition}", param="condition")
        tasks = max(self.inputs, self.adapters.tasks if self.adapters else 1)
        if not 0 <= self.first_label <= self.labels - tasks:
            raise InvalidInput(
                f"{tasks} tasks from label {self.first_label} on do not fit {self.labels} labels", param="first_label"
            )


# "Scaling Properties of Diffusion Models for Perceptual Tasks", dense models; then DiT's own. Width, heads, depth.
SIZES: dict[str, tuple[int, int, int]] = {
    "a1": (256, 16, 12),
    "a2": (512, 16, 16),
    "a3": (768, 16, 20),
    "a4": (1024, 16, 24),
    "a5": (1536, 16, 28),
    "a6": (1792, 16, 32),
    "S": (384, 6, 12),
    "B": (768, 12, 12),
    "L": (1024, 16, 24),
    "XL": (1152, 16, 28),
}
NAMES = (
    *(name for name in SIZES if name.startswith("a")),
    *(f"{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)),
    "S/2-8E2A",
    "S/2-16E2A",
    "L/2-8E2A",
)


def named(name: str, **changes: Any) -> DiTConfig:
    """The papers' configuration of that name, a1 to a6, S/2 to XL/8, S/2-8E2A and the like, with fields changed.

    Raises InvalidInput for another name or field.
    """
    found = re.fullmatch(r"(a[1-6]|(?:S|B|L|XL)(?=/))(?:/([248]))?(?:-(\d{1,3})E(\d{1,3})A)?", name)
    if not found:
        raise InvalidInput(f"no model is called {name!r}; choose from {', '.join(NAMES)}", param="model")
    size, patch, count, active = found.groups()
    experts = Experts(int(count), int(active)) if count else None
    try:
        return replace(DiTConfig(*SIZES[size], patch=int(patch or 2), experts=experts), **changes)
    except TypeError:
        unknown = sorted(set(changes) - set(DiTConfig.__dataclass_fields__))
        raise InvalidInput(f"a model's configuration has no field {', '.join(unknown)}", param=unknown[0]) from None


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[B, N, D] by [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]."""

    def __init__(self, width: int, heads: int, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width, "qkv", adapters)
        self.proj = linear(width, width, "proj", adapters)

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = affiner.apply(self.qkv, x, task).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = written_out(q, k, v) if exporting() or short_on_cpu(q) else F.scaled_dot_product_attention(q, k, v)
        return affiner.apply(self.proj, mixed.transpose(1, 2).reshape(batch, tokens, width), task)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in plain operations: the form that inference engines recognise and fuse."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v


def short_on_cpu(q: Tensor) -> bool:
    """Where torch's fused attention costs two to three times the plain one: bf16 on a CPU, up to 512 tokens."""
    return q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[-2] <= 512


class DiTBlock(nn.Module):
    """adaLN-Zero: shift, scale and gate of both branches come from the condition; the gates start at zero.

    forward: x [B, N, D], condition c [B, D], channel mask [B, D] of DTR and task [B] of adapters, where there are such
    -> tokens [B, N, D] and, of a block with experts, how unevenly they are used.
    """

    def __init__(
        self, width: int, heads: int, experts: Experts | None = None, adapters: Adapters | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, adapters)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        if experts is None:
            self.mlp = Mlp(width, adapters=adapters)
        else:
            self.moe = MoE(width, experts)
        self.adaLN_modulation = adaln(width, 6, "adaLN", adapters)

    def forward(
        self, x: Tensor, c: Tensor, mask: Tensor | None = None, task: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        with full_precision(x):
            shift1, scale1, gate1, shift2, scale2, gate2 = condition(self.adaLN_modulation, c, task).chunk(6, dim=1)
        own = x if mask is None else x * mask[:, None]
        own = own + gate1[:, None] * self.attn(modulate(self.norm1(own), shift1, scale1), task)
        seen = modulate(self.norm2(own), shift2, scale2)
        changed, uneven = (self.mlp(seen, task), None) if hasattr(self, "mlp") else self.moe(seen)
        own = own + gate2[:, None] * changed
        return own if mask is None else own + x * (1 - mask[:, None]), uneven


def adaln(width: int, parts: int, name: str, adapters: Adapters | None) -> nn.Sequential:
    """Condition [B, D] -> [B, parts * D], at first zero."""
    layer = linear(width, parts * width, name, adapters)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.SiLU(), layer)


def condition(modulation: nn.Sequential, c: Tensor, task: Tensor | None) -> Tensor:
    return affiner.apply(modulation[1], modulation[0](c), task)


class FinalLayer(nn.Module):
    """[B, N, D] -> [B, N, patch^2 * channels]; starts at zero."""

    def __init__(self, width: int, patch: int, channels: int, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = linear(width, patch * patch * channels, "final", adapters)
        self.adaLN_modulation = adaln(width, 2, "final", adapters)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor, task: Tensor | None = None) -> Tensor:
        with full_precision(x):
            shift, scale = condition(self.adaLN_modulation, c, task).chunk(2, dim=1)
        return affiner.apply(self.linear, modulate(self.norm_final(x), shift, scale), task)


class DiT(nn.Module):
    """forward: x [B, condition + channels, h, w], t [B] int64, y [B] int64 -> [B, channels (or twice that), h, w].

    h and w are multiples of the patch, of any size and shape. Set `checkpointing` to recompute the blocks' activations
    in the backward pass instead of keeping them.
    """

    def __init__(self, config: DiTConfig, schedule_timesteps: int = 1000) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.uneven: Tensor | None = None
        width, channels = config.width, config.condition + config.channels
        self.x_embedder = (
            PatchEmbed(channels, width, config.patch)
            if config.inputs == 1
            else RoutedPatchEmbed(channels, width, config.patch, config.inputs)
        )
        self.t_embedder = TimestepEmbedder(width, shift=config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.labels, width, config.adapters.tasks if config.adapters else 0)
        masks = None if config.routing is None else channel_masks(config.routing, width, schedule_timesteps)
        self.register_buffer("masks", masks, persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.heads, config.experts, config.adapters) for _ in range(config.depth)
        )
        out_channels = config.channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(width, config.patch, out_channels, config.adapters)
        start_as_published(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch
        task = y - self.config.first_label
        tokens = self.x_embedder(x) if self.config.inputs == 1 else self.x_embedder(x, task)
        tokens = tokens + sincos_positions(self.config.width, height, width, self.config.grid).to(x)
        with full_precision(x):
            c = self.t_embedder(t) + self.y_embedder(y, task)
        mask = None if self.masks is None else self.masks[t]
        found = []
        for block in self.blocks:
            tokens, uneven = self.run(block, tokens, c, mask, task)
            found.append(uneven)
        self.uneven = None if self.config.experts is None else torch.stack(found)
        return unpatchify(self.final_layer(tokens, c, task), height, width, self.config.patch)

    def run(self, block: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The forward pass without learned variances: [B, channels, h, w]."""
        return self(x, t, y)[:, : self.config.channels]

    def balance(self) -> Tensor | None:
        """The last forward's load-balancing loss, summed over the blocks and times its factor, with its gradient."""
        return None if self.uneven is None else self.config.experts.balance * self.uneven.sum()

    @property
    def balance_value(self) -> Tensor | None:
        """The mean over the blocks of E * sum f_i P_i, for the log: 1 where the experts share evenly, at most E."""
        return None if self.uneven is None else self.uneven.detach().mean()


class Counts(NamedTuple):
    """Parameters in all, and those that a token passes through."""

    total: int
    active: int


def parameters_of(config: DiTConfig) -> Counts:
    """Counted on a model without storage."""
    with torch.device("meta"):
        model = DiT(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    if config.experts is None:
        return Counts(total, total)
    stacked = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    return Counts(total, total - stacked + stacked * config.experts.active // config.experts.count)
