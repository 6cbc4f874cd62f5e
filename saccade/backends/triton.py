"""Run a model in Triton, over gRPC."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.grpc.service_pb2 import (
    ModelConfigRequest,
    ModelInferRequest,
    ModelInferResponse,
    RepositoryIndexRequest,
    RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest,
)

from saccade.backends import Ticket
from saccade.backends.endpoints import Endpoint, Endpoints, Fault, Kind
from saccade.backends.graphs import Feeds, Graphs, Part, Port, Results, names
from saccade.card import PARAMETER, Card
from saccade.errors import BackendTimeout, BackendUnavailable, ModelError
from saccade.repository import check_name, only, read_card

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 4
LOAD_TIMEOUT_S = 300.0
PROBE_PX, PROBE_TIMEOUT_S = 64, 5.0
_WIRE = {"float32": "FP32", "int64": "INT64"}
_TYPES = {DataType.TYPE_FP32: "float32", DataType.TYPE_INT64: "int64"}
_INDEX = re.compile(r"__\d+$")  # LibTorch's tensors are called name__index


@dataclass(frozen=True)
class Wire:
    """How a tensor travels: its name there, and its sizes without the batch where they differ from the model's."""

    name: str
    port: Port
    dims: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Signature:
    """A model's configuration as `Ports`, and how its tensors travel."""

    model: str
    max_batch_size: int
    taken: Mapping[str, Wire]
    given: Mapping[str, Wire]

    @property
    def inputs(self) -> Mapping[str, Port]:
        return {name: wire.port for name, wire in self.taken.items()}

    @property
    def outputs(self) -> Mapping[str, Port]:
        return {name: wire.port for name, wire in self.given.items()}

    @classmethod
    def of(cls, config: ModelConfig) -> Signature:
        """Raises ModelError for a model without a batch dimension."""
        if config.max_batch_size < 1:
            raise ModelError(f"{config.name} does no batches: its max_batch_size must be 1 or more")
        taken, given = (dict(map(_wire, side)) for side in (config.input, config.output))
        return cls(config.name, config.max_batch_size, taken, given)

    def request(self, feeds: Feeds) -> ModelInferRequest:
        """Named arrays [B, ...] as a message."""
        request = ModelInferRequest(model_name=self.model)
        for name, wire in self.taken.items():
            value = feeds[name]
            shape = value.shape if wire.dims is None else (len(value), *wire.dims)
            request.inputs.add(name=wire.name, datatype=_WIRE[wire.port.dtype], shape=shape)
            request.raw_input_contents.append(np.ascontiguousarray(value).tobytes())
        return request

    def results(self, response: ModelInferResponse) -> Results:
        """A message as named arrays of their own; outputs that we do not know are left out. Raises ModelError."""
        known = {wire.name: (name, wire) for name, wire in self.given.items()}
        results: Results = {}
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
            if output.name in known:
                name, wire = known[output.name]
                results[name] = self._array(wire, output, raw)
        return results

    def _array(self, wire: Wire, output: Any, raw: bytes) -> NDArray[Any]:
        types = {there: here for here, there in _WIRE.items()}
        try:
            value = np.frombuffer(raw, types[output.datatype]).reshape(tuple(output.shape))
            return value if wire.dims is None else value.reshape(len(value), *wire.port.dims[1:])
        except (KeyError, ValueError) as error:
            told = f"{len(raw)} bytes as {output.datatype} {list(output.shape)}"
            raise ModelError(f"{self.model} produced {output.name} of {told}") from error


def _wire(tensor: Any) -> tuple[str, Wire]:
    """A configuration's input or output -> its name for us, and how it travels."""
    own = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else tuple(tensor.dims)
    port = Port((-1, *own), _TYPES.get(tensor.data_type, DataType.Name(tensor.data_type)))
    dims = tuple(tensor.dims) if tensor.HasField("reshape") else None
    if dims is not None and -1 in dims:
        raise ModelError(f"{tensor.name} is reshaped from sizes that are not fixed")
    return _INDEX.sub("", tensor.name), Wire(tensor.name, port, dims)


class Triton(Graphs):
    """One model behind every endpoint that has it.

    A call goes to the endpoint with the fewest calls in hand, has `timeout_s` for everything, and is withdrawn there
    when it is cancelled here. Every part is a pure function, so a call that an endpoint lost is made again, rather at
    another one; one that ran out of time, or that no endpoint can run, is not.

    Raises BackendTimeout and BackendUnavailable for what may pass, ModelError for what will not. What Triton says goes
    to the log alone, for it names files of its machine.
    """

    def __init__(
        self, endpoints: Endpoints, card: Card, signatures: Mapping[Part, Signature], *, timeout_s: float
    ) -> None:
        super().__init__(card, signatures)
        self._endpoints, self._signatures, self._timeout_s = endpoints, signatures, timeout_s

    @classmethod
    async def connect(cls, urls: Sequence[str], model: str | None = None, *, timeout_s: float = 10.0) -> Self:
        """Find the model, None for the only one there is, and let it answer a tiny inference.

        `urls`: host:port of gRPC endpoints that serve one repository. Where Triton has not loaded the model yet, it is
        told to. Raises ModelError if it is not there or not in order, BackendUnavailable if no endpoint can be asked.
        """
        if model is not None:
            check_name(model)
        endpoints = Endpoints(urls)

        async def attempt(endpoint: Endpoint) -> tuple[Self, Endpoint]:
            card, signatures = await _read(endpoint, model or await _sole(endpoint, timeout_s), timeout_s)
            made = cls(endpoints, card, signatures, timeout_s=timeout_s)
            await made._probe(endpoint)
            return made, endpoint

        made: Self
        try:
            made, first = await _first([attempt(endpoint) for endpoint in await endpoints.resolve()])
        except BaseException:
            await endpoints.aclose()
            raise
        endpoints.trust(first)  # the others have yet to show that they serve the same
        endpoints.start(made._examine)
        return made

    @property
    def states(self) -> dict[str, str]:
        """Address -> up, loading or gone."""
        return {address: state.value for address, state in self._endpoints.states.items()}

    async def run(self, part: Part, feeds: Feeds, ticket: Ticket) -> Results:
        self.check_feeds(part, feeds)
        self._check_rows(part, feeds)
        signature = self._signatures[part]
        results = signature.results(await self._infer(part, signature.request(feeds)))
        self.check_results(part, feeds, results)
        return results

    async def aclose(self) -> None:
        """Calls in hand are given up, later ones refused. Triton keeps its models: other gateways may use them."""
        await self._endpoints.aclose()

    def _check_rows(self, part: Part, feeds: Feeds) -> None:
        rows, most = len(next(iter(feeds.values()))), self._signatures[part].max_batch_size
        if rows > most:
            raise ModelError(f"the {part} of {self.card.name} takes {most} rows at once, not {rows}: lower batch_size")

    async def _infer(self, part: Part, request: ModelInferRequest) -> ModelInferResponse:
        """One answer from whichever endpoint can give it."""
        until = time.monotonic() + self._timeout_s
        tried: list[Endpoint] = []
        while True:
            endpoint = await self._endpoints.choose(tried, until, self._timeout_s)
            left_s = until - time.monotonic()
            try:
                return await endpoint.call("ModelInfer", request, left_s)
            except Fault as fault:
                log.warning("%s at %s: %s (%s)", request.model_name, endpoint.address, fault, fault.told)
                tried.append(endpoint)
                if fault.kind is Kind.LATE and left_s < self._timeout_s / 2:
                    pass  # it was given what others had left over
                elif fault.kind not in (Kind.BUSY, Kind.FAILED):
                    self._endpoints.suspect(endpoint, fault.kind)
                if len(tried) == ATTEMPTS or not self._may_help(fault.kind, tried):
                    raise self._error(part, fault) from None

    def _may_help(self, kind: Kind, tried: Sequence[Endpoint]) -> bool:
        """Whether another attempt may: after some faults only elsewhere, after a deadline nowhere."""
        if kind in (Kind.BUSY, Kind.FAILED):
            return self._endpoints.has_other(tried)
        return kind is not Kind.LATE

    def _error(self, part: Part, fault: Fault) -> BackendUnavailable | ModelError:
        if fault.kind is Kind.FAILED:
            return ModelError(f"the {part} of {self.card.name} failed to run")
        if fault.kind is Kind.LATE:
            return BackendTimeout(f"Triton did not answer within {self._timeout_s:g} s", retry_after_s=5.0)
        if fault.kind is Kind.BUSY:
            return BackendUnavailable("Triton's queue is full", retry_after_s=2.0)
        return BackendUnavailable("Triton lost the call, again and again", retry_after_s=2.0)

    async def _examine(self, endpoint: Endpoint) -> None:
        """Whether the endpoint serves this very model, and can. Raises Fault and ModelError."""
        card, signatures = await _read(endpoint, self.card.name, self._timeout_s)
        if (card.digest, signatures) != (self.card.digest, self._signatures):
            raise ModelError(f"it serves another {self.card.name} than the one that was opened")
        await self._probe(endpoint)

    async def _probe(self, endpoint: Endpoint) -> None:
        """A tiny inference through all three parts, there and nowhere else; one that is missing there, or has died, is
        loaded first. Raises Fault and ModelError.
        """

        async def run(part: Part, feeds: Feeds) -> Results:
            signature = self._signatures[part]
            results = signature.results(await self._mended(endpoint, signature.request(feeds)))
            self.check_results(part, feeds, results)
            return results

        latent = self.card.latent
        edge = -(-PROBE_PX // latent.multiple) * latent.multiple
        picture = np.zeros((1, 3, edge, edge), np.float32)
        noise = np.zeros((1, latent.channels, edge // latent.stride, edge // latent.stride), np.float32)
        task = np.array([min(self.card.labels)], np.int64)
        timestep = np.array([self.card.noise.timesteps - 1], np.int64)
        seen = await run("encoder", {"image": picture, "prompt": picture, "task": task})
        conditioning = {name: seen[name] for name in self.card.conditioning}
        await run("denoiser", {"latent": noise, "timestep": timestep, "task": task, **conditioning})
        await run("decoder", {"latent": noise})

    async def _mended(self, endpoint: Endpoint, request: ModelInferRequest) -> ModelInferResponse:
        timeout_s = min(self._timeout_s, PROBE_TIMEOUT_S)
        try:
            return await endpoint.call("ModelInfer", request, timeout_s)
        except Fault as fault:
            if fault.kind not in (Kind.CRASHED, Kind.LOADING):
                raise
            if fault.kind is Kind.CRASHED:  # to Triton the model is there, and loading alone would leave it as it is
                await _unload(endpoint, request.model_name)
        await _load(endpoint, request.model_name)
        return await endpoint.call("ModelInfer", request, timeout_s)


async def _read(endpoint: Endpoint, name: str, timeout_s: float) -> tuple[Card, dict[Part, Signature]]:
    """A model as the endpoint has it. Raises Fault and ModelError."""
    card = read_card(await _config(endpoint, name, timeout_s), name)
    parts = names(card)
    for model in parts.values():
        check_name(model)
    configs = await asyncio.gather(*(_config(endpoint, model, timeout_s) for model in parts.values()))
    return card, dict(zip(parts, map(Signature.of, configs), strict=True))


async def _config(endpoint: Endpoint, model: str, timeout_s: float) -> ModelConfig:
    """The model's configuration, as Triton has it; what is not loaded yet is loaded. Raises Fault and ModelError."""
    request = ModelConfigRequest(name=model)
    try:
        return (await endpoint.call("ModelConfig", request, timeout_s)).config
    except Fault as fault:
        if fault.kind is not Kind.LOADING:
            raise
    await _load(endpoint, model)
    return (await endpoint.call("ModelConfig", request, timeout_s)).config


async def _load(endpoint: Endpoint, model: str) -> None:
    """Raises ModelError if Triton cannot load the model or must not be told to, Fault if it cannot be asked."""
    try:
        await endpoint.call("RepositoryModelLoad", RepositoryModelLoadRequest(model_name=model), LOAD_TIMEOUT_S)
    except Fault as fault:
        log.warning("%s at %s is not loaded: %s", model, endpoint.address, fault.told)
        if "not allowed" in fault.told:
            told = "and must not be told to load it: run it with --model-control-mode=explicit"
            raise ModelError(f"Triton does not have {model} {told}") from None
        if fault.kind is Kind.FAILED:
            raise ModelError(f"Triton has no model {model} that it can load") from None
        raise


async def _unload(endpoint: Endpoint, model: str) -> None:
    await endpoint.call("RepositoryModelUnload", RepositoryModelUnloadRequest(model_name=model), LOAD_TIMEOUT_S)


async def _sole(endpoint: Endpoint, timeout_s: float) -> str:
    """The only model that carries a card, of those that are loaded. Raises Fault and ModelError."""
    index = await endpoint.call("RepositoryIndex", RepositoryIndexRequest(ready=True), timeout_s)
    loaded = sorted({entry.name for entry in index.models})
    configs = [(await endpoint.call("ModelConfig", ModelConfigRequest(name=n), timeout_s)).config for n in loaded]
    return only([config.name for config in configs if PARAMETER in config.parameters], "Triton")


async def _first(attempts: Sequence[Coroutine[Any, Any, T]]) -> T:
    """What the first attempt that succeeds comes to. Raises ModelError if one did, else BackendUnavailable."""
    tasks = [asyncio.create_task(attempt) for attempt in attempts]
    refusals: list[ModelError] = []
    faults: list[Fault] = []
    try:
        for finished in asyncio.as_completed(tasks):
            try:
                return await finished
            except ModelError as error:
                refusals.append(error)
            except Fault as fault:
                log.info("Triton cannot be used yet: %s (%s)", fault, fault.told)
                faults.append(fault)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if refusals:
        raise refusals[0]
    told = f": {faults[0]}" if faults else ": its name cannot be looked up"
    raise BackendUnavailable(f"Triton cannot be used{told}", retry_after_s=2.0)
