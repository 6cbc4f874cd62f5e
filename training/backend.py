"""A model's torch modules behind the serving protocol, eager, in this thread: for comparison and for looking at a run.

What it answers goes through `saccade.pipeline`, so only the engine differs from what is served.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.card import Card
from saccade.repository import Repository
from saccade.schedule import NoiseSchedule
from training import weights
from training.models.perceiver import Config, Model


class TorchBackend:
    """`Backend` on eager torch modules in evaluation mode. Every call blocks the event loop: there is no batching."""

    def __init__(self, model: Model, card: Card) -> None:
        self.model, self.card = model.eval(), card

    @classmethod
    def load(cls, repository: Repository, name: str | None = None) -> TorchBackend:
        """The default architecture with the weights of an exported model. Raises ValueError where they do not fit."""
        card = repository.card(name or repository.default())
        noise = card.noise
        model = blank(card, NoiseSchedule(noise.schedule, noise.timesteps, noise.zero_terminal_snr))
        weights.read(repository.graph(card.encoder), model.encoder)
        weights.read(repository.graph(card.name), model.denoiser)
        return cls(model, card)

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        outputs = _run(self.model.encoder, image, prompt, task)
        return dict(zip(self.card.conditioning, outputs, strict=True))

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        seen = (conditioning[key] for key in self.card.conditioning)
        return _run(self.model.denoiser, latent, timestep, task, *seen)[0]

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return _run(self.model.codec, latent)[0]

    async def aclose(self) -> None:
        """Nothing to let go of."""


def blank(card: Card, schedule: NoiseSchedule) -> Model:
    """The default architecture, without weights yet; the preconditioning's buffers come with the weights."""
    channels = card.latent.channels
    return Model(Config(latent_channels=channels, latent_std=(1.0,) * channels), schedule)


def _run(module: torch.nn.Module, *inputs: np.ndarray) -> list[Array]:
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs))
    return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
