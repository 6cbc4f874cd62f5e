"""The objective of class-conditional pretraining, on pictures or on latents that were encoded before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from saccade.errors import InvalidInput
from training.codecs import Codec, CodecConfig, deviations, pictures_of
from training.config import build
from training.data import Latents
from training.loop import Objective
from training.models.dit import DiT, DiTConfig
from training.objectives import Diffusion
from training.stages.perceive import check_sizes, with_balance
from training.stages.pictures import ClassSource
from training.stages.started import ClassesConfig

MEASURED_ROWS = 256


@dataclass(frozen=True)
class Classed:
    """`rows`: pictures [B, 3, H, W], or latents [B, C, h, w]; `label` [B] int64, the null label where dropped."""

    rows: Tensor
    label: Tensor


class Picturing(Objective):
    """Denoise the latents of pictures, given their class; sometimes (`dropout`) without it."""

    def __init__(
        self,
        model: DiT,
        config: ClassesConfig,
        source: ClassSource | Latents,
        sizes: tuple[tuple[int, int], ...],
        batch: int,
        dropout: float,
        seed: int,
    ) -> None:
        self.model, self.config, self.source, self.sizes = model, config, source, sizes
        self.rows_of_step, self.dropout, self.seed = batch, dropout, seed
        self.diffusion = Diffusion(config.diffusion)
        self.codec: Codec | None = None if isinstance(source, Latents) else pictures_of(config.codec)
        found = classes_of(source)
        if found is not None and found > config.classes:
            raise InvalidInput(f"there are {found} classes, the model knows {config.classes}", param="classes")
        if isinstance(source, Latents):
            check_latents(source, config.model)
        if self.codec is not None:
            check_sizes(sizes, self.codec.stride * config.model.patch)

    def batch(self, step: int, part: int, parts: int) -> Classed:
        count, number = self.rows_of_step // parts, step * parts + part
        rng = np.random.default_rng([self.seed, number, 5])
        if isinstance(self.source, Latents):
            rows, labels = self.source.at(number * count, count)
        else:
            size = self.sizes[int(rng.integers(len(self.sizes)))]
            rows, labels = self.source.batch(number * count, count, size)
        if strange := [int(label) for label in labels if not 0 <= label < self.config.classes]:
            known = f"the model knows the classes 0 to {self.config.classes - 1}"
            raise InvalidInput(f"a picture is of class {strange[0]}, {known}", param="classes")
        labels = np.where(rng.random(count) < self.dropout, self.config.classes, labels)
        return Classed(torch.from_numpy(rows), torch.from_numpy(labels))

    def loss(
        self, model: nn.Module, batch: Classed, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.latents(batch.rows)
        t = self.diffusion.timesteps(len(clean), generator)
        noise = self.diffusion.noise(tuple(clean.shape), t, generator)
        predicted = model(self.diffusion.noisy(clean, noise, t), t, batch.label)
        wanted = self.diffusion.target(clean, noise, t)
        loss, rows = self.diffusion.loss(predicted, wanted, t, doubt=getattr(model, "doubt", None))
        return with_balance(loss, model, {"denoising": rows.mean()})

    @torch.no_grad()
    def latents(self, rows: Tensor) -> Tensor:
        if self.codec is None:
            return rows.float()
        with torch.autocast(rows.device.type, enabled=False):
            return self.codec.to(rows.device).encode(rows)


def classes_of(source: ClassSource | Latents) -> int | None:
    """How many classes a source says that it has; None for shards that say nothing of it."""
    found = source.about.get("classes") if isinstance(source, Latents) else source.classes
    return found if isinstance(found, int) and found >= 1 else None


def check_latents(source: Latents, model: DiTConfig) -> None:
    """Raises InvalidInput for shards whose latents are not what the model takes."""
    channels, *edges = source.shape
    if channels != model.channels:
        raise InvalidInput(f"the latents have {channels} channels, the model {model.channels}", param="images")
    if any(edge < model.patch or edge % model.patch for edge in edges):
        raise InvalidInput(f"latents of {edges} cells are not whole patches of {model.patch}", param="images")


def measured(codec: CodecConfig, source: ClassSource | Latents, size: tuple[int, int]) -> CodecConfig:
    """The codec with the deviations of its pictures' latents; pre-encoded ones say what theirs were divided by."""
    if isinstance(source, Latents):
        said = source.about.get("codec")
        if not isinstance(said, dict):
            raise InvalidInput("the shards do not say which codec wrote them: encode them with saccade encode")
        return build(CodecConfig, said)
    if codec.kind != "dct" or codec.picture_std:
        return codec
    check_sizes([size], pictures_of(CodecConfig()).stride)
    pictures, _ = source.batch(0, min(MEASURED_ROWS, len(source)), size)
    return replace(codec, picture_std=deviations(pictures_of(CodecConfig()).encode(torch.from_numpy(pictures))))
