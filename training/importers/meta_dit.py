"""Meta's DiT (Peebles & Xie 2212.09748): one file, class-conditional, epsilon on a linear schedule.

Their training scripts save {"model", "ema", "opt", "args"}; their published files are the averaged weights alone.
Denoising Task Routing (Park et al. 2310.07138) is the same file with a table of masks in every block, which tells how
it routes.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from saccade.errors import ModelError
from training.importers import keys
from training.importers.imported import Choices, Imported, generator
from training.importers.reading import State, read_state
from training.importers.shapes import channels_of, depth_of, grid_of, heads_of, shape_of
from training.models.dit import DiTConfig
from training.models.moe import Experts
from training.models.routing import Routing, channel_masks

CONV = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
GRID = 16
TIMESTEPS = 1000
ALPHAS = (4.0, *(half / 2 for half in range(1, 21) if half != 8))
"""The paper's first, then those that its study might have tried."""
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
        routing=routing_of(state, choices, width, depth),
    )


def routing_of(state: State, choices: Choices, width: int, depth: int) -> Routing | None:
    """By the tables of masks, one a block, [1000, width]; as told where there are none.

    Raises ModelError for tables that differ, are missing from a block, or are no window that moves by a power of t (by
    the one that was told).
    """
    tables = {key: table for key, table in state.items() if re.fullmatch(keys.ROUTING_TABLE.theirs, key)}
    if not tables:
        return choices.routing()
    first, *others = tables.values()
    if len(tables) != depth or any(other.shape != first.shape or bool((other != first).any()) for other in others):
        raise ModelError(f"{len(tables)} tables of task routing (_unit_mapping) in {depth} blocks: not one for all")
    if first.shape != (TIMESTEPS, width):
        raise ModelError(f"a table of task routing is {list(first.shape)}, not {[TIMESTEPS, width]}")
    alphas = ALPHAS if choices.dtr_alpha is None else (choices.dtr_alpha,)
    beta = beta_of(first) if choices.dtr_beta is None else choices.dtr_beta
    for routing in (Routing(alpha, beta) for alpha in alphas):
        if bool((channel_masks(routing, width, TIMESTEPS) == first).all()):
            return routing
    sought = "alpha 0.5 to 10 in halves" if choices.dtr_alpha is None else f"alpha {choices.dtr_alpha:g}"
    raise ModelError(f"the file's tables of task routing are not DTR's windows of {sought}, beta {beta:g}")


def beta_of(table: Tensor) -> float:
    """The roundest share that gives as many channels as the first row has. Raises ModelError for a row of none."""
    width, active = table.shape[1], int(table[0].sum())
    if not 1 <= active <= width:
        raise ModelError(f"a table of task routing has {active} of {width} channels at timestep 0")
    betas = (round(active / width, digits) for digits in (1, 2, 3, 4))
    return next((b for b in betas if 0 < b <= 1 and int(b * width) == active), min(1.0, (active + 0.5) / width))
