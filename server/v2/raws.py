"""The raw graphs of the model in service: what each takes and gives, what is checked, and its way through the lane."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig

from saccade.backends import Ticket
from saccade.backends.graphs import Part, names
from saccade.backends.pace import Kind
from saccade.backends.triton import Signature, Wire
from saccade.card import Card
from saccade.repository import Repository
from server.admission import DECODE_STEPS, ENCODE_STEPS, MEMBER_PIXEL_BYTES, UNIT_PIXELS
from server.model import Model
from server.v2.tensors import DATATYPES, Arrays, Call, refused

PLATFORM = "onnxruntime_onnx"
MOST_PIXELS = 1 << 22
MOST_SIZES = 64
KINDS: dict[Part, Kind] = {"encoder": "encode", "denoiser": "denoise", "decoder": "decode"}
_STEPS: dict[Part, int] = {"encoder": ENCODE_STEPS, "denoiser": 1, "decoder": DECODE_STEPS}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Raw:
    """One graph, under its own name, as its `config.pbtxt` describes it."""

    part: Part
    version: str
    config: ModelConfig
    signature: Signature
    given: Mapping[str, Wire]

    @property
    def name(self) -> str:
        return self.signature.model

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": PLATFORM,
            "inputs": _ports(self.signature.taken),
            "outputs": _ports(self.given),
        }

    def sent(self, results: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs under their names and in their shapes on the wire."""
        return {
            wire.name: results[name] if wire.dims is None else results[name].reshape(-1, *wire.dims)
            for name, wire in self.given.items()
        }

    def configuration(self) -> dict[str, Any]:
        """As Triton writes it: `config.pbtxt` with its defaults, as JSON."""
        return plain(self.config) | {"platform": PLATFORM, "default_model_filename": "model.onnx"}


def _ports(wires: Mapping[str, Wire]) -> list[dict[str, Any]]:
    types = {here: there for there, here in DATATYPES.items()}
    return [
        {"name": wire.name, "datatype": types[wire.port.dtype], "shape": [-1, *_sizes(wire)]} for wire in wires.values()
    ]


def _sizes(wire: Wire) -> tuple[int, ...]:
    """Sizes on the wire, without the batch."""
    return wire.port.dims[1:] if wire.dims is None else wire.dims


def read(repository: Repository, card: Card) -> dict[str, Raw]:
    """The card's three models by name. Raises ModelError."""
    raws = {}
    for part, name in names(card).items():
        config = repository.config(name)
        config.name = name
        signature = Signature.of(config)
        told = card.conditioning if part == "encoder" and card.conditioning else signature.given
        seen = {key: wire for key, wire in signature.given.items() if key in told}
        raws[name] = Raw(part, repository.graph(name).parent.name, config, signature, seen)
    return raws


class Raws:
    """The graphs of one model, and calls to them through its lane, the same as everybody's.

    Every input is checked before it comes to a batch: engines trust shapes and labels. What the conditioning must look
    like is what the encoder makes of a picture of that size; sizes that it has made are remembered.
    """

    def __init__(self, model: Model, raws: Mapping[str, Raw], most_edge: int) -> None:
        latent = model.card.latent
        self.raws = raws
        self._card, self._lane = model.card, model.stepping
        self._most_edge = -(-most_edge // latent.multiple) * latent.multiple
        self._seen: OrderedDict[tuple[int, int], Shapes] = OrderedDict()

    def feeds(self, raw: Raw, call: Call) -> dict[str, NDArray[Any]]:
        """The call's inputs as the graph takes them: [B, ...]. Raises Problem 400."""
        for name in call.inputs:
            if name not in {wire.name for wire in raw.signature.taken.values()}:
                raise refused(f"unexpected inference input {name!r} for model {raw.name!r}")
        for name in call.outputs:
            if name not in {wire.name for wire in raw.given.values()}:
                raise refused(f"unexpected inference output {name!r} for model {raw.name!r}")
        feeds = {name: _feed(raw, wire, call) for name, wire in raw.signature.taken.items()}
        rows = {name: len(value) for name, value in feeds.items()}
        most = raw.signature.max_batch_size
        if len(set(rows.values())) > 1 or not 1 <= max(rows.values()) <= most:
            raise refused(f"all inputs of {raw.name!r} must have the same number of rows, 1 to {most}; given: {rows}")
        self._check_values(raw, feeds)
        self._check_sizes(raw, feeds)
        return feeds

    def cost(self, raw: Raw, feeds: Arrays) -> float:
        """In the unit of admission; the first call of the denoiser at a size costs a picture's encoding too."""
        height, width = self._size(feeds)
        learning = raw.part == "denoiser" and (height, width) not in self._seen
        steps = len(next(iter(feeds.values()))) * _STEPS[raw.part] + (ENCODE_STEPS if learning else 0)
        return steps * height * width / UNIT_PIXELS

    def footprint(self, feeds: Arrays) -> int:
        """Bytes that the call takes at its height: a row is to memory what a member of an answer is."""
        height, width = self._size(feeds)
        rows = len(next(iter(feeds.values())))
        return MEMBER_PIXEL_BYTES * rows * height * width + sum(value.nbytes for value in feeds.values())

    async def run(self, raw: Raw, feeds: Arrays, ticket: Ticket) -> dict[str, NDArray[Any]]:
        """Every output by name. Raises ModelError, BackendUnavailable, and Problem 400 for conditioning that does not
        fit."""
        match raw.part:
            case "encoder":
                seen = await self._encode(feeds, ticket)
                return dict(seen)
            case "denoiser":
                conditioning = await self._conditioning(feeds, ticket)
                latent, timestep, task = feeds["latent"], feeds["timestep"], feeds["task"]
                return {"prediction": await self._lane.denoise(latent, timestep, task, conditioning, ticket)}
            case "decoder":
                return {"picture": await self._lane.decode(feeds["latent"], ticket)}

    async def _encode(self, feeds: Arrays, ticket: Ticket) -> Arrays:
        seen = await self._lane.encode(feeds["image"], feeds["prompt"], feeds["task"], ticket)
        self._seen[self._size(feeds)] = {name: value.shape[1:] for name, value in seen.items()}
        while len(self._seen) > MOST_SIZES:
            self._seen.popitem(last=False)
        return seen

    async def _conditioning(self, feeds: Arrays, ticket: Ticket) -> Arrays:
        size = self._size(feeds)
        if size not in self._seen:
            picture = np.zeros((1, 3, *size), np.float32)
            await self._encode({"image": picture, "prompt": picture, "task": feeds["task"][:1]}, ticket)
        wanted = self._seen[size]
        for name in self._card.conditioning:
            if feeds[name].shape[1:] != wanted[name]:
                told = f"{list(feeds[name].shape[1:])} where a latent of {list(feeds['latent'].shape[1:])}"
                raise refused(f"input {name!r} is {told} goes with {list(wanted[name])}")
        return {name: feeds[name] for name in self._card.conditioning}

    def _size(self, feeds: Arrays) -> tuple[int, int]:
        """(H, W) of the picture, which for latents is the one that they stand for."""
        if "image" in feeds:
            height, width = feeds["image"].shape[2:]
            return height, width
        height, width = feeds["latent"].shape[2:]
        return height * self._card.latent.stride, width * self._card.latent.stride

    def _check_values(self, raw: Raw, feeds: Arrays) -> None:
        allowed = {
            "task": self._card.labels,
            "timestep": set(range(self._card.noise.timesteps)),
        }
        for name, value in feeds.items():
            if value.dtype == np.float32 and not np.isfinite(value).all():
                raise refused(f"input {name!r} of {raw.name!r} has values that are not finite")
            if name in allowed and not set(value.tolist()) <= allowed[name]:
                most = max(allowed[name])
                raise refused(f"input {name!r} of {raw.name!r} must be one of those that the model knows, 0 to {most}")

    def _check_sizes(self, raw: Raw, feeds: Arrays) -> None:
        multiple, most = self._card.latent.multiple, self._most_edge
        height, width = self._size(feeds)
        if "prompt" in feeds and feeds["prompt"].shape != feeds["image"].shape:
            raise refused(f"prompt and image of {raw.name!r} must be of one shape")
        if height % multiple or width % multiple or not (multiple <= min(height, width) <= max(height, width) <= most):
            edges = f"edges of {multiple} to {most} px in steps of {multiple}, not {width} x {height}"
            cell = f"a latent's cell stands for {self._card.latent.stride} px"
            raise refused(f"{raw.name!r} works on pictures with {edges} ({cell})")
        if (pixels := len(next(iter(feeds.values()))) * height * width) > MOST_PIXELS:
            raise refused(f"the batch stands for {pixels} pixels, and {MOST_PIXELS} are the most: send fewer rows")


def _feed(raw: Raw, wire: Wire, call: Call) -> NDArray[Any]:
    """One input with the model's own sizes. Raises Problem 400."""
    if wire.name not in call.inputs:
        raise refused(f"input {wire.name!r} of model {raw.name!r} is missing")
    value, datatype, sizes = call.inputs[wire.name], call.datatypes[wire.name], _sizes(wire)
    if DATATYPES[datatype] != wire.port.dtype:
        wanted = next(there for there, here in DATATYPES.items() if here == wire.port.dtype)
        raise refused(f"input {wire.name!r} of model {raw.name!r} is {datatype} where {wanted} belongs")
    found = value.shape[1:]
    if len(found) != len(sizes) or any(w not in (-1, f) for w, f in zip(sizes, found, strict=True)):
        raise refused(f"input {wire.name!r} of model {raw.name!r} is {list(value.shape)} where {[-1, *sizes]} belongs")
    return value if wire.dims is None else value.reshape(len(value), *wire.port.dims[1:])


def plain(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON, with its own field names, defaults, and whole numbers as numbers."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            of = entry.fields_by_name["value"]
            found[field.name] = {key: _plain(of, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            found[field.name] = [_plain(field, one) for one in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _plain(field, value)
    return found


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value.hex() if isinstance(value, bytes) else value
