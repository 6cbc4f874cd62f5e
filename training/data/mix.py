"""Several sources at once, each with its weight, every one of them still gone through in its own epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from saccade.errors import InvalidInput
from training.data.batch import Batch, Source, check_request

PERIOD = 1024  # rows after which the shares have been met exactly


class Mixture:
    """`parts`: task -> [(source, weight)]; a task's rows come from its sources in proportion to their weights.

    Which source a row comes from is a shuffled list of 1024, another one each time, so the number of rows that a source
    has given before any row is known without counting, and it reads on in its own order. Shares are exact over 1024
    rows (rounded to 1/1024, and never to nothing).
    """

    def __init__(self, parts: Mapping[str, Sequence[tuple[Source, float]]], seed: int = 0) -> None:
        self.parts = {task: list(sources) for task, sources in parts.items() if sources}
        if not self.parts:
            raise InvalidInput("a mixture needs at least one source")
        self.seed = seed
        self._shares = {task: _shares([weight for _, weight in sources]) for task, sources in self.parts.items()}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def batch(self, step: int, task: str, count: int, size: tuple[int, int], first: int | None = None) -> Batch:
        """See `training.data.batch.Source`. Rows keep the order in which they were drawn."""
        check_request(task, count, size)
        if task not in self.parts:
            raise InvalidInput(f"the mixture has no {task}; it has {', '.join(self.parts)}", param="task")
        first = step * count if first is None else first
        chosen, before = self._chosen(task, first, count)
        out: dict[str, np.ndarray] = {}
        for number, (source, _) in enumerate(self.parts[task]):
            rows = np.flatnonzero(chosen == number)
            if not len(rows):
                continue
            batch = source.batch(step, task, len(rows), size, first=int(before[number]))
            for field in fields(Batch):
                part = getattr(batch, field.name)
                out.setdefault(field.name, np.empty((count, *part.shape[1:]), part.dtype))[rows] = part
        return Batch(**out)

    def _chosen(self, task: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row [count], and how many rows each source had given before the first."""
        shares = self._shares[task]
        period, offset = divmod(first, PERIOD)
        before = shares * period + np.bincount(self._pattern(task, period)[:offset], minlength=len(shares))
        patterns = [self._pattern(task, n) for n in range(period, (first + count - 1) // PERIOD + 1)]
        return np.concatenate(patterns)[offset : offset + count], before

    def _pattern(self, task: str, period: int) -> np.ndarray:
        shares = self._shares[task]
        rng = np.random.default_rng([self.seed, period, list(self.parts).index(task)])
        return rng.permutation(np.repeat(np.arange(len(shares)), shares))


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers in proportion to the weights that add up to PERIOD, each at least 1 (largest remainders)."""
    given = np.asarray(weights, float)
    if not np.isfinite(given).all() or (given <= 0).any() or len(given) > PERIOD:
        raise InvalidInput("weights are finite numbers above 0")
    wanted = given / given.sum() * PERIOD
    shares = np.maximum(1, np.floor(wanted)).astype(np.int64)
    while (left := PERIOD - shares.sum()) != 0:
        at = np.argmax(wanted - shares) if left > 0 else np.argmax(np.where(shares > 1, shares - wanted, -np.inf))
        shares[at] += np.sign(left)
    return shares
