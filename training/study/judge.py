"""How a finished run is judged: its loss on held-out data under noise that every run meets alike, and the metrics of
held-out pictures asked about as a server would be."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training import config as configs
from training import cost
from training.loop import Objective, checkpoint
from training.models.dit import DiTConfig, parameters_of
from training.perception import load_weights
from training.stages.command import stage_of
from training.study.plan import Judge, Run, flattened, nested

NOISE_SEED = 1_000_003
STRIDE = 8  # picture pixels per latent cell
OWN = ("balance",)  # parts of a loss that are no error


def config_of(stage: str, values: dict[str, Any]) -> Any:
    """The stage's configuration. Raises InvalidInput."""
    return configs.build(stage_of(stage).Config, values)


def network_of(stage: str, config: Any) -> DiTConfig:
    """The transformer that a stage would train."""
    made, _ = stage_of(stage).objective(config)
    return made.model.config


def macs_of(network: DiTConfig, config: Any, samples: int) -> int:
    """Of training on so many samples of the configuration's first size."""
    height, width = config.sizes[0]
    return cost.training_macs(network, height // STRIDE, width // STRIDE, samples)


def judged(judge: Judge, run: Run, values: dict[str, Any], folder: Path, pictures: str) -> dict[str, Any]:
    """Everything a report tells of the run in `folder`."""
    state, said = checkpoint.read(folder)
    about = said["about"]
    kept = about.get("perception") or about["classes"]
    held = nested({**flattened(values), "loop.seed": 0, **run.held, "codec": kept["codec"]})
    config = config_of(run.stage, held)
    made, _ = stage_of(run.stage).objective(config)
    load_weights(made.model, state)
    network = made.model.config
    counts = parameters_of(network)
    trainable = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    return {
        "steps": said["step"],
        "samples": said["samples"],
        "seconds": said["seconds"],
        "macs": macs_of(network, config, said["samples"]),
        "parameters": {"total": counts.total, "active": counts.active, "trainable": trainable},
        "network": asdict(network),
        "loss": held_loss(made, judge.batches),
        "metrics": metrics(judge, folder, pictures) if pictures and run.stage != "pretrain" else {},
    }


@torch.no_grad()
def held_loss(made: Objective, batches: int) -> dict[str, float]:
    """Each task's squared error on the first batches of the objective's data, and their mean as `mean`."""
    made.model.eval()
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(batches):
        batch = made.batch(number, 0, 1)
        generator = torch.Generator().manual_seed(NOISE_SEED + number)
        torch.manual_seed(NOISE_SEED + number)
        _, parts = made.loss(made.model, batch, generator, number)
        for name, value in parts.items():
            found[name].append(float(value))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {"mean": float(np.mean([value for name, value in means.items() if name not in OWN])), **means}


def metrics(judge: Judge, folder: Path, pictures: str) -> dict[str, float]:
    """The evaluation's means over all pictures, as `depth/abs_rel` and so on."""
    from saccade.pipeline import Options
    from training.backend import Eager, TorchBackend
    from training.evaluate import evaluate

    seer = Eager(TorchBackend.of_run(folder))
    report = evaluate(Path(pictures), seer, options=Options(**judge.options))
    return {f"{mean.task}/{mean.metric}": mean.value for mean in report.means() if mean.group == "all"}
