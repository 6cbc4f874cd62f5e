"""A whole model repository of a few KB, made with onnx.helper: all three tasks, fixed random weights, no torch.

The denoiser really depends on latent, timestep, task and both pictures, so answers move when any of them does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from saccade.card import Card
from saccade.repository import Tensor, sha256, write_config

Fault = Literal["none", "nan", "shape", "batch"]
LATENT, PLANES, STRIDE, MULTIPLE = 8, 4, 8, 16
LABELS = {"depth": 2, "flow": 0, "amodal": 1}
CONDITIONING = ["image_latent", "prompt_latent"]


def build(
    path: Path, *, name: str = "toy", fault: Fault = "none", width: int = 16, card: dict[str, Any] | None = None
) -> Path:
    """Write the repository into `path` and return it.

    `fault` makes the denoiser answer NaN for timesteps below 500 ("nan"), with a channel too few ("shape") or with one
    sample for the whole batch ("batch"). `width` is its hidden width, and so its cost. `card` replaces fields of
    the card.
    """
    graphs = {
        f"{name}-encoder": encoder(),
        name: denoiser(fault, width),
        f"{name}-decoder": decoder(),
    }
    for model, graph in graphs.items():
        file = path / model / "1" / "model.onnx"
        file.parent.mkdir(parents=True)
        onnx.save(graph, file)
    facts = describe(name, sum(map(parameters, graphs.values())))
    facts["digests"] = {model: sha256(path / model / "1" / "model.onnx") for model in graphs}
    write(path, name, Card.model_validate(facts | (card or {})))
    return path


def write(path: Path, name: str, card: Card) -> None:
    """The three configurations."""
    task, timestep = Tensor("task", (), "INT64"), Tensor("timestep", (), "INT64")
    pictures = [Tensor("image", (3, -1, -1)), Tensor("prompt", (3, -1, -1)), task]
    seen = [Tensor(key, (LATENT, -1, -1), cell=STRIDE) for key in CONDITIONING]
    latent, prediction = (Tensor(key, (LATENT, -1, -1), cell=STRIDE) for key in ("latent", "prediction"))
    write_config(path, f"{name}-encoder", pictures, seen, 16, warm_up_px=64)
    write_config(path, name, [latent, timestep, task, *seen], [prediction], 16, card, warm_up_px=64)
    write_config(path, f"{name}-decoder", [latent], [Tensor("picture", (PLANES, -1, -1))], 16, warm_up_px=64)


def describe(name: str, count: int) -> dict[str, Any]:
    """The card's fields, but for the digests."""

    def defaults(reduction: str, steps: int) -> dict[str, Any]:
        return {"steps": steps, "ensemble_size": 1, "reduction": reduction, "processing_resolution": 64}

    return {
        "name": name,
        "summary": "A toy with random weights: it runs, it's tiny, and it sees nothing.",
        "licence": "Apache-2.0",
        "parameters": count,
        "encoder": f"{name}-encoder",
        "decoder": f"{name}-decoder",
        "conditioning": CONDITIONING,
        "tasks": {
            "depth": {"label": LABELS["depth"], "defaults": defaults("median", 2)},
            "flow": {"label": LABELS["flow"], "defaults": defaults("mean", 2)},
            "amodal": {"label": LABELS["amodal"], "coding": {"context": 0.5}, "defaults": defaults("mean", 3)},
        },
        "latent": {"channels": LATENT, "stride": STRIDE, "scale": 0.5, "multiple": MULTIPLE},
        "noise": {"schedule": "cosine", "zero_terminal_snr": True, "prediction": "v_prediction"},
        "training": {"data": [], "samples": 0, "wall_clock_s": 0, "device": "none: weights are random"},
        "quality": [
            {"task": "depth", "steps": 2, "ensemble_size": 1, "metric": "abs_rel", "value": 1.0, "pictures": 0,
             "set": "none"},
        ],
    }  # fmt: skip


class Graph:
    """Nodes and weights of one ONNX graph, as they come."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value, f"w{len(self.weights)}"))
        return f"w{len(self.weights) - 1}"

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((self.random.standard_normal(shape) * scale).astype(np.float32))

    def node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def conv(self, x: str, c_in: int, c_out: int, kernel: int = 1) -> str:
        weight = self.normal(c_out, c_in, kernel, kernel, scale=(c_in * kernel * kernel) ** -0.5)
        pads = [kernel // 2] * 4
        return self.node("Conv", x, weight, self.normal(c_out, scale=0.1), pads=pads, kernel_shape=[kernel, kernel])

    def per_sample(self, vector: str) -> str:
        """[B, C] -> [B, C, 1, 1]."""
        return self.node("Unsqueeze", vector, self.constant(np.array([2, 3], np.int64)))

    def model(self, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "toy", inputs, outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


def maps(name: str, channels: int, height: str = "H", width: str = "W") -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", channels, height, width])


def labels(name: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["B"])


def encoder() -> onnx.ModelProto:
    """Mean of 8x8 patches, mixed into latents; the prompt's latents know the task."""
    g = Graph(1)
    for source, target in zip(("image", "prompt"), CONDITIONING, strict=True):
        pooled = g.node("AveragePool", source, kernel_shape=[STRIDE, STRIDE], strides=[STRIDE, STRIDE])
        mixed = g.conv(pooled, 3, LATENT)
        task = g.per_sample(g.node("Gather", g.normal(3, LATENT, scale=0.3), "task"))
        g.node("Tanh", g.node("Add", mixed, task) if source == "prompt" else mixed, output=target)
    inputs = [maps("image", 3), maps("prompt", 3), labels("task")]
    return g.model(inputs, [maps(name, LATENT, "h", "w") for name in CONDITIONING])


def denoiser(fault: Fault = "none", width: int = 16) -> onnx.ModelProto:
    """tanh(conv(silu(conv(latent, pictures) + timestep + task))), times 2."""
    g = Graph(2)
    mixed = g.conv(g.node("Concat", "latent", *CONDITIONING, axis=1), 3 * LATENT, width, 3)
    told = g.node("Add", g.node("MatMul", timestep(g), g.normal(8, width, scale=0.5)),
                  g.node("Gather", g.normal(3, width, scale=0.7), "task"))  # fmt: skip
    hidden = g.node("Add", mixed, g.per_sample(told))
    hidden = g.node("Mul", hidden, g.node("Sigmoid", hidden))
    bounded = g.node("Tanh", g.conv(hidden, width, LATENT, 3))
    output = g.node("Mul", bounded, g.constant(np.array(2, np.float32)))
    if fault == "nan":
        late = g.node("Less", "timestep", g.constant(np.array(500, np.int64)))
        late = g.node("Unsqueeze", late, g.constant(np.array([1, 2, 3], np.int64)))
        output = g.node("Where", late, g.constant(np.array(np.nan, np.float32)), output)
    elif fault == "shape":
        output = g.conv(output, LATENT, LATENT - 1)
    elif fault == "batch":
        output = g.node("ReduceMean", output, axes=[0], keepdims=1)
    g.node("Identity", output, output="prediction")
    inputs = [maps("latent", LATENT, "h", "w"), labels("timestep"), labels("task")]
    inputs += [maps(name, LATENT, "h", "w") for name in CONDITIONING]
    channels = LATENT - 1 if fault == "shape" else LATENT
    prediction = helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["N", channels, "h", "w"])
    return g.model(inputs, [prediction])


def timestep(g: Graph) -> str:
    """Timestep [B] -> sines and cosines [B, 8]."""
    column = g.node("Unsqueeze", g.node("Cast", "timestep", to=TensorProto.FLOAT), g.constant(np.array([1], np.int64)))
    angles = g.node("Mul", column, g.constant((10.0 ** -np.arange(4))[None].astype(np.float32)))
    return g.node("Concat", g.node("Sin", angles), g.node("Cos", angles), axis=1)


def decoder() -> onnx.ModelProto:
    """Latents mixed into planes, enlarged eightfold."""
    g = Graph(3)
    mixed = g.node("Tanh", g.conv("latent", LATENT, PLANES))
    scales = g.constant(np.array([1, 1, STRIDE, STRIDE], np.float32))
    g.node("Resize", mixed, "", scales, output="picture", mode="linear",
           coordinate_transformation_mode="half_pixel")  # fmt: skip
    return g.model([maps("latent", LATENT, "h", "w")], [maps("picture", PLANES)])


def parameters(graph: onnx.ModelProto) -> int:
    """Learnt numbers of a graph."""
    floats = (w for w in graph.graph.initializer if w.data_type == TensorProto.FLOAT)
    return sum(int(np.prod(w.dims)) for w in floats)
