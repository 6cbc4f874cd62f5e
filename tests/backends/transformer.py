"""A small diffusion transformer (adaLN-Zero's shape, random weights) as ONNX, dense or mixture of experts."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from tests.toy import CONDITIONING, LATENT, Graph, labels, maps


def transformer(width: int, depth: int, heads: int, experts: int = 0, seed: int = 0) -> onnx.ModelProto:
    """The toy's denoiser interface: latent, timestep, task and two conditioning latents -> prediction; patch 2."""
    g = Build(seed, width, heads)
    seen = g.node("Concat", "latent", *CONDITIONING, axis=1)
    patches = g.node(
        "Conv",
        seen,
        g.normal(width, 3 * LATENT, 2, 2, scale=(12 * LATENT) ** -0.5),
        kernel_shape=[2, 2],
        strides=[2, 2],
    )
    grid = g.node("Slice", g.node("Shape", patches), g.integers(2), g.integers(4))
    x = g.node("Transpose", g.node("Reshape", patches, g.integers(0, width, -1)), perm=[0, 2, 1])
    told = g.silu(g.told())
    for _ in range(depth):
        x = g.block(x, told, experts)
    patch = g.linear(g.modulated(x, told, 2)[0], width, 4 * LATENT)
    shape = g.node("Concat", g.integers(0, 4 * LATENT), grid, axis=0)
    planes = g.node("Reshape", g.node("Transpose", patch, perm=[0, 2, 1]), shape)
    g.node("DepthToSpace", planes, output="prediction", blocksize=2)
    inputs = [maps("latent", LATENT, "h", "w"), labels("timestep"), labels("task")]
    inputs += [maps(name, LATENT, "h", "w") for name in CONDITIONING]
    return g.model(inputs, [maps("prediction", LATENT, "h", "w")])


class Build(Graph):
    def __init__(self, seed: int, width: int, heads: int) -> None:
        super().__init__(seed)
        self.width, self.heads = width, heads

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def linear(self, x: str, inner: int, outer: int, gain: float = 1) -> str:
        return self.node("Add", self.node("MatMul", x, self.normal(inner, outer, scale=gain * inner**-0.5)),
                         self.normal(outer, scale=0.02))  # fmt: skip

    def silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def told(self) -> str:
        """Timestep and task [B] -> [B, width]: 256 sines and cosines, an MLP, a label's embedding."""
        column = self.node("Unsqueeze", self.node("Cast", "timestep", to=TensorProto.FLOAT), self.integers(1))
        frequencies = np.exp(-np.log(10000.0) * np.arange(128) / 128)[None].astype(np.float32)
        angles = self.node("Mul", column, self.constant(frequencies))
        waves = self.node("Concat", self.node("Cos", angles), self.node("Sin", angles), axis=1)
        hidden = self.silu(self.linear(waves, 256, self.width))
        task = self.node("Gather", self.normal(3, self.width), "task")
        return self.node("Add", self.linear(hidden, self.width, self.width), task)

    def modulated(self, x: str, told: str, count: int) -> list[str]:
        """LayerNorm of x, scaled and shifted by what the timestep says; then the remaining `count` - 2 gates."""
        parts = [self.node("Unsqueeze", self.linear(told, self.width, self.width, 0.3), self.integers(1))
                 for _ in range(count)]  # fmt: skip
        centred = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1]))
        variance = self.node("ReduceMean", self.node("Mul", centred, centred), axes=[-1])
        norm = self.node("Div", centred, self.node("Sqrt", self.node("Add", variance, self.number(1e-6))))
        scaled = self.node("Mul", norm, self.node("Add", parts[0], self.number(1)))
        return [self.node("Add", scaled, parts[1]), *parts[2:]]

    def block(self, x: str, told: str, experts: int) -> str:
        seen, gate = self.modulated(x, told, 3)
        x = self.node("Add", x, self.node("Mul", gate, self.attention(seen)))
        seen, gate = self.modulated(x, told, 3)
        return self.node("Add", x, self.node("Mul", gate, self.mixture(seen, experts) if experts else self.mlp(seen)))

    def attention(self, x: str) -> str:
        edge = self.width // self.heads
        split = self.node(
            "Reshape", self.linear(x, self.width, 3 * self.width), self.integers(0, 0, 3, self.heads, edge)
        )
        turned = self.node("Transpose", split, perm=[2, 0, 3, 1, 4])
        q, k, v = (self.node("Gather", turned, self.constant(np.array(i, np.int64)), axis=0) for i in range(3))
        scores = self.node("MatMul", self.node("Mul", q, self.number(edge**-0.5)),
                           self.node("Transpose", k, perm=[0, 1, 3, 2]))  # fmt: skip
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        joined = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), self.integers(0, 0, self.width))
        return self.linear(joined, self.width, self.width)

    def mlp(self, x: str) -> str:
        hidden = self.linear(x, self.width, 4 * self.width)
        half = self.node("Mul", hidden, self.number(0.5))
        erf = self.node("Erf", self.node("Mul", hidden, self.number(0.5**0.5)))
        gelu = self.node("Mul", half, self.node("Add", erf, self.number(1)))
        return self.linear(gelu, 4 * self.width, self.width)

    def mixture(self, x: str, experts: int) -> str:
        """Softmax over all experts, the best two, not renormalised; each expert sees its tokens alone."""
        tokens = self.node("Reshape", x, self.integers(-1, self.width))
        logits = self.node("MatMul", tokens, self.normal(self.width, experts, scale=self.width**-0.5))
        weights, chosen = f"weights{len(self.nodes)}", f"chosen{len(self.nodes)}"
        self.nodes.append(
            onnx.helper.make_node("TopK", [self.node("Softmax", logits, axis=-1), self.integers(2)], [weights, chosen])
        )
        out = self.node("Sub", tokens, tokens)
        for expert in range(experts):
            mine = self.node("Cast", self.node("Equal", chosen, self.integers(expert)), to=TensorProto.FLOAT)
            weight = self.node("ReduceSum", self.node("Mul", weights, mine), self.integers(1), keepdims=0)
            rows = self.node("Transpose", self.node("NonZero", weight), perm=[1, 0])
            picked = self.node("GatherND", tokens, rows)
            answer = self.node("Mul", self.mlp(picked), self.node("Unsqueeze", self.node("GatherND", weight, rows),
                                                                  self.integers(1)))  # fmt: skip
            out = self.node("ScatterND", out, rows, answer, reduction="add")
        return self.node("Reshape", out, self.node("Shape", x))
