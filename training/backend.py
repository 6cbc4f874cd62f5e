"""A model's torch modules behind the serving protocol, eager, in this thread: for comparison and for looking at a run.

What it answers goes through `saccade.pipeline`, so only the engine differs from what is served.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.calls import Choices
from saccade.card import Card
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Answer, Inputs, Options, Pipeline
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


class Eager:
    """Asks a backend of this kind the three questions, each to its end: a `training.evaluate.Seer`."""

    def __init__(self, backend: TorchBackend) -> None:
        self.pipeline = Pipeline(backend)

    def depth(self, image: Path, /, **choices: Unpack[Choices]) -> Answer:
        return self._ask(Inputs("depth", read_picture(image.read_bytes())), choices)

    def flow(self, image: Path, next_image: Path, /, **choices: Unpack[Choices]) -> Answer:
        frames = (read_picture(file.read_bytes()) for file in (image, next_image))
        return self._ask(Inputs("flow", *frames), choices)

    def amodal(self, image: Path, mask: Path, /, **choices: Unpack[Choices]) -> Answer:
        pixels = read_picture(image.read_bytes())
        return self._ask(Inputs("amodal", pixels, mask=read_mask(mask.read_bytes())), choices)

    def _ask(self, inputs: Inputs, choices: Choices) -> Answer:
        options = Options(**choices).resolve(self.pipeline.card, inputs.task)
        return asyncio.run(self.pipeline(inputs, options))


def blank(card: Card, schedule: NoiseSchedule) -> Model:
    """The default architecture, without weights yet; the preconditioning's buffers come with the weights."""
    channels = card.latent.channels
    return Model(Config(latent_channels=channels, latent_std=(1.0,) * channels), schedule)


def _run(module: torch.nn.Module, *inputs: np.ndarray) -> list[Array]:
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs))
    return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
