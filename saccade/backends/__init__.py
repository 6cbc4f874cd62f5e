"""Where a model runs. One protocol: `embedded` is this process, `triton` another; `stepping` packs calls to either."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from saccade.card import Card

Array = NDArray[np.float32]
Labels = NDArray[np.int64]
Conditioning = Mapping[str, Array]


@dataclass
class Ticket:
    """One request's place in the house: whose work a call is, and how long that work stood waiting.

    A backend that queues calls `enqueue`, then `start` and `finish`, or `drop` when the caller has left. `queue_s`
    grows only while something of the request waits and nothing of it runs.
    """

    queue_s: float = 0.0
    waiting: int = 0
    running: int = 0
    _since: float = field(default_factory=time.perf_counter)

    def _tick(self) -> None:
        now = time.perf_counter()
        if self.waiting and not self.running:
            self.queue_s += now - self._since
        self._since = now

    def enqueue(self) -> None:
        self._tick()
        self.waiting += 1

    def start(self) -> None:
        self._tick()
        self.waiting -= 1
        self.running += 1

    def finish(self) -> None:
        self._tick()
        self.running -= 1

    def drop(self) -> None:
        self._tick()
        self.waiting -= 1


class Backend(Protocol):
    """Runs one model's three graphs on batches. Every row is a sample; rows never influence each other.

    Raises ModelError if an output has the wrong shape or is not finite, BackendUnavailable if nothing can run now.
    Cancelling the awaiting task withdraws work that has not started.
    """

    @property
    def card(self) -> Card: ...

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        """Pictures [B, 3, H, W] in [-1, 1] and label [B] -> the card's conditioning tensors, each [B, ...]."""
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
class Remote(Protocol):
    """A backend that runs elsewhere."""

    @property
    def states(self) -> Mapping[str, str]:
        """Address -> up, loading or gone."""
        ...
