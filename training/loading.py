"""A run's folder back to what can be served, and what a card should say of it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from saccade.errors import InvalidInput, ModelError
from training.config import build
from training.loop import checkpoint
from training.models.codec import BLOCK
from training.perception import Perception, PerceptionConfig, load_weights, network
from training.servable import Servable, Spec
from training.stages.started import ClassesConfig, config_of

Which = Literal["model", "average"]
Facts = dict[str, Any]
DEFAULT_STAGE = "train"
UNKNOWN_LICENCE = "unknown: that of the data and of the model it began with"
MULTIPLE = 16
DEFAULT_SIZES = ((1, 192, 144), (3, 64, 256), (5, 256, 256))
DEFAULT_TOLERANCE = 2e-4
"""Of the default model: its tracker carries rounding far at single places."""


def open_run(run: Path, which: Which = "average", step: int | None = None) -> tuple[Servable, Facts]:
    """The model of a run, in evaluation mode, and the facts of its card but for a name.

    Raises ModelError for a run that is not whole, InvalidInput for one whose model answers no question.
    """
    if not run.is_dir():
        raise InvalidInput(f"no such run: {run}", param="run")
    state, said = checkpoint.read(run, which, step)
    if said["stage"] == DEFAULT_STAGE:
        return _default(state, said)
    config = config_of(said["about"], run)
    if isinstance(config, ClassesConfig):
        raise InvalidInput(f"{run} knows classes and no task: finetune or adapt it first", param="run")
    return perceiver(config, state), facts_of(config, said)


def perceiver(config: PerceptionConfig, state: Mapping[str, Tensor]) -> Servable:
    """A perception model with the weights of `state`; what only its loss learned is left out."""
    plain = replace(config, diffusion=replace(config.diffusion, weighting="none"))
    dit = network(plain.model, plain.diffusion)
    load_weights(dit, state)
    return Perception(plain, dit).servable()


def facts_of(config: PerceptionConfig, said: Mapping[str, Any]) -> Facts:
    """What a card says of a perception model that was trained here."""
    about, stages = said["about"], [*said["about"].get("lineage", ()), {**said, "stage": said["stage"]}]
    tasks = {
        task: {"label": label, "coding": config.coding.get(task, {}), "defaults": defaults_of(task, max(config.size))}
        for task, label in config.tasks.items()
    }
    told = ", ".join(f"{stage['stage']} {stage.get('step', 0)} steps" for stage in stages)
    return {
        "summary": f"{shape_of(config)}; {told}.",
        "licence": UNKNOWN_LICENCE,
        "tasks": tasks,
        "training": {
            "data": [str(Path(path).name) for path in about.get("data", ())],
            "samples": sum(int(stage.get("samples", 0)) for stage in stages),
            "wall_clock_s": round(sum(float(stage.get("seconds", 0)) for stage in stages), 1),
            "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "configuration": "",
        },
    }


def shape_of(config: PerceptionConfig) -> str:
    """The network in words."""
    model = config.model
    words = [f"A diffusion transformer of width {model.width} and {model.depth} blocks on {config.codec.kind} latents"]
    if model.experts is not None:
        words.append(f"{model.experts.count} experts of which {model.experts.active} see a token")
    if model.inputs > 1:
        words.append("an input convolution for each task")
    if model.adapters is not None:
        words.append(f"adapters of rank {model.adapters.rank} for each task")
    if model.routing is not None:
        words.append("denoising task routing")
    return ", ".join(words)


def defaults_of(task: str, longer_edge: int) -> dict[str, Any]:
    """What callers get who ask for nothing: the papers' dial at a modest place."""
    reduction = {"depth": "aligned_median", "flow": "mean", "amodal": "mean"}[task]
    return {
        "steps": 10,
        "ensemble_size": 5,
        "reduction": reduction,
        "spacing": "trailing",
        "processing_resolution": longer_edge,
    }


def _default(state: Mapping[str, Tensor], said: Mapping[str, Any]) -> tuple[Servable, Facts]:
    """The default architecture (`training.train`)."""
    from training.models.perceiver import Config, Model
    from training.train import Recipe

    about = said["about"]
    try:
        recipe = build(Recipe, about["recipe"])
        std = tuple(about["latent_std"])
        model = Model(Config(latent_channels=len(std), latent_std=std, **recipe.model), recipe.noise)
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, InvalidInput) as error:
        raise ModelError(f"the run's checkpoint does not fit its configuration: {error}") from error
    training = {"samples": int(said["samples"]), "wall_clock_s": round(float(said["seconds"]), 1)}
    return default_servable(model, recipe.schedule, recipe.zero_terminal_snr), {
        "training": training,
        "depth_knee": recipe.depth_knee,
    }


def default_servable(model: Any, schedule: str, zero_terminal_snr: bool) -> Servable:
    """The default architecture's three modules."""
    from saccade.card import Latent, Noise
    from training.models.perceiver import TASKS

    config = model.config
    conditioning = (Spec("context", config.width, 2 * BLOCK), Spec("detail", config.detail_channels, BLOCK))
    latent = Latent(channels=config.latent_channels, stride=BLOCK, scale=1.0, multiple=MULTIPLE)
    noise = Noise(schedule=schedule, zero_terminal_snr=zero_terminal_snr, prediction="v_prediction")  # type: ignore[arg-type]
    labels = tuple(range(len(TASKS)))
    return Servable(
        model.encoder, model.denoiser, model.codec, conditioning, latent, noise, len(model.codec.kept), labels,
        DEFAULT_TOLERANCE, DEFAULT_SIZES,
    ).eval()  # fmt: skip


def model_name(run: Path) -> str:
    """A name that a repository takes, made of the run's folder's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name).strip("-._")[:100] or "run"


def merged(found: Facts, written: Mapping[str, Any], name: str | None = None) -> Facts:
    """The facts of a run with what people wrote over them; of the training, both. Raises InvalidInput where the two say
    different things of what the model was trained on."""
    found = dict(found)
    knee = found.pop("depth_knee", None)
    facts = {**found, **written}
    facts["training"] = {**found.get("training", {}), **written.get("training", {})}
    for measured in ("samples", "wall_clock_s"):
        if measured in found.get("training", {}):
            facts["training"][measured] = found["training"][measured]
    if name:
        facts["name"] = name
    _check_codings(found, facts, knee)
    return facts


def _check_codings(found: Facts, facts: Facts, knee: float | None) -> None:
    depth = facts.get("tasks", {}).get("depth")
    if knee is not None and depth is not None:
        said = depth.get("coding", {}).get("knee") or 0
        if said != knee:
            raise InvalidInput(f"the facts code depth with knee {said}, the run with {knee:g}", param="facts")
    for task, fact in found.get("tasks", {}).items():
        told = facts["tasks"].get(task)
        if told is not None and (told.get("coding", {}), told["label"]) != (fact["coding"], fact["label"]):
            raise InvalidInput(f"the facts code or label {task} otherwise than the run did: {fact}", param="facts")
