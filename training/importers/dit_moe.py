"""DiT-MoE (Fei et al. 2407.11633): Meta's names around experts, gated, with one shared expert of width 2 d.

Weights do not tell how many experts answer (2 in every published model, unless told), nor how a model was trained.
Those of their files that were trained with rectified flow predict what no DDIM step can use: only the epsilon ones can
be served.
"""

from __future__ import annotations

from pathlib import Path

from saccade.errors import ModelError
from training.importers import keys
from training.importers.imported import Choices, Imported, generator
from training.importers.meta_dit import config_of
from training.importers.reading import State, read_state
from training.importers.shapes import shape_of
from training.models.moe import Experts

ACTIVE = 2
GATE = "blocks.0.moe.gate.weight"
SHARED = "blocks.0.moe.shared_experts.gate_proj.weight"
SUMMARY = "A class-conditional diffusion transformer with a mixture of experts, imported from a checkpoint of DiT-MoE."


def load(place: Path, choices: Choices) -> Imported:
    """Raises ModelError for what is not such a file, InvalidInput where heads must be told."""
    state = read_state(place)
    config = config_of(state, choices, experts_of(state, choices.active))
    noise = choices.noise(schedule="linear", prediction="epsilon")
    return generator("dit-moe", config, keys.to_ours("dit-moe", state), noise, choices, SUMMARY)


def experts_of(state: State, active: int | None = None) -> Experts:
    """Raises ModelError for experts of another shape than the paper's, InvalidInput for more active than there are."""
    count, width = shape_of(state, GATE, 2)
    hidden = shape_of(state, "blocks.0.moe.experts.0.gate_proj.weight", 2)[0]
    shared = shape_of(state, SHARED, 2)[0] if SHARED in state else None
    if hidden != 4 * width or shared not in (None, 2 * width):
        raise ModelError(f"experts of width {hidden}, a shared one of {shared}: DiT-MoE's are 4 and 2 times {width}")
    return Experts(count, active or min(ACTIVE, count), shared=shared is not None, gated=True)
