"""Learn to denoise pictures of classes: the latents of class folders, of shards that were encoded before, or of
generated scenes. A tenth of the labels is dropped, so that the null label stands for any picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from saccade.errors import InvalidInput
from training.codecs import CodecConfig, pictures_of
from training.config import BELOW_ONE, EDGE, NOT_NEGATIVE, explained, within
from training.data import Latents
from training.loop import LoopConfig, Progress
from training.objectives import DiffusionConfig
from training.perception import load_weights, network
from training.stages.classify import Picturing, classes_of, measured
from training.stages.network import ModelConfig, own_network
from training.stages.pictures import ClassSource, ImagesConfig, open_pictures
from training.stages.resumed import codec_of, train
from training.stages.started import ClassesConfig, Started, open_start, said_of

STAGE = "pretrain"


@dataclass(frozen=True, kw_only=True)
class Config:
    """`saccade pretrain`."""

    images: ImagesConfig = explained("", factory=ImagesConfig)
    classes: int = explained("how many there are; 0: as many as the folders have (latents: their about.json's)", 0)
    sizes: tuple[tuple[int, int], ...] = explained(
        "[height, width] in pixels; each part of a step has one", ((128, 128),)
    )
    start: str = explained("run (or imported checkpoint) whose weights it begins with; empty: new ones", "")
    start_weights: str = explained("which of its weights: average or model", "average")
    model: ModelConfig = explained("without a start: the network", factory=ModelConfig)
    codec: CodecConfig = explained("", factory=CodecConfig)
    diffusion: DiffusionConfig = explained("with a start, of the loss alone", factory=DiffusionConfig)
    dropout: float = explained("share of the labels that are replaced by the null label", 0.1)
    loop: LoopConfig = explained("", factory=LoopConfig)

    def __post_init__(self) -> None:
        within(self, BELOW_ONE, "dropout")
        within(self, EDGE, "sizes")
        within(self, NOT_NEGATIVE, "classes")
        if not self.sizes:
            raise InvalidInput("sizes must have one size at least", param="sizes")


def run(config: Config, out: Path, device: str | None = None) -> Progress:
    """Train to the end, or go on with what lies in `out`. Raises InvalidInput, ModelError."""
    made, started = objective(config, out)
    about = said_of(made.config, config, started.lineage if started else (), [config.images.path])
    return train(made, config.loop, out, STAGE, made.config, about, device)


def objective(config: Config, out: Path | None = None) -> tuple[Picturing, Started | None]:
    """The objective with its model, and what it began with; in `out` may lie a run that goes on."""
    torch.manual_seed(config.loop.seed)
    source = open_images(config.images, config.loop.seed)
    started = open_start(config.start, config.start_weights) if config.start else None
    if started is None:
        made = begun(config, source, out)
        dit = network(made.model, made.diffusion)
    else:
        if not isinstance(started.config, ClassesConfig):
            raise InvalidInput("pretraining begins with a class-conditional model", param="start")
        own_network(config.model, started.config.model)
        made = went_on(started.config, config, source)
        dit = network(made.model, made.diffusion)
        load_weights(dit, started.state)
    return objective_of(made, dit, config, source), started


def went_on(started: ClassesConfig, config: Config, source: ClassSource | Latents) -> ClassesConfig:
    """The start's model and forward process, with the loss, the size and (where it names one) the codec of `config`."""
    asked = config.diffusion
    loss = {"weighting": asked.weighting, "gamma": asked.gamma, "shift": asked.shift, "noise": asked.noise}
    codec = config.codec if config.codec.path else started.codec
    size = size_of(config, source, codec)
    return replace(started, codec=codec, diffusion=replace(started.diffusion, **loss), size=size)


def size_of(config: Config, source: ClassSource | Latents, codec: CodecConfig) -> tuple[int, int]:
    """The size (H, W) of the last pictures that are seen; latents were encoded at theirs."""
    if not isinstance(source, Latents):
        return config.sizes[-1]
    stride = pictures_of(codec).stride
    return source.shape[1] * stride, source.shape[2] * stride


def objective_of(made: ClassesConfig, dit: torch.nn.Module, config: Config, source: ClassSource | Latents) -> Picturing:
    return Picturing(dit, made, source, config.sizes, config.loop.batch, config.dropout, config.loop.seed)


def open_images(images: ImagesConfig, seed: int) -> ClassSource | Latents:
    if images.kind != "latents":
        return open_pictures(images, seed)
    if not images.path:
        raise InvalidInput("images.path must be given", param="images")
    return Latents(Path(images.path), seed, images.broken_share)


def begun(config: Config, source: ClassSource | Latents, out: Path | None = None) -> ClassesConfig:
    """The configuration of a model with new weights."""
    codec = measured(codec_of(config.codec, out), source, config.sizes[0])
    classes = config.classes or counted(source)
    model = config.model.build(channels=pictures_of(codec).channels, labels=classes + 1)
    return ClassesConfig(model, codec, config.diffusion, classes, size_of(config, source, codec))


def counted(source: ClassSource | Latents) -> int:
    """How many classes there are. Raises InvalidInput where nothing says it."""
    found = classes_of(source)
    if found is None:
        raise InvalidInput("how many classes there are must be given: classes = ...", param="classes")
    return found
