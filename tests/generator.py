"""A class-conditional generator of a few KB without any task: its graphs can be asked raw, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from saccade.card import Card
from saccade.repository import Tensor, sha256, write_config
from tests.toy import Graph, decoder, describe, labels, maps

LATENT, STRIDE, CLASSES = 8, 8, 5
NAME = "generator"


def build(path: Path) -> Path:
    """Write the repository into `path` and return it."""
    graphs = {f"{NAME}-encoder": encoder(), NAME: denoiser(), f"{NAME}-decoder": decoder()}
    for model, graph in graphs.items():
        file = path / model / "1" / "model.onnx"
        file.parent.mkdir(parents=True)
        onnx.save(graph, file)
    digests = {model: sha256(path / model / "1" / "model.onnx") for model in graphs}
    facts = describe(NAME, 100) | {"tasks": {}, "classes": CLASSES, "conditioning": [], "quality": []}
    facts["digests"] = digests
    task, timestep = Tensor("task", (), "INT64"), Tensor("timestep", (), "INT64")
    pictures = [Tensor("image", (3, -1, -1)), Tensor("prompt", (3, -1, -1)), task]
    seen, latent, prediction = (
        Tensor(key, (LATENT, -1, -1), cell=STRIDE) for key in ("image_latent", "latent", "prediction")
    )
    write_config(path, f"{NAME}-encoder", pictures, [seen], 16, warm_up_px=64)
    write_config(path, NAME, [latent, timestep, task], [prediction], 16, Card.model_validate(facts), warm_up_px=64)
    write_config(path, f"{NAME}-decoder", [latent], [Tensor("picture", (4, -1, -1))], 16, warm_up_px=64)
    return path


def encoder() -> onnx.ModelProto:
    g = Graph(1)
    pooled = g.node("AveragePool", "image", kernel_shape=[STRIDE, STRIDE], strides=[STRIDE, STRIDE])
    g.node("Tanh", g.conv(pooled, 3, LATENT), output="image_latent")
    return g.model([maps("image", 3), maps("prompt", 3), labels("task")], [maps("image_latent", LATENT, "h", "w")])


def denoiser() -> onnx.ModelProto:
    """The latent, moved by its class."""
    g = Graph(2)
    table = g.constant(np.arange(CLASSES * LATENT, dtype=np.float32).reshape(CLASSES, -1))
    told = g.per_sample(g.node("Gather", table, "task"))
    g.node("Add", "latent", told, output="prediction")
    inputs = [maps("latent", LATENT, "h", "w"), labels("timestep"), labels("task")]
    return g.model(inputs, [maps("prediction", LATENT, "h", "w")])
