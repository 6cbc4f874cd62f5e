"""One module to one file, ONNX or TorchScript, and the proof that the file computes what the module does."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir
from torch import Tensor, nn

from saccade.errors import ModelError
from training import branches
from training.servable import Part, Servable, Size
from training.weights import name_initializers

log = logging.getLogger(__name__)
OPSET = 20
TORCHSCRIPT = "model.pt"
EXTERNAL_ABOVE = 1536 * 2**20
"""Bytes of weights that still fit one protobuf file with the graph around them: 2 GB is its end, and PyTorch's exporter
moves constants of more than this out by itself."""


def write_onnx(
    servable: Servable, part: Part, file: Path, largest_batch: int, external_above: int = EXTERNAL_ABOVE
) -> None:
    """One graph; its weights inside it, or beside it in <file>.data where they are too many."""
    module = servable.module(part)
    file.parent.mkdir(parents=True, exist_ok=True)
    names, outputs = servable.names[part]
    external = _bytes(module) > external_above
    with torch.no_grad(), _quietly():
        program = torch.onnx.export(
            module, servable.examples(2, 96, 128, 0)[part], input_names=names, output_names=outputs,
            dynamic_shapes=servable.dynamic_shapes(largest_batch)[part], dynamo=True, opset_version=OPSET,
            optimize=False, verbose=False,
        )  # fmt: skip
        assert program is not None
        _simplify(program.model)
        program.save(file, external_data=external)
    graph = onnx.load(file, load_external_data=False)
    forget_origin(graph)
    if not any(value.data_location == onnx.TensorProto.EXTERNAL for value in graph.graph.initializer):
        name_initializers(graph, module.state_dict())
    branches.split(graph, "task")
    file.write_bytes(graph.SerializeToString())


def _simplify(model: ir.Model) -> None:
    """In place: the exporter's own optimisation without onnxscript's rewriting rules, which take a third of an export
    and spare one node of a hundred."""
    fold_constants_ir(model, onnx_shape_inference=True)
    for simplify in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        simplify(model)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of its own innards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def forget_origin(graph: onnx.ModelProto) -> None:
    """Traces of source files are nobody's business; shapes between the nodes are inferred by engines."""
    for node in graph.graph.node:
        del node.metadata_props[:]
    for value in (*graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]
    del graph.graph.metadata_props[:]
    del graph.graph.value_info[:]
    for function in graph.functions:
        for node in function.node:
            del node.metadata_props[:]


def write_torchscript(servable: Servable, part: Part, file: Path) -> None:
    """One traced module."""
    file.parent.mkdir(parents=True, exist_ok=True)
    module = servable.module(part)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: `verify` finds out, at other sizes, what they only suspect
        torch.jit.save(torch.jit.trace(module, servable.examples(2, 96, 128, 0)[part], check_trace=False), file)


def verify(servable: Servable, part: Part, file: Path) -> None:
    """Raises ModelError where the file disagrees with eager torch on fresh inputs of one of the servable's sizes."""
    runner = _runner(servable, part, file)
    for size in servable.sizes:
        error = disagreement(servable, part, runner, size)
        batch, height, width = size
        log.info("%s at %d x %d x %d: %.1e of a deviation from eager", part, batch, height, width, error)
        if not error <= servable.tolerance:
            raise ModelError(f"{part}: the exported graph is {error:.1e} off at batch {batch}, {height} x {width}")


def disagreement(servable: Servable, part: Part, file: Path | Any, size: Size, seed: int | None = None) -> float:
    """Error of a file (or of what `_runner` made of it) against eager torch, relative to the output's deviation; NaN
    stays, and outputs of other shapes are infinitely wrong.

    A root mean square over each sample, the worst one's: where the tracker is misled, it carries rounding far at single
    places, and the order of additions is an engine's own.
    """
    run = _runner(servable, part, file) if isinstance(file, Path) else file
    inputs = servable.examples(*size, seed=size[1] if seed is None else seed)[part]
    with torch.no_grad():
        theirs, ours = (_outputs(answer) for answer in (run(inputs), servable.module(part)(*inputs)))
    pairs = list(zip(theirs, ours, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    errors = [np.sqrt(np.square(a - b).reshape(len(b), -1).mean(1).max()) / (b.std() + 1e-6) for a, b in pairs]
    return float(np.max(errors))


def _runner(servable: Servable, part: Part, file: Path) -> Any:
    """inputs -> outputs, by the file."""
    if file.name == TORCHSCRIPT:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.export is what torch wants, and not Triton
            script = torch.jit.load(file)
        return lambda inputs: script(*inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names, outputs = servable.names[part]

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(map(torch.from_numpy, session.run(outputs, feeds)))

    return run


def _outputs(answer: Any) -> list[np.ndarray]:
    return [value.numpy() for value in (answer if isinstance(answer, tuple) else (answer,))]
