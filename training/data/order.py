"""In which order a dataset is gone through: every epoch its own permutation, any place at once, nothing stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput

ROUNDS = 6
_GOLDEN, _ONE, _TWO = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Order:
    """Sample numbers 0, 1, 2, ... over all epochs, each told which of `length` indices it is.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002), keyed by
    (seed, epoch). `shuffle=False` goes through the indices as they are.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True) -> None:
        if length < 1:
            raise InvalidInput(f"an order needs something to order, not {length} samples")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self._half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))

    def at(self, first: int, count: int) -> NDArray[np.int64]:
        """Indices [count] of the samples `first`, `first` + 1, ..."""
        if first < 0 or count < 0:
            raise InvalidInput(f"samples are counted from 0, not from {first}, and {count} of them cannot be had")
        numbers = np.arange(first, first + count, dtype=np.int64)
        if not self.shuffle:
            return numbers % self.length
        out = np.empty(count, np.int64)
        epochs = numbers // self.length
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            out[rows] = self._permuted((numbers[rows] % self.length).astype(np.uint64), int(epoch))
        return out

    def _permuted(self, places: NDArray[np.uint64], epoch: int) -> NDArray[np.int64]:
        keys = np.random.SeedSequence([self.seed, epoch]).generate_state(ROUNDS, np.uint64)
        values = self._shuffled(places, keys)
        while (outside := values >= self.length).any():
            values[outside] = self._shuffled(values[outside], keys)
        return values.astype(np.int64)

    def _shuffled(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low = np.uint64((1 << int(self._half)) - 1)
        left, right = values >> self._half, values & low
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & low)
        return (left << self._half) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer; wraps around by design."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _ONE
    values = (values ^ (values >> np.uint64(27))) * _TWO
    return values ^ (values >> np.uint64(31))
