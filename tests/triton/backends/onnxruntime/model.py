"""Stands in for Triton's ONNX Runtime backend: serves any model whose configuration says `backend: "onnxruntime"`.

It runs inside the server's Python backend, in an environment of its own (NumPy 1, onnxruntime), and imports nothing of
this project. Like the real one it runs all requests that the scheduler hands over as one batch.

For tests of faults a file named `fault` in the model's directory is looked at before every batch:
`slow SECONDS`, `nan`, `shape`, `silent` (no response is sent), `error`, `crash` (the process ends).
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.folder = Path(args["model_repository"])
        config = json.loads(args["model_config"])
        self.inputs = [port["name"] for port in config["input"]]
        self.outputs = [port["name"] for port in config["output"]]
        self.run = self.open(self.folder / args["model_version"])

    def open(self, version):
        """The graph as a function from named arrays to the outputs in order."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(version / "model.onnx"), options, ["CPUExecutionProvider"])
        return lambda feeds: session.run(self.outputs, feeds)

    def execute(self, requests):
        fault, _, detail = self.fault().partition(" ")
        if fault == "crash":
            os._exit(1)
        if fault == "slow":
            time.sleep(float(detail))
        if fault == "silent":
            return [None for _ in requests]
        if fault == "error":
            return [self.failure() for _ in requests]
        return self.answer(requests, fault)

    def failure(self):
        """An error of its own for every request: this server crashes where two share one."""
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"cannot open {self.folder}/1/model.onnx"))

    def answer(self, requests, fault):
        feeds = [{name: array(request, name) for name in self.inputs} for request in requests]
        rows = [len(feed[self.inputs[0]]) for feed in feeds]
        results = self.run({name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs})
        ends = np.cumsum(rows)
        return [self.response(results, end - count, end, fault) for count, end in zip(rows, ends, strict=True)]

    def response(self, results, begin, end, fault):
        tensors = []
        for name, value in zip(self.outputs, results, strict=True):
            own = np.ascontiguousarray(value[begin:end])
            if fault == "nan":
                own = np.full_like(own, np.nan)
            if fault == "shape":
                own = np.ascontiguousarray(own[..., :-1])
            tensors.append(pb_utils.Tensor(name, own))
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def fault(self):
        try:
            return (self.folder / "fault").read_text().strip()
        except OSError:
            return ""


def array(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
