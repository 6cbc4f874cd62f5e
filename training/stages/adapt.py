"""Learn tasks on a frozen model, by one small set of adapters for each (DiffScaler, 2404.09976).

What is trained is a task's own: its adapters, its label, and its input convolution where every task has one. The base
may be a perception model or one of `pretrain`, whose input is then widened for each task. Several tasks are learned at
once and served as one graph, whose rows choose their adapters by the task's label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from saccade.errors import InvalidInput
from training.config import explained
from training.loop import Progress
from training.models.affiner import Adapters, freeze_base
from training.models.growth import adapt
from training.perception import TASKS, Perception, load_weights, network
from training.stages.finetune import prepared
from training.stages.perceive import Perceiving, TuningConfig, measured, placed, source_of
from training.stages.resumed import codec_of, train
from training.stages.started import PerceptionConfig, Started, open_start, said_of

STAGE = "adapt"
LAYERS = Adapters(tasks=1).layers


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """`saccade adapt`."""

    start: str = explained("run (or imported checkpoint) that it begins with; it has to be given", "")
    rank: int = explained("of the branch U relu(D x) of every adapter", 8)
    scale: float = explained("factor of that branch", 1.0)
    layers: tuple[str, ...] = explained(
        "which layers have adapters: qkv, proj, fc1, fc2, adaLN, final; empty: the first five, and on a base that has "
        "never made an answer final too, without which it cannot learn to",
        (),
    )


def run(config: Config, out: Path, device: str | None = None) -> Progress:
    """Train to the end, or go on with what lies in `out`. Raises InvalidInput, ModelError."""
    made, started = objective(config, out)
    known = made.perception.config
    about = said_of(known, config, started.lineage, [d.path for d in config.data])
    return train(made, config.loop, out, STAGE, known, about, device)


def objective(config: Config, out: Path | None = None) -> tuple[Perceiving, Started]:
    """The objective with its model, frozen but for what is a task's own, and what it began with; in `out` may lie a
    run that goes on."""
    if not config.start:
        raise InvalidInput("adapting begins with a trained model: start = RUN", param="start")
    torch.manual_seed(config.loop.seed)
    started = open_start(config.start, config.start_weights)
    source = source_of(config)
    codec = measured(codec_of(config.codec or started.config.codec, out), source, config)
    routed = not isinstance(started.config, PerceptionConfig)  # a frozen input has no room for a condition
    state, base = prepared(started, codec, routed)
    furthest = max(started.labels.values(), default=0) - base.first_label
    layers = config.layers or (*LAYERS, *(("final",) if routed else ()))
    adapters = Adapters(max(len(TASKS), furthest + 1), config.rank, config.scale, layers)
    new, diffusion = replace(base, adapters=adapters), config.diffusion or started.config.diffusion
    dit = network(new, diffusion)
    load_weights(dit, adapt(state, base, new))
    freeze_base(dit)
    return Perceiving(Perception(placed(dit, diffusion, codec, config, started.labels), dit), source, config), started
