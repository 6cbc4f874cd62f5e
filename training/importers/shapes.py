"""What the shapes of a transformer's weights say of its configuration."""

from __future__ import annotations

import math
import re

from torch import Tensor

from saccade.errors import InvalidInput, ModelError
from training.importers.reading import State
from training.models.dit import SIZES
from training.models.embed import sincos_positions

_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
POSITION_TOLERANCE = 1e-5


def shape_of(state: State, key: str, rank: int) -> tuple[int, ...]:
    """The shape of a weight that must be there. Raises ModelError."""
    if key not in state:
        raise ModelError(f"the weight {key} is missing")
    shape = tuple(state[key].shape)
    if len(shape) != rank or 0 in shape:
        raise ModelError(f"{key} is {list(shape)}, not a tensor of {rank} dimensions")
    return shape


def depth_of(state: State) -> int:
    """How many blocks; a gap among them shows when the weights are put into the model."""
    found = {int(match[1]) for key in state if (match := _BLOCK.match(key))}
    if not found:
        raise ModelError("there are no blocks")
    return max(found) + 1


def heads_of(width: int, depth: int, heads: int | None) -> int:
    """As told, else of the named size that is so wide and deep. Raises InvalidInput: weights do not tell."""
    if heads is not None:
        return heads
    known = {size[1] for size in SIZES.values() if (size[0], size[2]) == (width, depth)}
    if len(known) != 1:
        raise InvalidInput(
            f"weights do not tell how many heads a transformer of width {width} and depth {depth} has: say so (heads)",
            param="heads",
        )
    return known.pop()


def channels_of(state: State, conv: str, conditions: int) -> tuple[int, int, int, bool]:
    """(width, channels, patch, learn_sigma) by the input convolution `conv` and the last layer.

    `conditions`: latents in front of the noisy one. Raises ModelError where the two disagree.
    """
    width, inputs, patch, across = shape_of(state, conv, 4)
    rows = shape_of(state, "final_layer.linear.weight", 2)[0]
    channels, rest = divmod(inputs, conditions + 1)
    if patch != across or rest or rows not in (channels * patch**2, 2 * channels * patch**2):
        raise ModelError(
            f"{conv} {[width, inputs, patch, across]} and the last layer's {rows} rows are not of one transformer"
        )
    return width, channels, patch, rows == 2 * channels * patch**2


def grid_of(state: State, width: int, told: int | None, otherwise: int) -> int:
    """Tokens per edge: by the positions in the file, which must be those that we compute, else as told."""
    if "pos_embed" not in state:
        return told or otherwise
    shape = tuple(state["pos_embed"].shape)
    grid = math.isqrt(math.prod(shape[:-1]))
    if shape != (1, grid * grid, width) or grid == 0 or (told is not None and told != grid):
        raise ModelError(f"pos_embed is {list(shape)}, not the positions of a square of {told or grid} tokens")
    ours: Tensor = sincos_positions(width, grid, grid, grid)[None]
    if (ours - state["pos_embed"]).abs().max() > POSITION_TOLERANCE:
        raise ModelError("pos_embed is not DiT's fixed sinusoids: learned positions are not supported")
    return grid
