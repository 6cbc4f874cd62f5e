"""How much of the machine a run uses: operations of a step, counted, over the rate of plain matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

EDGE = 1024

# Dense bfloat16 rates that makers state, FLOP/s; a measured product would be a little less.
KNOWN = {
    "GB200": 2450e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
    "L4": 121e12,
}


class Operations(TorchDispatchMode):
    """Counts by torch's own formulas, without its module tracker, which does not bear a forward inside a forward.

    Attention that the CPU fuses has no formula there and is counted here."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _CPU_ATTENTION:
            self.total += _CPU_ATTENTION[packet] * _attention(*_queries(packet, args))
        elif packet in _GROUPED:
            self.total += _grouped(args[0], args[1])
        return out


def _optional(name: str) -> Any:
    return getattr(torch.ops.aten, name, None)


# Products of queries with keys, and of probabilities with values: two forward, five backward (one of them anew).
_CPU_ATTENTION = {
    _optional("_scaled_dot_product_flash_attention_for_cpu"): 2,
    _optional("_scaled_dot_product_flash_attention_for_cpu_backward"): 5,
}
_GROUPED = {_optional("_grouped_mm")} - {None}


def _queries(packet: Any, args: Any) -> tuple[Tensor, Tensor]:
    return (args[1], args[2]) if "backward" in str(packet) else (args[0], args[1])


def _attention(query: Tensor, key: Tensor) -> int:
    """Of one product of queries [B, H, N, D] with keys [B, H, M, D]."""
    return 2 * query.numel() * key.shape[-2]


def _grouped(one: Tensor, other: Tensor) -> int:
    """Of products in groups: [M, K] [E, K, N], [E, M, K] [E, K, N], [N, M] [M, K], or [E, M, K] [K, N]."""
    alike = one.shape[0] if one.ndim == 3 and other.ndim == 2 else 1
    return 2 * one.numel() * other.shape[-1] // alike


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `work`."""
    with Operations() as counted:
        work()
    return counted.total


def peak(device: torch.device, kind: torch.dtype) -> float:
    """FLOP/s of matrix products: a known GPU's bfloat16 rate, else measured here in `kind`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, rate in KNOWN.items():
            if model in name:
                return rate
    one = torch.ones(EDGE, EDGE, device=device, dtype=kind)
    _seconds(lambda: one @ one, device)
    return 2 * EDGE**3 / min(_seconds(lambda: one @ one, device) for _ in range(3))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
