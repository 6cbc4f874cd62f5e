"""Learn to see: a pretrained model given the latents of pictures in front of its noisy latent, or a new one.

The start's input convolution is repeated over the condition's channels and divided by the number of copies (the paper);
labels of the tasks begin as the unconditional one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from saccade.errors import InvalidInput
from training.codecs import CodecConfig, pictures_of, sources_of_targets, targets_of
from training.config import explained
from training.loop import Progress
from training.models.dit import DiTConfig
from training.models.growth import widen_input
from training.objectives import DiffusionConfig
from training.perception import TASKS, Perception, PerceptionConfig, load_weights, network
from training.stages.network import ModelConfig, own_network
from training.stages.perceive import Perceiving, TuningConfig, measured, placed, source_of
from training.stages.resumed import codec_of, train
from training.stages.started import Started, open_start, said_of

STAGE = "finetune"


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """`saccade finetune`."""

    model: ModelConfig = explained("without a start: the network", factory=ModelConfig)
    routed: bool = explained(
        "an input convolution for each task (PatchEmbedRouter); a start that has them keeps them", False
    )


def run(config: Config, out: Path, device: str | None = None) -> Progress:
    """Train to the end, or go on with what lies in `out`. Raises InvalidInput, ModelError."""
    made, started = objective(config, out)
    known, lineage = made.perception.config, started.lineage if started else ()
    about = said_of(known, config, lineage, [d.path for d in config.data])
    return train(made, config.loop, out, STAGE, known, about, device)


def objective(config: Config, out: Path | None = None) -> tuple[Perceiving, Started | None]:
    """The objective with its model, and what it began with; in `out` may lie a run that goes on."""
    torch.manual_seed(config.loop.seed)
    source = source_of(config)
    started = open_start(config.start, config.start_weights) if config.start else None
    if started is not None:
        own_network(config.model, started.config.model)
    asked = config.codec or (started.config.codec if started else CodecConfig())
    codec = measured(codec_of(asked, out), source, config)
    made = grown(config, started, codec) if started else begun(config, codec)
    return Perceiving(made, source, config), started


def begun(config: Config, codec: CodecConfig) -> Perception:
    """A model with new weights."""
    diffusion = config.diffusion or DiffusionConfig()
    condition, channels = widths(codec)
    inputs = len(TASKS) if config.routed else 1
    shape = config.model.build(condition=condition, channels=channels, labels=len(TASKS), inputs=inputs)
    dit = network(shape, diffusion)
    return Perception(placed(dit, diffusion, codec, config, {}), dit)


def grown(config: Config, started: Started, codec: CodecConfig) -> Perception:
    """The start's model, made ready for the tasks."""
    diffusion = config.diffusion or started.config.diffusion
    state, shape = prepared(started, codec, config.routed)
    dit = network(shape, diffusion)
    load_weights(dit, state)
    return Perception(placed(dit, diffusion, codec, config, started.labels), dit)


def prepared(started: Started, codec: CodecConfig, routed: bool) -> tuple[dict[str, torch.Tensor], DiTConfig]:
    """The start's state and configuration with a condition and labels for the tasks."""
    old = started.config.model
    if isinstance(started.config, PerceptionConfig):
        own = dict(started.state)
        if routed and old.inputs == 1:
            new = replace(old, inputs=len(TASKS))
            return widen_input(own, old, new), new
        return own, old
    condition, channels = channels_for(codec, old)
    new = replace(
        old,
        condition=len(condition),
        channels=len(channels),
        learn_sigma=False,
        labels=old.labels + len(TASKS),
        first_label=old.labels,
        inputs=len(TASKS) if routed else 1,
    )
    return widen_input(dict(started.state), old, new, sources=(*condition, *channels), outputs=channels), new


def channels_for(codec: CodecConfig, old: DiTConfig) -> tuple[list[int], list[int]]:
    """The old channels behind a perception model's condition (image, then prompt) and target: each takes over the
    weights of the picture's channel that is most like it."""
    own = list(range(old.channels))
    if (pictures := pictures_of(codec).channels) != old.channels:
        raise InvalidInput(f"the start has {old.channels} channels, the codec's pictures {pictures}", param="start")
    return own * 2, list(sources_of_targets()) if codec.kind == "dct" else own


def widths(codec: CodecConfig) -> tuple[int, int]:
    """Channels of the condition and of the target."""
    return 2 * pictures_of(codec).channels, targets_of(codec).channels
