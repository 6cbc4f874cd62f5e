"""What every backend shares that runs a model as its three graphs: the feeds of each, and the checks around a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.card import Card
from saccade.errors import ModelError

Part = Literal["encoder", "denoiser", "decoder"]
Feeds = Mapping[str, NDArray[Any]]
Results = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: its sizes with the batch first, -1 where free, and its NumPy type's name."""

    dims: tuple[int, ...]
    dtype: str


class Ports(Protocol):
    """What a graph takes and gives."""

    @property
    def inputs(self) -> Mapping[str, Port]: ...

    @property
    def outputs(self) -> Mapping[str, Port]: ...


_PICTURE, _LABEL = Port((-1, -1, -1, -1), "float32"), Port((-1,), "int64")


def names(card: Card) -> dict[Part, str]:
    """The model of each part."""
    return {"encoder": card.encoder, "denoiser": card.name, "decoder": card.decoder}


class Graphs(ABC):
    """The protocol `Backend` for whoever can `run` the parts. Raises ModelError if card and ports disagree."""

    def __init__(self, card: Card, ports: Mapping[Part, Ports]) -> None:
        check_card(card, ports)
        self.card = card
        self._ports = ports

    @abstractmethod
    async def run(self, part: Part, feeds: Feeds, ticket: Ticket) -> Results:
        """Every input by name -> every output by name, both as `check_feeds` and `check_results` have them."""

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        results = await self.run("encoder", {"image": image, "prompt": prompt, "task": task}, ticket)
        return {name: results[name] for name in self.card.conditioning or results}

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        feeds: Feeds = {"latent": latent, "timestep": timestep, "task": task, **conditioning}
        return (await self.run("denoiser", feeds, ticket))["prediction"]

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return (await self.run("decoder", {"latent": latent}, ticket))["picture"]

    def check_feeds(self, part: Part, feeds: Feeds) -> None:
        """Raises ModelError. OpenVINO reads past the end of an input that does not fit, so none may reach it."""
        rows = len(next(iter(feeds.values())))
        for name, port in self._ports[part].inputs.items():
            given = Port(feeds[name].shape, feeds[name].dtype.name) if name in feeds else None
            if given is None or not _fits(Port((rows, *port.dims[1:]), port.dtype), given):
                told = "nothing" if given is None else _told(given)
                raise ModelError(f"the {part} of {self.card.name} was given {told} as {name}, a {_told(port)}")

    def check_results(self, part: Part, feeds: Feeds, results: Results) -> None:
        """Raises ModelError for outputs that are missing, of the wrong shape, or not finite."""
        for name in self._ports[part].outputs:
            if name not in results:
                raise ModelError(f"the {part} of {self.card.name} produced no {name}")
            value, wanted = results[name], self._shape(part, name, feeds)
            if value.ndim != len(wanted) or any(w not in (-1, s) for w, s in zip(wanted, value.shape, strict=True)):
                told = f"{list(value.shape)} where {list(wanted)} belongs"
                raise ModelError(f"the {part} of {self.card.name} produced {name} of shape {told}")
            if not np.isfinite(value).all():
                raise ModelError(f"the {part} of {self.card.name} produced non-finite values")

    def _shape(self, part: Part, name: str, feeds: Feeds) -> tuple[int, ...]:
        """What an output's shape must be, -1 where anything goes."""
        if part == "encoder":
            return (len(feeds["task"]), *self._ports[part].outputs[name].dims[1:])
        batch, channels, height, width = feeds["latent"].shape
        if part == "denoiser":
            return batch, channels, height, width
        return batch, -1, height * self.card.latent.stride, width * self.card.latent.stride


def check_card(card: Card, ports: Mapping[Part, Ports]) -> None:
    """The graphs must take and give what the card says. Raises ModelError that names graph and tensor."""
    encoded = ports["encoder"].outputs
    seen = {name: encoded[name] for name in card.conditioning if name in encoded}
    latent = Port((-1, card.latent.channels, -1, -1), "float32")
    pictures = {"image": _PICTURE, "prompt": _PICTURE, "task": _LABEL}
    noisy = {"latent": latent, "timestep": _LABEL, "task": _LABEL}
    _agree(card.encoder, "input", pictures, ports["encoder"].inputs)
    _agree(card.encoder, "output", dict.fromkeys(card.conditioning) | seen, encoded)
    _agree(card.name, "input", noisy | seen, ports["denoiser"].inputs)
    _agree(card.name, "output", {"prediction": latent}, ports["denoiser"].outputs)
    _agree(card.decoder, "input", {"latent": latent}, ports["decoder"].inputs)
    _agree(card.decoder, "output", {"picture": _PICTURE}, ports["decoder"].outputs)


def _agree(model: str, side: str, wanted: Mapping[str, Port | None], found: Mapping[str, Port]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelError(f"{model} has no {side} {', '.join(missing)}; it has {', '.join(found)}")
    unknown = [name for name in found if name not in wanted]
    if unknown and side == "input":
        raise ModelError(f"{model} wants {', '.join(unknown)}, which nothing provides")
    for name, port in wanted.items():
        if port is not None and not _fits(port, found[name]):
            raise ModelError(f"{model}: {side} {name} is {_told(found[name])} where {_told(port)} belongs")


def _fits(wanted: Port, found: Port) -> bool:
    sizes = zip(wanted.dims, found.dims, strict=False)
    return (
        len(wanted.dims) == len(found.dims)
        and wanted.dtype == found.dtype
        and all(w == f or -1 in (w, f) for w, f in sizes)
    )


def _told(port: Port) -> str:
    return f"{port.dtype} {list(port.dims)}"
