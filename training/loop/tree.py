"""Batches as trees: dicts, lists, tuples and dataclasses of tensors and arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor changed; all else stays."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(mapped(value, change) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: mapped(getattr(batch, f.name), change) for f in fields(batch) if f.init})
    return batch


def leaves(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Dotted names and tensors (arrays as tensors) of a tree."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf":
        yield name, torch.from_numpy(np.ascontiguousarray(batch))
    elif isinstance(batch, dict):
        for key, value in batch.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(batch, list | tuple):
        keys = getattr(batch, "_fields", range(len(batch)))
        for key, value in zip(keys, batch, strict=True):
            yield from leaves(value, f"{name}.{key}")
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from leaves(getattr(batch, field.name), f"{name}.{field.name}")


def shapes(batch: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What makes two batches the same work."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in leaves(batch))
