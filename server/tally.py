"""How often the graphs of one model ran, in batches of which size, and for how long."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Duration:
    """`count` times, `seconds` in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass
class Tally:
    """Batches of each kind by their rows, whoever asked for them."""

    batches: defaultdict[str, defaultdict[int, Duration]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Duration))
    )

    def add(self, kind: str, rows: int, seconds: float) -> None:
        self.batches[kind][rows].add(seconds)

    def rows(self, kind: str) -> int:
        return sum(rows * ran.count for rows, ran in self.batches[kind].items())

    def runs(self, kind: str) -> int:
        return sum(ran.count for ran in self.batches[kind].values())
