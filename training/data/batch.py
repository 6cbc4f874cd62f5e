"""What training sees: a batch of coded rows, and the promise of whoever makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput

PLANES = 4
CELL = 8  # picture pixels per cell of `weight`
ENOUGH = 0.7  # share of a cell that must be known for it to count
TASKS = ("depth", "flow", "amodal")


@dataclass(frozen=True)
class Batch:
    """image, prompt [B, 3, H, W] and target [B, 4, H, W] float32 in about [-1, 1]; weight [B, H/8, W/8] in {0, 1}, zero
    where the truth is unknown."""

    image: NDArray[np.float32]
    prompt: NDArray[np.float32]
    target: NDArray[np.float32]
    weight: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One row of a batch: image, prompt [3, H, W], target [4, H, W] float32, known [H, W] bool."""

    image: np.ndarray
    prompt: np.ndarray
    target: np.ndarray
    known: np.ndarray


@runtime_checkable
class Source(Protocol):
    """Whatever makes batches."""

    def batch(self, step: int, task: str, count: int, size: tuple[int, int], first: int | None = None) -> Batch:
        """`count` samples of `task` at (H, W), a pure function of its arguments and of the files on disk.

        `step` numbers the draws: whoever draws several times a step (several processes, accumulated gradients) numbers
        them step * parts + part. `first` is the number of the batch's first row among all rows ever drawn of this task,
        by default step * count: a source that goes through a finite dataset in epochs reads on from there.
        """
        ...


def sample(image: np.ndarray, prompt: np.ndarray, planes: Sequence[np.ndarray], known: np.ndarray) -> Sample:
    """Pictures [H, W, 3] in 0..255 and coded planes [H, W] to a row; the planes that a task has not are 0."""
    target = np.zeros((PLANES, *known.shape), np.float32)
    target[: len(planes)] = planes
    coded = [np.moveaxis(p.astype(np.float32) / 127.5 - 1, -1, 0) for p in (image, prompt)]
    return Sample(coded[0], coded[1], target, known)


def collate(rows: Sequence[Sample]) -> Batch:
    """Rows of one size to a batch; a cell of 8 x 8 pixels counts where more than 0.7 of it is known."""
    height, width = rows[0].known.shape
    known = np.stack([r.known for r in rows])[:, None].astype(np.float32)
    share = known.reshape(len(rows), height // CELL, CELL, width // CELL, CELL).mean((2, 4))
    return Batch(
        *(np.stack([getattr(r, f) for r in rows]) for f in ("image", "prompt", "target")),
        (share > ENOUGH).astype(np.float32),
    )


def check_request(task: str, count: int, size: tuple[int, int]) -> None:
    """Raise InvalidInput for a task, a number or a size that no batch can have."""
    if task not in TASKS:
        raise InvalidInput(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}", param="task")
    if count < 1:
        raise InvalidInput(f"a batch has at least one sample, not {count}", param="count")
    if len(size) != 2 or any(edge < CELL or edge % CELL for edge in size):
        raise InvalidInput(f"sizes are (H, W) in multiples of {CELL} pixels, not {size}", param="size")
