"""The perception generalist published with "Scaling Properties of Diffusion Models for Perceptual Tasks" (Apache-2.0).

A transformer with plain experts and an input convolution per task. Its latents are [rgb, prompt, noisy target]; labels
1000 depth, 1001 amodal, 1002 and 1003 flow's u and v, in two runs. Its own file names a cosine schedule, but the code
that it was trained with loads Stable Diffusion 2's scheduler: that is what the card says, unless told otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saccade.errors import ModelError
from training.importers import keys
from training.importers.imported import Choices, Imported, perceiver
from training.importers.reading import State, read_state
from training.importers.shapes import channels_of, depth_of, grid_of, heads_of, shape_of
from training.models.dit import DiTConfig
from training.models.moe import Experts

FIRST_LABEL = 1000
ACTIVE = 2
GRID = 32
FLOW_PX = 75.0
GROUND = 250
STEPS = 20
INPUTS = "x_embedder.proj.conv_in_"
SUMMARY = "Depth, flow and amodal completion by one mixture-of-experts diffusion transformer: the published generalist."
SCHEDULER = {
    "schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction": "v_prediction",
    "steps_offset": 1,
    "final": "first",
}
"""Stable Diffusion 2's, with `leading` timesteps."""


def load(place: Path, choices: Choices) -> Imported:
    """Raises ModelError for what is not such a file, InvalidInput where heads must be told."""
    state = read_state(place)
    config = config_of(state, choices)
    ours = keys.to_ours("generalist", state)
    coding = {"depth": {"channels": 3}, "amodal": {"context": None, "ground": GROUND}}
    tasks = tasks_of(choices, 8 * config.grid * config.patch)
    return perceiver("generalist", config, ours, choices.noise(**SCHEDULER), choices, SUMMARY, tasks, coding)


def config_of(state: State, choices: Choices) -> DiTConfig:
    """By the shapes. Raises ModelError where the input convolutions are not one for each label."""
    width, channels, patch, learn_sigma = channels_of(state, f"{INPUTS}1.weight", conditions=2)
    inputs = sum(key.startswith(INPUTS) and key.endswith(".weight") for key in state)
    labels = shape_of(state, "y_embedder.embedding_table.weight", 2)[0]
    if inputs != 4 or labels < FIRST_LABEL + inputs:
        raise ModelError(f"{inputs} input convolutions and {labels} labels: the generalist has 4, from label 1000 on")
    depth = depth_of(state)
    count = shape_of(state, "blocks.0.moe.gate.weight", 2)[0]
    return DiTConfig(
        width,
        heads_of(width, depth, choices.heads),
        depth,
        channels,
        condition=2 * channels,
        patch=patch,
        labels=labels,
        grid=grid_of(state, width, choices.grid, GRID),
        learn_sigma=learn_sigma,
        inputs=inputs,
        first_label=FIRST_LABEL,
        experts=Experts(count, choices.active or min(ACTIVE, count), shared=False, gated=False),
        routing=choices.routing(),
    )


def tasks_of(choices: Choices, edge: int) -> dict[str, dict[str, Any]]:
    """The card's. Prompts: ones for depth (every pixel is valid), the visible mask, the second frame."""

    def defaults(reduction: str) -> dict[str, Any]:
        return {
            "steps": choices.steps or STEPS,
            "ensemble_size": 1,
            "reduction": reduction,
            "spacing": choices.spacing or "leading",
            "processing_resolution": edge if choices.resolution is None else choices.resolution,
        }

    return {
        "depth": {
            "label": FIRST_LABEL,
            "blank": 1.0,
            "coding": {"channels": 3},
            "defaults": defaults("aligned_median"),
        },
        "flow": {
            "label": FIRST_LABEL + 2,
            "passes": [FIRST_LABEL + 3],
            "coding": {"linear_px": FLOW_PX, "channels": 3},
            "defaults": defaults("mean"),
        },
        "amodal": {
            "label": FIRST_LABEL + 1,
            "coding": {"context": None, "ground": GROUND},
            "defaults": defaults("mean"),
        },
    }
