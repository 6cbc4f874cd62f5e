"""A gRPC server that speaks Triton's protocol in this process, runs the toy, and fails on command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import onnxruntime
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from saccade.backends.triton import Signature
from saccade.repository import Repository

Failure = tuple[grpc.StatusCode, str]


class FakeTriton(GRPCInferenceServiceServicer):
    """Serves `repository`. `failures`: model -> what its next inferences come to, oldest first; `silent`: no answer is
    given until it is unset. `calls` counts inferences by model, `left` those whose caller gave up.
    """

    def __init__(self, repository: Path) -> None:
        self.repository = Repository(repository)
        self.loaded = set(self.repository.models())
        self.failures: dict[str, list[Failure]] = {}
        self.load_failure: Failure | None = None
        self.silent = False
        self.draining = False
        self.calls: list[str] = []
        self.commands: list[str] = []
        self.left = 0
        self.url = ""

    async def ServerLive(self, request, context):
        if self.draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Server exiting")
        return messages.ServerLiveResponse(live=True)

    async def RepositoryIndex(self, request, context):
        return messages.RepositoryIndexResponse(models=[{"name": name, "state": "READY"} for name in self.loaded])

    async def ModelConfig(self, request, context):
        await self._known(request.name, context)
        return messages.ModelConfigResponse(config=self.repository.config(request.name))

    async def RepositoryModelLoad(self, request, context):
        self.commands.append(f"load {request.model_name}")
        if self.load_failure:
            await context.abort(*self.load_failure)
        self.loaded.add(request.model_name)
        return messages.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request, context):
        self.commands.append(f"unload {request.model_name}")
        self.loaded.discard(request.model_name)
        return messages.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request, context):
        name = request.model_name
        self.calls.append(name)
        await self._known(name, context)
        try:
            while self.silent:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.left += 1
            raise
        if self.failures.get(name):
            await context.abort(*self.failures[name].pop(0))
        signature = Signature.of(self.repository.config(name))
        session = onnxruntime.InferenceSession(str(self.repository.graph(name)))
        answer = messages.ModelInferResponse(model_name=name)
        for port, value in zip(session.get_outputs(), session.run(None, _feeds(signature, request)), strict=True):
            answer.outputs.add(name=port.name, datatype="FP32", shape=value.shape)
            answer.raw_output_contents.append(value.tobytes())
        return answer

    async def _known(self, name: str, context: grpc.aio.ServicerContext) -> None:
        if name not in self.loaded:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")


def _feeds(signature: Signature, request: messages.ModelInferRequest) -> dict[str, object]:
    import numpy as np

    kinds = {"FP32": np.float32, "INT64": np.int64}
    feeds = {}
    for given, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        value = np.frombuffer(raw, kinds[given.datatype]).reshape(tuple(given.shape))
        feeds[given.name] = value if signature.taken[given.name].dims is None else value[:, 0]
    return feeds


@asynccontextmanager
async def serving(fake: FakeTriton, port: int = 0) -> AsyncIterator[FakeTriton]:
    server = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(fake, server)
    fake.url = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(0)
