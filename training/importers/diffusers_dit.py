"""diffusers' DiTTransformer2DModel: a folder with config.json, or a DiTPipeline's with transformer/, vae/, scheduler/.

Two things are theirs and not Meta's. Their timestep sinusoids divide by half - 1 instead of half; the import keeps
them (`frequency_shift`), for it is to compute what the folder computes in its own library. And the second layer
norm of a block has an epsilon of its own (1e-5), where ours is 1e-6 everywhere: of activations of deviation 1 that is
5e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saccade.errors import ModelError
from training.importers import keys
from training.importers.imported import Choices, Imported, generator
from training.importers.reading import State, read_json, read_state
from training.importers.schedulers import scheduler_of
from training.importers.shapes import shape_of
from training.models.dit import DiTConfig

CLASS = "DiTTransformer2DModel"
LARGEST_EPSILON = 1e-5
SUMMARY = "A class-conditional diffusion transformer, imported from a folder of diffusers."
EXPECTED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}


def load(place: Path, choices: Choices) -> Imported:
    """Raises ModelError for what is not such a folder."""
    folder = place / "transformer" if (place / "transformer").is_dir() else place
    said = read_json(folder / "config.json")
    state = read_state(folder)
    ours = keys.to_ours("diffusers-dit", state)
    config = config_of(said, ours, choices)
    scheduler = place / "scheduler"
    found = scheduler_of(scheduler).noise if scheduler.is_dir() else {"schedule": "linear", "prediction": "epsilon"}
    return generator("diffusers-dit", config, ours, choices.noise(**found), choices, SUMMARY, place / "vae")


def config_of(said: dict[str, Any], ours: State, choices: Choices) -> DiTConfig:
    """By their configuration, where it agrees with the weights' shapes (in our names). Raises ModelError."""
    if said.get("_class_name") != CLASS:
        raise ModelError(f"config.json is of {said.get('_class_name')}, not of {CLASS}")
    for name, wanted in EXPECTED.items():
        if said.get(name, wanted) != wanted:
            raise ModelError(f"{CLASS} with {name} {said[name]!r} is not supported, only {wanted!r}")
    if not 0 < _number(said, "norm_eps", 1e-5) <= LARGEST_EPSILON:
        raise ModelError(f"{CLASS} with norm_eps {said['norm_eps']!r}: ours is 1e-6, and more than 1e-5 would be heard")
    width, channels, patch, _ = shape_of(ours, "x_embedder.proj.weight", 4)
    heads = int(_number(said, "num_attention_heads", 16))
    size = int(_number(said, "sample_size", 32))
    return DiTConfig(
        width,
        choices.heads or heads,
        int(_number(said, "num_layers", 28)),
        channels,
        patch=patch,
        labels=shape_of(ours, "y_embedder.embedding_table.weight", 2)[0],
        grid=choices.grid or size // patch,
        learn_sigma=shape_of(ours, "final_layer.linear.weight", 2)[0] == 2 * channels * patch**2,
        frequency_shift=1,
        routing=choices.routing(),
    )


def _number(said: dict[str, Any], name: str, default: float) -> float:
    value = said.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise ModelError(f"config.json: {name} {value!r} cannot be")
    return value
