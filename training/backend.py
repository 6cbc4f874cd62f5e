"""A model's torch modules behind the serving protocol: to evaluate on a CPU or GPU without exporting, and to compare.

What it answers goes through `saccade.pipeline`, so only the engine differs from what is served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.backends.stepping import Stepping
from saccade.calls import Choices
from saccade.card import Card
from saccade.errors import InvalidInput, ModelError
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository
from training import weights
from training.export import describe
from training.loading import Which, default_servable, merged, model_name, open_run
from training.servable import PARTS, Servable

Precision = Literal["fp32", "bf16"]


class TorchBackend:
    """`Backend` on torch modules in evaluation mode, on `device`; calls run one after another in a thread of its own.

    `precision` bf16: linear layers in bfloat16 (autocast), whatever else in float32; the codec is always float32.
    Raises InvalidInput for a device that is not there.
    """

    def __init__(self, servable: Servable, card: Card, device: str = "cpu", precision: Precision = "fp32") -> None:
        self.servable, self.card = servable.eval(), card
        self.device, self.precision = _device(device), precision
        for part in PARTS:
            servable.module(part).to(self.device)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="saccade-torch")

    @classmethod
    def load(
        cls,
        repository: Repository,
        name: str | None = None,
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> TorchBackend:
        """The default architecture with the weights of an exported model. Raises ValueError where they do not fit."""
        from training.models.perceiver import Config, Model

        card = repository.card(name or repository.default())
        channels = card.latent.channels
        model = Model(Config(latent_channels=channels, latent_std=(1.0,) * channels), card.schedule)
        weights.read(repository.graph(card.encoder), model.encoder)
        weights.read(repository.graph(card.name), model.denoiser)
        servable = default_servable(model, card.noise.schedule, card.noise.zero_terminal_snr)
        return cls(servable, card, device, precision)

    @classmethod
    def of(
        cls,
        servable: Servable,
        facts: Mapping[str, Any],
        name: str = "run",
        *,
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> TorchBackend:
        """Under a card as an export would write it; what the facts do not say of it is made up."""
        if "tasks" not in facts:
            raise InvalidInput("a run of the default model needs facts of its tasks: --facts FACTS.json", param="facts")
        said = {"name": name, "summary": "A run.", "licence": "unknown", **facts}
        said["training"] = {"data": [], "samples": 0, "wall_clock_s": 0, "device": device, **said.get("training", {})}
        return cls(servable, describe(servable, said, {}), device, precision)

    @classmethod
    def of_run(
        cls,
        run: Path,
        *,
        facts: dict[str, Any] | None = None,
        which: Which = "average",
        step: int | None = None,
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> TorchBackend:
        """A run's weights under a card as its export would have it, with the run's name. Raises as `open_run` does."""
        servable, found = open_run(run, which, step)
        said = merged(found, facts or {}, model_name(run))
        return cls.of(servable, said, device=device, precision=precision)

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        outputs = await self._run(self.servable.encoder, image, prompt, task)
        return {name: outputs[i] for i, name in enumerate(self.card.conditioning)}

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        seen = (conditioning[key] for key in self.card.conditioning)
        return (await self._run(self.servable.denoiser, latent, timestep, task, *seen))[0]

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return (await self._run(self.servable.decoder, latent))[0]

    async def aclose(self) -> None:
        """Let the calls in hand end."""
        await asyncio.to_thread(self._worker.shutdown)

    async def _run(self, module: nn.Module, *inputs: np.ndarray) -> list[Array]:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._compute, module, inputs)

    def _compute(self, module: nn.Module, inputs: Sequence[np.ndarray]) -> list[Array]:
        lower = self.precision == "bf16" and module is not self.servable.decoder
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            given = (torch.from_numpy(np.ascontiguousarray(value)).to(self.device) for value in inputs)
            outputs = module(*given)
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        results = [o.float().cpu().numpy() for o in found if isinstance(o, Tensor)]
        if not all(np.isfinite(result).all() for result in results):
            raise ModelError(f"{self.card.name} produced non-finite values")
        return results


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"no such device here: {name}", param="device") from error
    return device


class Eager:
    """Asks a backend of this kind the three questions, each to its end: a `training.evaluate.Seer`.

    `batch_size`: members of a question whose steps go through the model together.
    """

    def __init__(self, backend: Backend, batch_size: int = 1) -> None:
        self.backend, self.batch_size = backend, batch_size

    @property
    def card(self) -> Card:
        return self.backend.card

    def depth(self, image: Path, /, **choices: Unpack[Choices]) -> Answer:
        return self._ask(Inputs("depth", read_picture(image.read_bytes())), choices)

    def flow(self, image: Path, next_image: Path, /, **choices: Unpack[Choices]) -> Answer:
        frames = (read_picture(file.read_bytes()) for file in (image, next_image))
        return self._ask(Inputs("flow", *frames), choices)

    def amodal(self, image: Path, mask: Path, /, **choices: Unpack[Choices]) -> Answer:
        pixels = read_picture(image.read_bytes())
        return self._ask(Inputs("amodal", pixels, mask=read_mask(mask.read_bytes())), choices)

    def _ask(self, inputs: Inputs, choices: Choices) -> Answer:
        return asyncio.run(self._answer(inputs, Options(**choices).resolve(self.card, inputs.task)))

    async def _answer(self, inputs: Inputs, options: Any) -> Answer:
        backend = self.backend if self.batch_size == 1 else Stepping(self.backend, batch_size=self.batch_size)
        return await Pipeline(backend)(inputs, options)
