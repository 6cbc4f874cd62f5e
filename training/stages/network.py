"""Which transformer a stage trains: a name of the papers and what differs from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from saccade.errors import InvalidInput
from training.config import explained
from training.models.dit import DiTConfig, named
from training.models.moe import Experts
from training.models.routing import Routing


@dataclass(frozen=True)
class ModelConfig:
    """`model = "a1"` is short for `model = {name = "a1"}`."""

    name: str = explained("size: a1 to a6, S/2 to XL/8, S/2-8E2A, S/2-16E2A, L/2-8E2A", "a1")
    width: int | None = explained("channels of a token; none: the name's", None)
    heads: int | None = explained("heads of attention; none: the name's", None)
    depth: int | None = explained("blocks; none: the name's", None)
    patch: int | None = explained("edge of a patch in latent cells; none: the name's", None)
    grid: int | None = explained("tokens along an edge at which positions are 0, 1, 2, ...; none: 16", None)
    experts: Experts | None = explained("experts in place of every MLP; none: the name's", None)
    routing: Routing | None = explained("Denoising Task Routing: a window of channels for each timestep", None)

    def build(self, **more: Any) -> DiTConfig:
        """The network's configuration, with what the stage knows. Raises InvalidInput."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return named(self.name, **{k: v for k, v in own.items() if v is not None}, **more)


def own_network(model: ModelConfig, start: DiTConfig) -> None:
    """Raises InvalidInput where another network is described than the start brings."""
    if model == ModelConfig():
        return
    described = model.build()
    given = {name for name in ("patch", "grid", "experts", "routing") if getattr(model, name) is not None}
    for name in ("width", "heads", "depth", *sorted(given)):
        ours, theirs = getattr(described, name), getattr(start, name)
        if ours != theirs:
            told = f"the start's network has {name} {theirs}, model says {ours}: drop model, or drop start"
            raise InvalidInput(told, param="model")
