"""Lower an fp32 OpenVINO model to bf16 where that is cheap in error, and nowhere else.

OpenVINO's own precision hint lowers whole graphs: on a diffusion transformer it costs 1 to 20% of the output, most of
it in the timestep's sinusoids. Here linear layers and convolutions multiply in bf16, between explicit converts; sums
are fp32 inside the kernels, and the residual stream, norms and all else stay fp32. So do

- layers without a token axis (rank 2: timestep embedding and adaLN modulation), unless experts picked the tokens;
- products of two activations that do not lie between such layers alone (matching): their operands may be coordinates;
- routers (a layer whose output goes to a softmax or top-k): rounding would flip choices;
- the first and last layers on every path: they see raw inputs, make raw outputs, and cost little.

Constants are folded first: an exported graph picks each expert's weights from a stack, and adds zero to the router's
logits; unfolded, neither is seen for what it is. And what lies between linear layers and nowhere else is in bf16 too:

- SiLU, GELU, a gate's product, a bias: the next layer would round it anyway, and without converts around it OpenVINO
  computes it inside the layer's kernel, in fp32, and rounds once;
- attention: queries, keys and values bear the rounding of the layer that made them already, and the layer behind rounds
  what they come to. OpenVINO fuses both products and the softmax, with logits and sums in fp32 (`docs/roof.md` has the
  errors, by the size of the logits).

The first and last layers of a branch (`If`) stay fp32 as those of a graph do.

`Convert` in OpenVINO 2026 adds half a unit to odd mantissas only, so it shrinks values by 0.14% on average, and that
adds up over layers. So weights are rounded to nearest here, and a convolution's input by Veltkamp's splitting (2.4% ->
0.6% error in a 13-layer encoder); for linear layers the splitting costs more than it gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = np.float32((2 - 2**-7) * 2.0**127)
"""That bf16 can hold."""
_ATTENTION = {"MatMul", "Softmax"}
_MOVES = {"Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Transpose", "Unsqueeze", "VariadicSplit"}
_BETWEEN = {"Add", "Gelu", "Multiply", "Sigmoid", "Swish"} | _ATTENTION | _MOVES
_ROUTES = {"Softmax", "LogSoftmax", "TopK"}
_THROUGH = {"Add", "Subtract", "Multiply", "Divide", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Convert"}


def narrow(model: Any) -> int:
    """Edit the ov.Model in place, branches included; how many layers now multiply in bf16."""
    _fold(model)
    order = model.get_ordered_ops()
    branches = [body for op in order if op.get_type_name() == "If" for body in (op.get_then_body(), op.get_else_body())]
    within = sum(map(narrow, branches))
    picked = _downstream(order, {op.get_name() for op in order if op.get_type_name() == "NonZero"})
    layers = [op for op in order if _is_convolution(op) or _is_linear(op, op.get_name() in picked)]
    inner = _inner(order, {op.get_name() for op in layers})
    lowered = inner | _between(order, {op.get_name() for op in layers if not _is_convolution(op)} & inner)
    for op in order:
        if op.get_name() in lowered:
            _lower(op, lowered)
    model.validate_nodes_and_infer_types()
    return len(inner) + within


def _fold(model: Any) -> None:
    """Compute what constants alone decide."""
    from openvino.passes import ConstantFolding, Manager

    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)


def _is_convolution(op: Any) -> bool:
    return op.get_type_name() == "Convolution" and _is_constant(op.input_value(1))


def _is_linear(op: Any, picked: bool) -> bool:
    if op.get_type_name() != "MatMul" or not _is_constant(op.input_value(1)):
        return False
    rank = op.input_value(0).get_partial_shape().rank
    return rank.is_static and (rank.get_length() >= 3 or picked) and not _is_router(op)


def _is_router(op: Any) -> bool:
    """Whether the output reaches a softmax or top-k through nothing but shapes and constants."""
    for consumer in op.output(0).get_target_inputs():
        node = consumer.get_node()
        kind = node.get_type_name()
        if kind in _ROUTES:
            return True
        others = [value for index, value in enumerate(node.input_values()) if index != consumer.get_index()]
        if kind in _THROUGH and (kind == "Reshape" or all(map(_is_constant, others))) and _is_router(node):
            return True
    return False


def _is_constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def _downstream(order: Iterable[Any], names: set[str]) -> set[str]:
    """Names of the operations that depend on one of `names`; `order` is topological."""
    reached: set[str] = set()
    for op in order:
        sources = {value.get_node().get_name() for value in op.input_values()}
        if sources & (names | reached):
            reached.add(op.get_name())
    return reached


def _inner(order: list[Any], layers: set[str]) -> set[str]:
    """The layers with another layer before them and another behind."""
    leads: set[str] = set()
    for op in reversed(order):
        if op.get_name() in layers | leads:
            leads |= {value.get_node().get_name() for value in op.input_values()}
    return layers & leads & _downstream(order, layers)


def _between(order: list[Any], layers: set[str]) -> set[str]:
    """Activations, products, biases and attention whose values come from `layers` alone, and go to `layers` alone."""
    passing = [op for op in order if op.get_type_name() in _BETWEEN and op.get_name() not in layers]
    passing = [op for op in passing if not _has_weights(op) and (op.get_type_name() != "Softmax" or _attends(op))]
    around = {op.get_name(): _sources(op) | _consumers(op) for op in passing}
    found = set(around)
    while strays := {name for name in found if not around[name] <= found | layers}:
        found -= strays
    return found


def _has_weights(op: Any) -> bool:
    """Whether it is a product that was not lowered for a layer, as that of a router or with a grid of coordinates."""
    return op.get_type_name() == "MatMul" and any(map(_is_constant, op.input_values()))


def _attends(softmax: Any) -> bool:
    """Whether it is between two products of activations; a gate's or a router's is not."""
    before = softmax.input_value(0).get_node()
    while before.get_type_name() in {"Add", "Multiply"} | _MOVES:
        before = before.input_value(0).get_node()
    behind = [consumer.get_node() for consumer in softmax.output(0).get_target_inputs()]
    return all(op.get_type_name() == "MatMul" and not _has_weights(op) for op in (before, *behind))


def _sources(op: Any) -> set[str]:
    values = [value for value in op.input_values() if _is_real(value) and not _is_constant(value)]
    return {value.get_node().get_name() for value in values}


def _consumers(op: Any) -> set[str]:
    return {consumer.get_node().get_name() for output in op.outputs() for consumer in output.get_target_inputs()}


def _is_real(value: Any) -> bool:
    """Not sizes, axes and the like."""
    return bool(value.get_element_type().is_real())


def _lower(op: Any, lowered: set[str]) -> None:
    """In bf16 what comes from elsewhere than `lowered`, in fp32 what goes elsewhere."""
    from openvino import opset13 as ops

    for port in op.inputs():
        value = port.get_source_output()
        if _is_real(value) and value.get_node().get_name() not in lowered:
            port.replace_source_output(_narrowed(value, op))
    op.validate_and_infer_types()
    for output in op.outputs():
        elsewhere = [port for port in output.get_target_inputs() if port.get_node().get_name() not in lowered]
        if elsewhere:
            product = ops.convert(output, "f32").output(0)
            for port in elsewhere:
                port.replace_source_output(product)


def _narrowed(value: Any, op: Any) -> Any:
    """A factor of `op` in bf16."""
    from openvino import Tensor, Type
    from openvino import opset13 as ops
    from openvino.op import Constant

    if not _is_constant(value):
        return ops.convert(_split(value) if _is_convolution(op) else value, "bf16").output(0)
    weight = value.get_node().get_data()
    halves = (nearest(weight).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return Constant(Tensor(halves, list(weight.shape), Type.bf16), shared_memory=False).output(0)


def _split(value: Any) -> Any:
    """The value rounded to bf16's 8 significant bits, in fp32 arithmetic (Veltkamp, Dekker 1971)."""
    from openvino import opset13 as ops

    big = ops.multiply(value, ops.constant(np.float32(2**16 + 1))).output(0)
    return ops.subtract(big, ops.subtract(big, value)).output(0)


def nearest(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers that bf16 can hold, ties to even, as float32; a scalar as one of [1]. Finite ones stay so:
    masks hold the least number of fp32."""
    weight = np.where(np.isfinite(weight), np.clip(weight, -LARGEST, LARGEST), weight)
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
