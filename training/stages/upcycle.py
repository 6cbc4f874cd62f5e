"""Make a mixture of experts of a dense model and go on training it (2212.05055).

Every expert begins as the dense MLP and the chosen weights add up to 1, so the first output is the dense model's.
A start of `pretrain` goes on with pictures of classes (`images`), any other with answers (`data`, `tasks`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from saccade.errors import InvalidInput
from training.config import BELOW_ONE, explained, within
from training.loop import Progress
from training.models.growth import upcycle
from training.models.moe import Experts
from training.perception import Perception, load_weights, network
from training.stages.classify import Picturing
from training.stages.perceive import Perceiving, TuningConfig, measured, placed, source_of
from training.stages.pictures import ImagesConfig
from training.stages.pretrain import open_images
from training.stages.resumed import codec_of, train
from training.stages.started import ClassesConfig, Started, open_start, said_of

STAGE = "upcycle"
PLAIN = Experts(count=8, active=2, shared=False, gated=False, renormalise=True)


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """`saccade upcycle`."""

    start: str = explained("run (or imported checkpoint) that it begins with; it has to be given", "")
    experts: Experts = explained("", factory=lambda: PLAIN)
    images: ImagesConfig | None = explained("for a start of pretrain: its pictures", None)
    dropout: float = explained("for a start of pretrain: share of the labels that are dropped", 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, BELOW_ONE, "dropout")


def run(config: Config, out: Path, device: str | None = None) -> Progress:
    """Train to the end, or go on with what lies in `out`. Raises InvalidInput, ModelError."""
    made, started = objective(config, out)
    known = made.config if isinstance(made, Picturing) else made.perception.config
    data = [config.images.path] if isinstance(made, Picturing) and config.images else [d.path for d in config.data]
    about = said_of(known, config, started.lineage, data)
    return train(made, config.loop, out, STAGE, known, about, device)


def objective(config: Config, out: Path | None = None) -> tuple[Perceiving | Picturing, Started]:
    """The objective with its model, and what it began with; in `out` may lie a run that goes on."""
    if not config.start:
        raise InvalidInput("upcycling begins with a dense model: start = RUN", param="start")
    torch.manual_seed(config.loop.seed)
    started = open_start(config.start, config.start_weights)
    old = started.config
    new = replace(old.model, experts=config.experts)
    diffusion = config.diffusion or old.diffusion
    dit = network(new, diffusion)
    load_weights(dit, upcycle(dict(started.state), old.model, new))
    if isinstance(old, ClassesConfig):
        if config.images is None:
            raise InvalidInput("a start of pretrain goes on with pictures of classes: give [images]", param="images")
        source = open_images(config.images, config.loop.seed)
        known = replace(old, model=new, diffusion=diffusion)
        loop = config.loop
        return Picturing(dit, known, source, config.sizes, loop.batch, config.dropout, loop.seed), started
    answers = source_of(config)
    codec = measured(codec_of(config.codec or old.codec, out), answers, config)
    surroundings = placed(dit, diffusion, codec, config, started.labels)
    return Perceiving(Perception(surroundings, dit), answers, config), started
