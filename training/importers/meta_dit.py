"""Meta's DiT (Peebles & Xie 2212.09748): one file, class-conditional, epsilon on a linear schedule.

Their training scripts save {"model", "ema", "opt", "args"}; their published files are the averaged weights alone.
"""

from __future__ import annotations

from pathlib import Path

from training.importers import keys
from training.importers.imported import Choices, Imported, generator
from training.importers.reading import State, read_state
from training.importers.shapes import channels_of, depth_of, grid_of, heads_of, shape_of
from training.models.dit import DiTConfig
from training.models.moe import Experts
from training.models.routing import Routing

CONV = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
GRID = 16
SUMMARY = "A class-conditional diffusion transformer, imported from a checkpoint of Meta's DiT."


def load(place: Path, choices: Choices) -> Imported:
    """Raises ModelError for what is not such a file, InvalidInput where heads must be told."""
    state = read_state(place)
    config = config_of(state, choices)
    noise = choices.noise(schedule="linear", prediction="epsilon")
    return generator("meta-dit", config, keys.to_ours("meta-dit", state), noise, choices, SUMMARY)


def config_of(state: State, choices: Choices, experts: Experts | None = None) -> DiTConfig:
    """By the shapes of a file in Meta's names."""
    width, channels, patch, learn_sigma = channels_of(state, CONV, conditions=0)
    depth = depth_of(state)
    return DiTConfig(
        width,
        heads_of(width, depth, choices.heads),
        depth,
        channels,
        patch=patch,
        labels=shape_of(state, LABELS, 2)[0],
        grid=grid_of(state, width, choices.grid, GRID),
        learn_sigma=learn_sigma,
        experts=experts,
        routing=Routing() if choices.dtr else None,
    )
