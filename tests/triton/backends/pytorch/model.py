"""Stands in for Triton's LibTorch backend: serves any model whose configuration says `backend: "pytorch"`.

As LibTorch's does, it gives the TorchScript file its inputs by the place behind their names (`latent__0`), and names
the outputs likewise. torch comes from the environment of whoever started the server.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(os.environ["STAND_IN_TORCH"])  # behind everything else: NumPy must be this environment's own

import torch


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.inputs = sorted((port["name"] for port in config["input"]), key=place)
        self.outputs = sorted((port["name"] for port in config["output"]), key=place)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.module = torch.jit.load(Path(args["model_repository"]) / args["model_version"] / "model.pt")

    def execute(self, requests):
        feeds = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
            for request in requests
        ]
        with torch.inference_mode():
            results = self.module(*(torch.from_numpy(np.concatenate(column)) for column in zip(*feeds, strict=True)))
        arrays = [value.numpy() for value in (results if isinstance(results, tuple) else (results,))]
        rows = [len(feed[0]) for feed in feeds]
        return [self.response(arrays, end - count, end) for count, end in zip(rows, np.cumsum(rows), strict=True)]

    def response(self, arrays, begin, end):
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(value[begin:end]))
            for name, value in zip(self.outputs, arrays, strict=True)
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def place(name):
    return int(name.rpartition("__")[2])
