"""Power laws: through a measured dial (what the next step or the next member buys) and through training compute.

    python -m training.scaling SWEEP.json --plot docs/images/scaling.png

SWEEP.json is what `saccade evaluate FOLDER --sweep --out DIR` leaves in DIR. For every task an error E (AbsRel,
end-point error, 1 - IoU) is fitted by E(n) = floor + gain n^-exponent against members at every number of steps, and
against steps at every number of members. A gain below zero says that E rises towards its floor. Prints Markdown.
`training.study` fits the same law to validation losses against compute, whose count is `training.cost`'s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar

from training.report import ALL, NAMES, table_markdown

AXES = ("ensemble_size", "steps")
WORDS = {"ensemble_size": "members", "steps": "steps"}
SHOWN = {"depth": "abs_rel", "flow": "epe_px", "amodal": "iou"}
EXPONENTS = np.geomspace(0.05, 4, 60)
COMPUTE_EXPONENTS = np.geomspace(0.002, 2, 120)  # the papers' own are as small as 0.01


@dataclass(frozen=True)
class PowerLaw:
    """E(n) = floor + gain n^-exponent; `residual`: root mean square of what it leaves over."""

    floor: float
    gain: float
    exponent: float
    residual: float

    def __call__(self, n: np.ndarray) -> np.ndarray:
        curve: np.ndarray = self.floor + self.gain * np.asarray(n, float) ** -self.exponent
        return curve

    @classmethod
    def fit(
        cls,
        n: Sequence[float],
        error: Sequence[float],
        exponents: np.ndarray = EXPONENTS,
        floor: bool = True,
    ) -> PowerLaw:
        """Least squares with floor >= 0 (or none: the form of the papers' L(C)) and an exponent within `exponents`,
        sorted. At least as many points as numbers to find, else ValueError. Given the exponent the rest is linear, so
        that one is searched alone: on the grid, then between the neighbours of the best."""
        numbers = 3 if floor else 2
        if len(n) < numbers:
            name = ("two", "three")[floor]
            raise ValueError(f"a power law has {name} numbers, and there are {len(n)} points")
        scale = float(np.min(n))  # powers of a compute of 10^12 are no numbers to do linear algebra with
        at = partial(cls._at, n=np.asarray(n, float) / scale, error=np.asarray(error, float), free=floor)
        best = int(np.argmin([at(float(x)).residual for x in exponents]))
        around = exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
        finer = minimize_scalar(lambda x: at(float(x)).residual, bounds=around, options={"xatol": 1e-6})
        law = min(at(float(exponents[best])), at(float(finer.x)), key=lambda law: law.residual)
        return replace(law, gain=law.gain * scale**law.exponent)

    @classmethod
    def _at(cls, exponent: float, n: np.ndarray, error: np.ndarray, free: bool) -> PowerLaw:
        term = n**-exponent
        floor, gain = 0.0, (term @ error) / (term @ term)
        if free:
            (found, beside), *_ = np.linalg.lstsq(np.stack([np.ones_like(term), term], 1), error, rcond=None)
            if found >= 0:
                floor, gain = found, beside
        left = np.sqrt(np.mean((floor + gain * term - error) ** 2))
        return cls(float(floor), float(gain), exponent, float(left))


def exponent_range(
    n: Sequence[float], error: Sequence[float], noise: float, draws: int = 200, **how: Any
) -> tuple[float, float]:
    """Where 90% of the exponents lie that are fitted when every error is moved by a relative `noise` (the deviation
    between seeds): what chance does to a law through so few points."""
    rng = np.random.default_rng(0)
    moved = np.asarray(error) * np.exp(rng.normal(0, noise, (draws, len(error))))
    found = [PowerLaw.fit(n, row, **how).exponent for row in moved]
    low, high = np.quantile(found, (0.05, 0.95))
    return float(low), float(high)


def errors(sweep: dict[str, Any], task: str) -> dict[tuple[int, int], float]:
    """(steps, members) -> error over all pictures of a task."""
    found = {
        (p["steps"], p["ensemble_size"]): p["mean"]["value"]
        for p in sweep["points"]
        if (p["mean"]["task"], p["mean"]["group"], p["mean"]["metric"]) == (task, ALL, SHOWN[task])
    }
    return {place: 1 - value if SHOWN[task] == "iou" else value for place, value in found.items()}


def lines(found: dict[tuple[int, int], float], axis: str) -> dict[int, tuple[list[int], list[float]]]:
    """Along `axis`, one line for each value of the other: other -> (n, errors)."""
    which = 1 if axis == "ensemble_size" else 0
    others = sorted({place[1 - which] for place in found})
    picked = {other: sorted((p[which], e) for p, e in found.items() if p[1 - which] == other) for other in others}
    return {other: ([n for n, _ in row], [e for _, e in row]) for other, row in picked.items()}


def name_of(task: str) -> str:
    metric = SHOWN[task]
    return f"{task}, 1 - IoU" if metric == "iou" else f"{task}, {NAMES[metric]}"


def laws_table(sweep: dict[str, Any]) -> str:
    """A row for every task and line: the law and how well it fits."""
    rows = []
    for task in SHOWN:
        for axis in AXES:
            for other, (n, error) in lines(errors(sweep, task), axis).items():
                law = PowerLaw.fit(n, error)
                fixed = f"{other} {WORDS[AXES[1 - AXES.index(axis)]]}"
                ends = f"{error[0]:.3f} -> {error[-1]:.3f}"
                parts = [f"{law.floor:.3f}", f"{law.gain:+.3f}", f"{law.exponent:.2f}", f"{law.residual:.4f}"]
                rows.append([name_of(task), f"{WORDS[axis]} {n[0]} to {n[-1]}, {fixed}", ends, *parts])
    return table_markdown(["error", "along", "measured", "floor", "gain", "exponent", "residual"], rows)


def plot(sweep: dict[str, Any], path: Path) -> Path:
    """Errors against members and against steps, one row a task, points measured and lines fitted. A PNG."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(len(SHOWN), len(AXES), squeeze=False)
    for row, task in zip(panels, SHOWN, strict=True):
        for panel, axis in zip(row, AXES, strict=True):
            for other, (n, error) in lines(errors(sweep, task), axis).items():
                (drawn,) = panel.plot(n, error, "o", markersize=4, label=str(other))
                fine = np.geomspace(n[0], n[-1], 100)
                panel.plot(fine, PowerLaw.fit(n, error)(fine), "-", color=drawn.get_color(), linewidth=1)
            panel.set_xscale("log", base=2)
            panel.set_xlabel(WORDS[axis])
            panel.set_ylabel(name_of(task))
            panel.legend(title=WORDS[AXES[1 - AXES.index(axis)]], fontsize=7, title_fontsize=7)
    figure.suptitle(f"{sweep['model']} {sweep['digest'][:12]} on {sweep['data']}: points measured, lines fitted")
    figure.savefig(path, dpi=110)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="power laws through a measured sweep of steps and members")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    sweep = json.loads(args.sweep.read_text())
    print(laws_table(sweep))
    if args.plot:
        plot(sweep, args.plot)


if __name__ == "__main__":
    main()
