"""Where a model runs. One protocol: `embedded` is this process, `triton` another; `stepping` packs calls to either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from saccade.backends.ticket import Plan, Ticket
from saccade.card import Card

__all__ = ["Array", "Backend", "Conditioning", "Labels", "Plan", "Remote", "Specialising", "Ticket"]

Array = NDArray[np.float32]
Labels = NDArray[np.int64]
Conditioning = Mapping[str, Array]


class Backend(Protocol):
    """Runs one model's three graphs on batches. Every row is a sample; rows never influence each other.

    Raises ModelError if an output has the wrong shape or is not finite, BackendUnavailable if nothing can run now.
    Cancelling the awaiting task withdraws work that has not started.
    """

    @property
    def card(self) -> Card: ...

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        """Pictures [B, 3, H, W] in [-1, 1] and label [B] -> the card's conditioning tensors, each [B, ...]; of a model
        without any, whatever its encoder gives."""
        ...

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        """Latent [B, C, h, w], timestep [B], label [B] -> the model's output [B, C, h, w]."""
        ...

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        """Unscaled latent [B, C, h, w] -> target picture [B, K, H, W]."""
        ...

    async def aclose(self) -> None: ...


@runtime_checkable
class Specialising(Protocol):
    """A backend that is faster at some sizes than at others."""

    async def specialise(self, batch_size: int) -> Sequence[tuple[int, int]]:
        """Get ready for the sizes that come most, in steps of so many rows. All that something was done for, (H, W) of
        the model's pictures. Before the first caller."""
        ...


@runtime_checkable
class Remote(Protocol):
    """A backend that runs elsewhere."""

    @property
    def states(self) -> Mapping[str, str]:
        """Address -> up, loading or gone."""
        ...
