"""Exact caches, bounded in bytes: what pictures were encoded to, and whole answers. Nothing in them is approximate."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.backends.pace import Pace
from saccade.backends.stepping import Stepping
from saccade.card import Card

ENTRY_BYTES = 1024
"""What an entry takes beside what it holds."""
LOOK_AGAIN_S = 0.05
Outcome = Literal["hit", "miss"]
T = TypeVar("T")


class Bounded(Generic[T]):
    """The entries that were used last, of `limit` bytes together; 0 keeps nothing. `heard` is told every look-up."""

    def __init__(self, limit: int, heard: Callable[[Outcome], None] = lambda _: None) -> None:
        self.limit, self.bytes = limit, 0
        self._heard = heard
        self._entries: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> T | None:
        found = self._entries.get(key)
        self._heard("miss" if found is None else "hit")
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: T, size: int) -> None:
        """Keep it, and let go of what was used longest ago; what is larger than everything together is not kept."""
        self.drop(key)
        size += ENTRY_BYTES
        if size > self.limit:
            return
        self._entries[key] = value, size
        self.bytes += size
        while self.bytes > self.limit:
            self.drop(next(iter(self._entries)))

    def drop(self, key: Hashable) -> None:
        _, size = self._entries.pop(key, (None, 0))
        self.bytes -= size


class Remembering:
    """A lane that encodes the same pictures once: those that it has seen lately, and those that are being encoded.

    The same pictures are those whose pixels, as the model takes them, task and model are the same. A caller waits for
    another one's encoding unless that would take longer than encoding it again, and begins anew if it leaves.
    """

    def __init__(self, lane: Stepping, limit: int, heard: Callable[[Outcome], None] = lambda _: None) -> None:
        self._lane = lane
        self._kept: Bounded[Conditioning] = Bounded(limit, heard)
        self._coming: dict[Hashable, tuple[Ticket, asyncio.Future[Conditioning | None]]] = {}

    @property
    def card(self) -> Card:
        return self._lane.card

    @property
    def pace(self) -> Pace:
        return self._lane.pace

    @property
    def bytes(self) -> int:
        return self._kept.bytes

    def before_s(self, ticket: Ticket) -> float:
        return self._lane.before_s(ticket)

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        if self._kept.limit == 0:
            return await self._lane.encode(image, prompt, task, ticket)
        key = self.card.digest, await asyncio.to_thread(_digest, image, prompt, task)
        pixels, label = image.shape[-2] * image.shape[-1], int(task[0])
        while (other := self._coming.get(key)) is not None:
            leader, coming = other
            encoding_s = self.pace.row_s("encode", pixels, label)
            if self._worth_encoding_again(encoding_s, ticket, leader):
                return await self._lane.encode(image, prompt, task, ticket)
            await asyncio.wait({coming}, timeout=max(LOOK_AGAIN_S, encoding_s))
            if coming.done() and (found := coming.result()) is not None:
                self._kept.get(key)
                return _unneeded(found, pixels, task, ticket)
        if (kept := self._kept.get(key)) is not None:
            return _unneeded(kept, pixels, task, ticket)
        return await self._encode(key, image, prompt, task, ticket)

    async def _encode(self, key: Hashable, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        coming: asyncio.Future[Conditioning | None] = asyncio.get_running_loop().create_future()
        self._coming[key] = ticket, coming
        found: Conditioning | None = None
        try:
            found = await self._lane.encode(image, prompt, task, ticket)
            self._kept.put(key, found, sum(value.nbytes for value in found.values()))
            return found
        finally:
            del self._coming[key]
            coming.set_result(found)

    def _worth_encoding_again(self, encoding_s: float, ticket: Ticket, leader: Ticket) -> bool:
        """Whether more work of others than an encoding is served between `ticket` and `leader`, whose row waits."""
        if leader.running:
            return False
        between_s = self._lane.before_s(leader) - self._lane.before_s(ticket) - ticket.work_s(self.pace)
        return between_s > encoding_s

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        return await self._lane.denoise(latent, timestep, task, conditioning, ticket)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return await self._lane.decode(latent, ticket)

    async def aclose(self) -> None:
        await self._lane.aclose()


@dataclass(frozen=True)
class Kept:
    """A whole answer: its file, and the headers that say what made it."""

    data: bytes
    media_type: str
    headers: dict[str, str]

    @property
    def size(self) -> int:
        return len(self.data)


def _digest(*arrays: Array | Labels) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _unneeded(found: Conditioning, pixels: int, task: Labels, ticket: Ticket) -> Conditioning:
    """An encoding that the ticket had planned, and that was there."""
    for label in task:
        ticket.plan(pixels=pixels, encode=-1, label=int(label))
    return found
