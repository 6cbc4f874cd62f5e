"""What became of the inferences under /v2, in the shape of Triton's statistics extension."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from server.tally import Duration, Tally
from server.v2.raws import KINDS, Raw

_PHASES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


@dataclass
class Statistics:
    """Of one raw model. Phases are of requests under /v2; rows and batches are of whoever made the graph run."""

    phases: dict[str, Duration] = field(default_factory=lambda: {name: Duration() for name in _PHASES})
    last_ms: int = 0

    def succeeded(self, seconds: dict[str, float]) -> None:
        """`seconds` of queue, compute_input, compute_infer, compute_output."""
        for name, value in (seconds | {"success": sum(seconds.values())}).items():
            self.phases[name].add(value)
        self.last_ms = time.time_ns() // 1_000_000

    def failed(self, seconds: float) -> None:
        self.phases["fail"].add(seconds)

    def document(self, raw: Raw, tally: Tally) -> dict[str, Any]:
        kind = KINDS[raw.part]
        return {
            "name": raw.name,
            "version": raw.version,
            "last_inference": self.last_ms,
            "inference_count": tally.rows(kind),
            "execution_count": tally.runs(kind),
            "inference_stats": {name: _told(phase) for name, phase in self.phases.items()},
            "response_stats": {},
            "batch_stats": [_batch(rows, ran) for rows, ran in sorted(tally.batches[kind].items())],
            "memory_usage": [],
        }


def _batch(rows: int, ran: Duration) -> dict[str, Any]:
    nothing = _told(Duration(ran.count))
    return {"batch_size": rows, "compute_input": nothing, "compute_infer": _told(ran), "compute_output": nothing}


def _told(phase: Duration) -> dict[str, int]:
    return {"count": phase.count, "ns": round(phase.seconds * 1e9)}
