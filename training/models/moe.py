"""Mixtures of experts as in DiT-MoE (Fei et al. 2407.11633): every token through the few MLPs that a router picks.

Router: softmax over all experts, in fp32, then the best `active`. Three ways to run the experts, one result:
torch's grouped products over tokens sorted by expert (bf16 on a GPU: no host waits), the same slice by slice in one
operation (CPU, fp32), and lookups expert by expert (exported graphs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from saccade.errors import InvalidInput
from training.config import explained
from training.models.embed import full_precision
from training.models.mlp import GatedMlp, Mlp


@dataclass(frozen=True)
class Experts:
    """Of every block, instead of its MLP. Raises InvalidInput for more active experts than there are."""

    count: int = explained("experts of a block", 8)
    active: int = explained("how many of them see a token", 2)
    shared: bool = explained("one more MLP, of half their width, that sees every token", True)
    gated: bool = explained(
        "down(silu(gate x) * up x) without biases; else fc2(gelu(fc1 x)), as the dense model's", True
    )
    renormalise: bool = explained("a token's weights add up to 1; upcycling needs it", False)
    balance: float = explained("factor of the load-balancing loss", 0.01)

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count:
            raise InvalidInput(f"experts: {self.active} of {self.count} cannot be active")


class Groups(NamedTuple):
    """Rows sorted by expert. `ends` [E] int32: where each expert's rows end. `of_row` [rows]: each row's expert."""

    ends: Tensor
    of_row: Tensor


@torch.library.custom_op("saccade::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [M, in] in groups, weight [E, out, in] -> [M, out]. For what torch's grouped product does not compile or bear:
    other types than bf16, rows that are no whole pieces of 16 bytes, and the CPU, where slice by slice is as fast."""
    out = x.new_empty(len(x), weight.shape[1])
    for rows, into, matrix in zip(slices(x, ends), slices(out, ends), weight, strict=True):
        torch.mm(rows, matrix.T, out=into)
    return out


@torch.library.custom_op("saccade::grouped_product_gradient", mutates_args=())
def grouped_product_gradient(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """gradient [M, out], x [M, in] in groups -> the weights' gradient [E, out, in]."""
    found = x.new_empty(len(ends), gradient.shape[1], x.shape[1])
    for one, two, into in zip(slices(gradient, ends), slices(x, ends), found, strict=True):
        torch.mm(one.T, two, out=into)
    return found


def slices(rows: Tensor, ends: Tensor) -> list[Tensor]:
    last = ends.tolist()
    return [rows[start:end] for start, end in zip([0, *last], last, strict=False)]


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_product_gradient.register_fake
def _(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1])


@register_flop_formula(torch.ops.saccade.grouped_product)
def _(x: tuple[int, int], weight: tuple[int, int, int], *_: object, **__: object) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.saccade.grouped_product_gradient)
def _(gradient: tuple[int, int], x: tuple[int, int], *_: object, **__: object) -> int:
    return 2 * x[0] * gradient[1] * x[1]


def whole_rows(*widths: int) -> bool:
    """Whether rows of so many bf16 values are whole pieces of 16 bytes, which torch's grouped product demands."""
    return all(width % 8 == 0 for width in widths)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    x, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    into_x = grouped_product(gradient, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    into_weight = grouped_product_gradient(gradient, x, ends) if ctx.needs_input_grad[1] else None
    return into_x, into_weight, None


grouped_product.register_autograd(_backward, setup_context=_remember)


class Stack(nn.Module):
    """The same linear layer of every expert: weight [E, out, in], bias [E, out]."""

    def __init__(self, count: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, of: int | Groups) -> Tensor:
        """Rows x [M, in], all of one expert or of many in groups, -> [M, out]."""
        if isinstance(of, int):
            return F.linear(x, self.weight[of], None if self.bias is None else self.bias[of])
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x, weight = x.to(kind), self.weight.to(kind)
        if x.is_cuda and kind is torch.bfloat16 and whole_rows(x.shape[1], weight.shape[1]):
            out = F.grouped_mm(x, weight.transpose(1, 2), offs=of.ends)
        else:
            out = grouped_product(x, weight, of.ends)
        return out if self.bias is None else out + self.bias[of.of_row].to(kind)


class GatedExperts(nn.Module):
    """down(silu(gate x) * up x), hidden width 4 D, no biases."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Stack(count, width, 4 * width, bias=False)
        self.up_proj = Stack(count, width, 4 * width, bias=False)
        self.down_proj = Stack(count, 4 * width, width, bias=False)

    def forward(self, x: Tensor, of: int | Groups) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x, of)) * self.up_proj(x, of), of)


class PlainExperts(nn.Module):
    """fc2(gelu(fc1 x)), hidden width 4 D, as the dense model's MLP."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.fc1 = Stack(count, width, 4 * width, bias=True)
        self.fc2 = Stack(count, 4 * width, width, bias=True)

    def forward(self, x: Tensor, of: int | Groups) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, of), approximate="tanh"), of)


class MoE(nn.Module):
    """forward: x [B, N, D] -> the same shape, and how unevenly the experts are used (1: evenly) with its gradient."""

    def __init__(self, width: int, experts: Experts) -> None:
        super().__init__()
        self.config = experts
        self.gate = nn.Linear(width, experts.count, bias=False)
        self.experts = (GatedExperts if experts.gated else PlainExperts)(experts.count, width)
        self.shared_experts = (GatedMlp if experts.gated else Mlp)(width, 2 * width) if experts.shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        scores, weight, chosen = self.route(rows)
        out = self.lookup(rows, weight, chosen) if exporting() else self.grouped(rows, weight, chosen)
        if self.shared_experts is not None:
            out = out + self.shared_experts(rows)
        return out.reshape(x.shape), self.unevenness(scores, chosen)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [M, E] over all experts, and weight and expert [M, active] of the best; in fp32."""
        with full_precision(rows):
            scores = F.linear(rows.float(), self.gate.weight.float()).softmax(-1)
        weight, chosen = scores.topk(self.config.active, sorted=False)
        if self.config.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return scores, weight, chosen

    def grouped(self, rows: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """Tokens sorted by expert, so that each expert sees one slice."""
        order = chosen.flatten().argsort(stable=True)
        of_row = chosen.flatten()[order]
        ends = F.one_hot(chosen, self.config.count).sum((0, 1)).cumsum(0).int()
        out = self.experts(rows[order // self.config.active], Groups(ends, of_row))
        back = out[order.argsort()].reshape(*chosen.shape, -1)
        return (back * weight[..., None]).sum(1)

    def lookup(self, rows: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """Expert by expert, so that the graph's shapes follow the data on every input."""
        out = torch.zeros_like(rows)
        for expert in range(self.config.count):
            row, rank = (chosen == expert).nonzero(as_tuple=True)
            out = out.index_add(0, row, self.experts(rows[row], expert) * weight[row, rank][:, None])
        return out

    def unevenness(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """E * sum_i f_i P_i (Switch Transformers 2101.03961, eq. 4): f the share of choices, P the mean score."""
        share = F.one_hot(chosen, self.config.count).float().mean((0, 1))
        return self.config.count * (share * scores.mean(0)).sum()


def exporting() -> bool:
    """Whether a graph is being made: by torch.export, or by tracing."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
