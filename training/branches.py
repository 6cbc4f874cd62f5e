"""What only some tasks need is computed only where one of them is asked for.

A module that serves several tasks writes `torch.where(task == flow, a, b)`, and an exported graph computes both sides
for every sample. Here such a choice becomes a branch of the graph: the work behind `a` that nothing else needs is done
if any sample of the batch takes `a`. A batch answers the same, mixed or not.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto, helper

HEAVY = {"Conv", "MatMul", "Gemm"}
WORTHWHILE = 4
"""Heavy operations in a branch."""


def split(model: onnx.ModelProto, chooser: str) -> int:
    """Edit the graph in place: how many branches it has now, each for one condition on the input `chooser` [B].

    Of a `Where` that becomes part of a branch, the third input must have the shape of the result, which is float32; one
    with a constant there is left alone.
    """
    graph, made = model.graph, 0
    masks, constant = set(_decided(graph, chooser)), _constant(graph)
    for mask in dict.fromkeys(node.input[0] for node in graph.node if node.op_type == "Where"):
        if mask not in masks:
            continue
        wheres = [node for node in graph.node if node.op_type == "Where" and node.input[0] == mask]
        wheres = [node for node in wheres if node.input[2] not in constant]
        work = _only_for(graph, wheres) if _apart(graph, wheres) else []
        if sum(node.op_type in HEAVY for node in work) >= WORTHWHILE:
            _branch(graph, mask, wheres, work)
            made += 1
    return made


def _constant(graph: onnx.GraphProto) -> set[str]:
    made = {output for node in graph.node if node.op_type == "Constant" for output in node.output}
    return made | {value.name for value in graph.initializer}


def _decided(graph: onnx.GraphProto, chooser: str) -> Iterator[str]:
    """What follows from `chooser` and constants alone."""
    constant, known = _constant(graph), {chooser}
    for node in graph.node:
        if known.intersection(node.input) and known | constant >= set(node.input):
            known.update(node.output)
            yield from node.output


def _apart(graph: onnx.GraphProto, wheres: list[NodeProto]) -> bool:
    """Whether none of `wheres` follows from another: only then can one branch hold them all."""
    chosen = {output for node in wheres for output in node.output}
    reached = set(chosen)
    for node in graph.node:
        if reached & _inputs(node):
            if chosen.intersection(node.output):
                return False
            reached.update(node.output)
    return True


def _only_for(graph: onnx.GraphProto, wheres: list[NodeProto]) -> list[NodeProto]:
    """The nodes, in order, whose outputs nothing needs but each other and the second inputs of `wheres`."""
    needed = {value.name for value in graph.output}
    wanted = {node.input[1] for node in wheres}
    first = {id(node) for node in wheres}
    found: list[NodeProto] = []
    for node in reversed(graph.node):
        if id(node) in first:
            needed.update((node.input[0], node.input[2]))
        elif needed.intersection(node.output) or not wanted.intersection(node.output):
            needed.update(_inputs(node))
        else:
            found.append(node)
            wanted.update(_inputs(node))
    return found[::-1]


def _inputs(node: NodeProto) -> set[str]:
    """Of the node and of the branches inside it."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            found |= _inputs(inner)
    return found


def _branch(graph: onnx.GraphProto, mask: str, wheres: list[NodeProto], work: list[NodeProto]) -> None:
    """`work` and `wheres` into the one branch, what `wheres` have otherwise into the other."""
    then, otherwise = f"{mask}_then", f"{mask}_else"
    chosen = [
        helper.make_node("Where", node.input, [f"{output}_then"], name=node.name)
        for node in wheres for output in node.output
    ]  # fmt: skip
    left = [helper.make_node("Identity", [node.input[2]], [f"{node.output[0]}_else"]) for node in wheres]
    branch = helper.make_node(
        "If",
        [f"{mask}_any"],
        [node.output[0] for node in wheres],
        then_branch=helper.make_graph([*work, *chosen], then, [], _floats(chosen)),
        else_branch=helper.make_graph(left, otherwise, [], _floats(left)),
    )
    gone = {id(node) for node in (*work, *wheres)}
    kept = [node for node in graph.node if id(node) not in gone]
    nodes = _in_order([*kept, *_any(mask), branch])
    del graph.node[:]
    graph.node.extend(nodes)


def _any(mask: str) -> list[NodeProto]:
    """Whether a mask holds anywhere, as `mask`_any."""
    return [
        helper.make_node("Cast", [mask], [f"{mask}_number"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", [f"{mask}_number"], [f"{mask}_most"], keepdims=0),
        helper.make_node("Cast", [f"{mask}_most"], [f"{mask}_any"], to=TensorProto.BOOL),
    ]


def _floats(nodes: list[NodeProto]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes]


def _in_order(nodes: list[NodeProto]) -> list[NodeProto]:
    """Every node behind those whose outputs it needs, and else as they were."""
    made = {output for node in nodes for output in node.output}
    ready: set[str] = set()
    sorted_: list[NodeProto] = []
    waiting = nodes
    while waiting:
        later = []
        for node in waiting:
            if (_inputs(node) & made) <= ready:
                sorted_.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError("nodes that need each other's outputs")
        waiting = later
    return sorted_
