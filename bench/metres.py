"""How many points the fit of `known_depths` needs, and what it does with wrong ones (the table in docs/metres.md).

    python -m bench.metres [--trials 200]

Predictions are uniform in 0 .. 1, the truth is 2 + 5 p metres, and points err by 0.3 m (6% of the range). *Accepted*:
such points are not refused. *Scale held*: with (n - 2) // 2 of them replaced by random metres, the scale is within 30%.
*Refused*: points that are random altogether.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from saccade import metres
from saccade.errors import MetresUndetermined
from saccade.metres import Float64, Metres

SCALE, SHIFT, NOISE = 5.0, 2.0, 0.3
COUNTS = (4, 6, 10, 20, 50)


def tried(predicted: Float64, known: Float64) -> Metres | None:
    try:
        return metres.fit(predicted, known)
    except MetresUndetermined:
        return None


def row(points: int, trials: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Shares of the trials: accepted, scale held, refused."""
    accepted = held = refused = 0
    for _ in range(trials):
        predicted, random = rng.random(points), rng.uniform(1, 10, points)
        refused += tried(predicted, random) is None
        known = SHIFT + SCALE * predicted + rng.normal(0, NOISE, points)
        accepted += tried(predicted, known) is not None
        wrong = rng.permutation(points)[: (points - 2) // 2]
        known[wrong] = random[wrong]
        found = tried(predicted, known)
        held += found is not None and abs(found.scale - SCALE) < 0.3 * SCALE
    return accepted / trials, held / trials, refused / trials


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args(argv).trials
    rng = np.random.default_rng(1)
    sys.stdout.write("| points | accepted | scale held | random, refused |\n|---|---|---|---|\n")
    for points in COUNTS:
        shares = " | ".join(f"{share:.0%}" for share in row(points, trials, rng))
        sys.stdout.write(f"| {points} | {shares} |\n")


if __name__ == "__main__":
    main()
