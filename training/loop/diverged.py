"""A loss that is no number: the batch is kept, so that someone can look."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from saccade.errors import SaccadeError
from training.loop import tree
from training.loop.world import World

log = logging.getLogger(__name__)


class Diverged(SaccadeError, FloatingPointError):
    """A loss or a gradient is not finite; the batch is saved beside the run, the weights are as they were."""


def keep_batches(out: Path, step: int, batches: Sequence[tuple[int, Any]], world: World) -> str:
    """Write (part, batch) as OUT/diverged/step-S-part-P.safetensors, all processes together; where, in words."""
    folder, names = out / "diverged", list[str]()
    for part, batch in batches:
        name = f"step-{step:08d}-part-{part}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({key: value.cpu().contiguous() for key, value in tree.leaves(batch)}, folder / name)
            names.append(name)
        except (OSError, SafetensorError, RuntimeError) as error:  # what matters is the loss
            log.warning("the batch could not be saved: %s", error)
    saved = sorted(name for some in world.gather(names) for name in some)
    return f"; its batch is in {folder}: {', '.join(saved)}" if saved else ""
