"""Branches of exported graphs: the same answers, and the work that nobody asks for is not done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper

from saccade.backends.engines import OpenVino, open_engine
from tests.toy import Graph
from training import branches

DEEP = 5


def two_eyed() -> onnx.ModelProto:
    """[n, 3, 8], task [n] -> x + what task 1 alone needs + what task 2 alone needs, and twice what task 1 needs."""
    g = Graph(3)

    def chosen(label: int, depth: int) -> tuple[str, str]:
        mask = g.node("Unsqueeze", g.node("Equal", "task", g.constant(np.array(label))), g.constant(np.array([1, 2])))
        made = "x"
        for _ in range(depth):
            made = g.node("Tanh", g.node("MatMul", made, g.normal(8, 8)))
        return mask, made

    nothing = g.node("Mul", "x", g.constant(np.array(0, np.float32)))
    moved, deep = chosen(1, DEEP)
    once, twice = (g.node("Where", moved, value, nothing) for value in (deep, g.node("Add", deep, deep)))
    shaped, shallow = chosen(2, 1)
    g.node("Add", g.node("Add", "x", once), g.node("Where", shaped, shallow, nothing), output="y")
    g.node("Identity", twice, output="z")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8]) for name in ("x", "y", "z")]
    return g.model([ports[0], helper.make_tensor_value_info("task", TensorProto.INT64, ["n"])], ports[1:])


def kinds(nodes: list[NodeProto]) -> list[str]:
    return [node.op_type for node in nodes]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same function, as it was and with a branch."""
    folder = tmp_path_factory.mktemp("branches")
    plain, split = two_eyed(), two_eyed()
    assert branches.split(split, "task") == 1
    for name, model in (("plain", plain), ("split", split)):
        onnx.save(model, folder / f"{name}.onnx")
    return folder / "plain.onnx", folder / "split.onnx"


def test_what_one_task_alone_needs_is_in_its_branch_if_it_is_much(both: tuple[Path, Path]) -> None:
    graph = onnx.load(both[1]).graph
    (branch,) = [node for node in graph.node if node.op_type == "If"]
    inner = next(attribute.g for attribute in branch.attribute if attribute.name == "then_branch")
    assert kinds(inner.node).count("MatMul") == DEEP
    assert kinds(graph.node).count("MatMul") == 1  # that of task 2, which is little
    assert kinds(graph.node).count("Where") == 1


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("tasks", [[0], [1], [2], [0, 2, 0], [0, 1, 2], [1, 1]])
def test_a_batch_answers_the_same_with_branches(both: tuple[Path, Path], engine: str, tasks: list[int]) -> None:
    given = {
        "x": np.random.default_rng(0).standard_normal((len(tasks), 3, 8)).astype(np.float32),
        "task": np.array(tasks),
    }
    plain, split = (open_engine(file, engine, "fp32", 1).run(given) for file in both)
    for name in ("y", "z"):
        assert np.allclose(plain[name], split[name], atol=1e-6)


def test_layers_in_a_branch_multiply_in_bf16_too(both: tuple[Path, Path]) -> None:
    plain, split = (OpenVino(file, "bf16", 1) for file in both)
    assert plain.lowered == split.lowered == DEEP - 2  # neither the first nor the last
    given = {"x": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32), "task": np.array([0, 1])}
    assert np.allclose(plain.run(given)["y"], split.run(given)["y"], atol=1e-6)


def test_a_batch_without_the_task_does_not_do_its_work(tmp_path: Path) -> None:
    """ONNX Runtime's profile names every node that ran."""
    model = two_eyed()
    branches.split(model, "task")

    def ran(task: int) -> int:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / f"task{task}")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        session.run(None, {"x": np.ones((1, 3, 8), np.float32), "task": np.array([task])})
        return Path(session.end_profiling()).read_text().count('"op_name" : "MatMul"')

    assert ran(1) - ran(0) >= DEEP


def test_a_graph_split_once_is_not_split_again() -> None:
    model = two_eyed()
    assert [branches.split(model, "task") for _ in range(2)] == [1, 0]


def test_choices_by_anything_else_are_left_alone() -> None:
    model = two_eyed()
    before = model.SerializeToString()
    assert branches.split(model, "timestep") == 0
    assert model.SerializeToString() == before


def test_a_choice_of_a_constant_is_left_alone() -> None:
    """Its shape may not be that of the result."""
    g = Graph(3)
    deep = "x"
    for _ in range(DEEP):
        deep = g.node("MatMul", deep, g.normal(8, 8))
    mask = g.node("Unsqueeze", g.node("Equal", "task", g.constant(np.array(1))), g.constant(np.array([1])))
    g.node("Where", mask, deep, g.constant(np.array(0, np.float32)), output="y")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y"))
    model = g.model([x, helper.make_tensor_value_info("task", TensorProto.INT64, ["n"])], [y])
    assert branches.split(model, "task") == 0


def test_choices_that_follow_from_one_another_are_left_alone() -> None:
    g = Graph(3)
    mask = g.node("Unsqueeze", g.node("Equal", "task", g.constant(np.array(1))), g.constant(np.array([1])))
    made = "x"
    for _ in range(2):
        deep = made
        for _ in range(DEEP):
            deep = g.node("MatMul", deep, g.normal(8, 8))
        made = g.node("Where", mask, deep, made)
    g.node("Identity", made, output="y")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y"))
    model = g.model([x, helper.make_tensor_value_info("task", TensorProto.INT64, ["n"])], [y])
    assert branches.split(model, "task") == 0
