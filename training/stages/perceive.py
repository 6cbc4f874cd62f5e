"""What finetune, upcycle and adapt share: the objective of a perception model, and a run of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.errors import InvalidInput
from saccade.tasks import AmodalCoding, DepthCoding
from training.codecs import CodecConfig, deviations, pictures_of, targets_of
from training.config import EDGE, NOT_NEGATIVE, explained, within
from training.data import Source
from training.loop import LoopConfig, Objective
from training.models.dit import DiT, DiTConfig
from training.objectives import Diffusion, DiffusionConfig
from training.perception import TASKS, Perception, PerceptionConfig
from training.stages.sources import Codings, DataConfig, Shares, open_sources

MEASURED_ROWS = 64
WHITE = 250
"""Of an amodal picture on white, grey levels up to this are the object (the papers' convention)."""
EVENLY = {"depth": 1.0, "flow": 1.0, "amodal": 1.0}


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What every stage on answers has."""

    start: str = explained("run (or imported checkpoint) that it begins with; empty: new weights", "")
    start_weights: str = explained("which of its weights: average or model", "average")
    data: tuple[DataConfig, ...] = explained("datasets; every task needs one", ())
    tasks: dict[str, float] = explained("share of the rows of each task", factory=lambda: dict(EVENLY))
    sizes: tuple[tuple[int, int], ...] = explained(
        "[height, width] in pixels; each part of a step has one", ((128, 128),)
    )
    codec: CodecConfig | None = explained("of pictures and targets; none: the start's, or the block DCT", None)
    diffusion: DiffusionConfig | None = explained("forward process and loss; none: the start's, or as below", None)
    detail: float = explained(
        "channels count in the loss as their deviation to this power (block DCT): 0 all alike, 2 as in the picture",
        1.0,
    )
    depth_knee: float = explained("of the depth code (saccade.tasks.DepthCoding); 0: linear, as in the paper", 0.0)
    amodal_context: float = explained(
        "how much around the visible part is seen, as a share of its longer side; 0: the whole picture", 0.75
    )
    loop: LoopConfig = explained("", factory=LoopConfig)

    def __post_init__(self) -> None:
        Shares(self.tasks, 0)
        if not self.sizes:
            raise InvalidInput("sizes must have one size at least", param="sizes")
        within(self, EDGE, "sizes")
        within(self, NOT_NEGATIVE, "detail", "depth_knee", "amodal_context")
        if self.start_weights not in ("average", "model"):
            raise InvalidInput("start_weights is average or model", param="start_weights")

    @property
    def codings(self) -> Codings:
        return Codings(DepthCoding(knee=self.depth_knee or None), AmodalCoding(context=self.amodal_context or None))

    def coding(self, codec: CodecConfig) -> dict[str, dict[str, Any]]:
        """As a card has it; targets of three planes are read as the papers do."""
        depth: dict[str, Any] = {"knee": self.depth_knee} if self.depth_knee else {}
        amodal: dict[str, Any] = {"context": self.amodal_context or None}
        if codec.kind == "autoencoder":
            depth |= {"channels": 3}
            amodal |= {"ground": WHITE}
        every: dict[str, dict[str, Any]] = {"depth": depth, "flow": {}, "amodal": amodal}
        return {task: every[task] for task in TASKS if task in self.tasks}


@dataclass(frozen=True)
class Rows:
    """A part of a step: pictures and targets as `training.data.Batch` has them, `label` [B] int64."""

    image: Tensor
    prompt: Tensor
    target: Tensor
    weight: Tensor
    label: Tensor


class Perceiving(Objective):
    """Denoise the latents of answers, given those of pictures."""

    def __init__(self, model: Perception, source: Source, config: TuningConfig) -> None:
        self.perception, self.model, self.source, self.config = model, model.dit, source, config
        check_sizes(config.sizes, model.pictures.stride * model.config.model.patch)
        self.diffusion = Diffusion(model.config.diffusion)
        self.shares = Shares(config.tasks, config.loop.seed)
        std = torch.tensor(model.config.codec.target_std or (1.0,) * model.targets.channels).pow(config.detail)
        self.channels = std / std.mean()

    def batch(self, step: int, part: int, parts: int) -> Rows:
        config = self.config
        count, number = config.loop.batch // parts, step * parts + part
        size = config.sizes[int(np.random.default_rng([config.loop.seed, number]).integers(len(config.sizes)))]
        found, labels = [], []
        for task, (rows, before) in self.shares.rows(number * count, count).items():
            found.append(self.source.batch(number, task, rows, size, first=before))
            labels += [self.perception.config.tasks[task]] * rows
        fields = (np.concatenate([getattr(b, f) for b in found]) for f in ("image", "prompt", "target", "weight"))
        return Rows(*map(torch.from_numpy, fields), torch.tensor(labels))

    def loss(
        self, model: torch.nn.Module, batch: Rows, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        condition, clean = self.perception.encode(batch.image, batch.prompt, batch.target, batch.label)
        t = self.diffusion.timesteps(len(clean), generator)
        noise = self.diffusion.noise(tuple(clean.shape), t, generator)
        predicted = model(torch.cat([condition, self.diffusion.noisy(clean, noise, t)], 1), t, batch.label)
        wanted = self.diffusion.target(clean, noise, t)
        loss, rows = self.diffusion.loss(
            predicted,
            wanted,
            t,
            channels=self.channels.to(wanted.device),
            known=cells(batch.weight, clean),
            doubt=getattr(model, "doubt", None),
        )
        parts = {}
        for task, label in self.perception.config.tasks.items():
            of_task = batch.label == label
            if of_task.any():
                parts[task] = rows[of_task].mean()
        return with_balance(loss, model, parts)


def check_sizes(sizes: Sequence[tuple[int, int]], multiple: int) -> None:
    """Raises InvalidInput for sizes of which the model cannot make whole patches."""
    if wrong := [size for size in sizes if any(edge < multiple or edge % multiple for edge in size)]:
        raise InvalidInput(f"sizes must be multiples of {multiple} pixels, not {list(wrong[0])}", param="sizes")


def with_balance(loss: Tensor, model: torch.nn.Module, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with its mixture's load-balancing part, whose value is logged too."""
    balance = model.balance() if hasattr(model, "balance") else None
    if balance is None:
        return loss, parts
    return loss + balance, {**parts, "balance": model.balance_value}


def cells(weight: Tensor, latent: Tensor) -> Tensor:
    """Weights [B, H/8, W/8] as weights of latent cells [B, h, w]."""
    if weight.shape[-2:] == latent.shape[-2:]:
        return weight
    return torch.nn.functional.adaptive_avg_pool2d(weight[:, None], latent.shape[-2:])[:, 0].round()


def measured(codec: CodecConfig, source: Source, config: TuningConfig) -> CodecConfig:
    """The codec with the deviations of its latents, of what the source gives, where it has none yet."""
    if codec.kind != "dct" or (codec.picture_std and codec.target_std):
        return codec
    check_sizes(config.sizes, targets_of(CodecConfig(codec.kind)).stride)
    size = config.sizes[0]
    batches = [source.batch(0, task, MEASURED_ROWS, size, first=0) for task in config.tasks]
    plain = CodecConfig(codec.kind)
    pictures = torch.cat([pictures_of(plain).encode(torch.from_numpy(batch.image)) for batch in batches])
    targets = torch.cat([targets_of(plain).encode(torch.from_numpy(batch.target)) for batch in batches])
    return replace(
        codec,
        picture_std=codec.picture_std or deviations(pictures),
        target_std=codec.target_std or deviations(targets),
    )


def source_of(config: TuningConfig) -> Source:
    return open_sources(config.data, config.tasks, config.codings, config.loop.seed)


def placed(
    model: DiT, diffusion: DiffusionConfig, codec: CodecConfig, config: TuningConfig, known: Mapping[str, int]
) -> PerceptionConfig:
    """The configuration around a transformer; `known`: labels that tasks have already."""
    tasks = labels_for([task for task in TASKS if task in config.tasks], model.config, known)
    return PerceptionConfig(model.config, codec, diffusion, tasks, config.coding(codec), config.sizes[-1])


def labels_for(tasks: Sequence[str], model: DiTConfig, known: Mapping[str, int]) -> dict[str, int]:
    """A label for each task: the one that it has, else its place behind the first, else what is free there."""
    free = [row for row in range(model.first_label, model.labels) if row not in known.values()]
    labels: dict[str, int] = {}
    for task in tasks:
        own = model.first_label + TASKS.index(task)
        if task not in known and not free:
            raise InvalidInput(f"the start has no label left for {task}", param="tasks")
        labels[task] = known[task] if task in known else own if own in free else free[0]
        free = [row for row in free if row != labels[task]]
    return labels
