"""A backend in NumPy that writes down what it ran, and runs when told to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.card import Card
from saccade.repository import Repository


@dataclass
class Recorder:
    """Denoising multiplies by two, decoding adds one, encoding passes on. A row is known by its latent's first number.

    `batches`: the rows of every denoising batch. `ran`: every batch's kind and size, in order. While `gate` is clear,
    batches stand still. `error` is raised by batches that hold the row `poison`, or by all where that is None.
    `lone`: for every batch, whether it was told that it is alone; its steps then give `alone_gives` times the latent.
    """

    card: Card
    batches: list[list[float]] = field(default_factory=list)
    ran: list[tuple[str, int]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    poison: float | None = None
    lone: list[bool] = field(default_factory=list)
    alone_gives: float = 2.0
    together: int = 0
    most_together: int = 0
    closed: bool = False

    @classmethod
    def of(cls, repository: Path, *, open: bool = True) -> Recorder:
        recorder = cls(Repository(repository).card("toy"))
        if open:
            recorder.gate.set()
        return recorder

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        await self.run("encode", image, ticket)
        return {name: image[:, :1, ::8, ::8] for name in self.card.conditioning}

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        self.batches.append([float(row.flat[0]) for row in latent])
        await self.run("denoise", latent, ticket)
        return latent * np.float32(self.alone_gives if ticket.alone else 2)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        await self.run("decode", latent, ticket)
        return latent + 1

    async def specialise(self, batch_size: int) -> list[tuple[int, int]]:
        return []

    async def run(self, kind: str, rows: Array, ticket: Ticket) -> None:
        self.ran.append((kind, len(rows)))
        self.lone.append(ticket.alone)
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        finally:
            self.together -= 1
        if self.error is not None and (self.poison is None or self.poison in rows[:, 0, 0, 0]):
            raise self.error

    async def aclose(self) -> None:
        self.closed = True
