"""Weights inside exported graphs: named as in the torch modules on the way out, read back on the way in.

So the shipped ONNX files are also the checkpoint to fine-tune from, and no second copy is needed.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

log = logging.getLogger(__name__)
TRANSPOSED = "^T"
LEFTOVER = "weight:"


def name_initializers(graph: onnx.ModelProto, state: dict[str, Tensor]) -> None:
    """Rename every initializer that is a parameter (or its transpose) after it; exporters forget some names.

    Parameters that the exporter folded into constants go into the graph's metadata, in base64.
    """
    taken = {i.name for i in graph.graph.initializer}
    nameless = [i for i in graph.graph.initializer if i.name not in state]
    for key, value in ((k, v.detach().numpy()) for k, v in state.items() if k not in taken):
        found = _find(nameless, value)
        if found is None:
            entry = graph.metadata_props.add()
            entry.key, entry.value = LEFTOVER + key, base64.b64encode(value.tobytes()).decode()
            continue
        initializer, suffix = found
        nameless.remove(initializer)
        _rename(graph.graph, initializer.name, key + suffix)


def read(file: Path, module: nn.Module, partial: bool = False) -> None:
    """Load a graph's weights into the module that it was exported from; `partial` leaves as it is what the graph lacks.

    Raises ValueError, naming the weight, for one that is missing or of another shape.
    """
    graph = onnx.load(file)
    found = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    kept = {e.key: base64.b64decode(e.value) for e in graph.metadata_props}
    state: dict[str, Tensor] = {}
    for key, own in module.state_dict().items():
        if key in found:
            value = found[key]
        elif key + TRANSPOSED in found:
            value = found[key + TRANSPOSED].T
        elif LEFTOVER + key in kept:
            value = _shaped(np.frombuffer(kept[LEFTOVER + key], np.float32), own)
        elif partial:
            log.info("%s holds no weight %s", file.parent.parent.name, key)
            value = own.numpy()
        else:
            raise ValueError(f"{file.name} holds no weight {key}: export it with training.export")
        if _squeezed(value.shape) != _squeezed(own.shape):
            raise ValueError(f"{file.name} holds weight {key} as {value.shape}, not as {tuple(own.shape)}")
        state[key] = torch.from_numpy(value.reshape(own.shape).copy())
    module.load_state_dict(state)


def _shaped(flat: np.ndarray, own: Tensor) -> np.ndarray:
    """Flat values in a tensor's shape, where there are as many; else as they are."""
    return flat.reshape(own.shape) if flat.size == own.numel() else flat


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its ones, which exporters add and drop."""
    return tuple(edge for edge in shape if edge != 1)


def _find(initializers: list[onnx.TensorProto], value: np.ndarray) -> tuple[onnx.TensorProto, str] | None:
    for initializer in initializers:
        if int(np.prod(initializer.dims)) != value.size:
            continue
        array = numpy_helper.to_array(initializer)
        if array.dtype != value.dtype:
            continue
        if _squeezed(array.shape) == _squeezed(value.shape) and np.array_equal(array.ravel(), value.ravel()):
            return initializer, ""
        if value.ndim == 2 and array.shape == value.T.shape and np.array_equal(array, value.T):
            return initializer, TRANSPOSED
    return None


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for initializer in graph.initializer:
        if initializer.name == old:
            initializer.name = new
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new
