"""Power laws of a sweep over compute: which model is best at every budget, and how the loss falls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.report import table_markdown
from training.scaling import COMPUTE_EXPONENTS, PowerLaw, exponent_range

Row = dict[str, Any]
LEAST = 3  # points, to fit a law without a floor: one more than it has numbers
LEAST_FLOOR = LEAST + 1  # through three points a law with a floor always goes, and says nothing


def of(rows: Sequence[Row], budget: str) -> dict[str, Any]:
    """Laws through the best run of every budget, and through each model's own; empty while there are too few.

    `noise`: relative deviation of the loss between seeds of the same run (its estimate, pooled over the runs that were
    repeated), None where none was.
    """
    own = [row for row in rows if row["seed"] == 0]
    best = frontier(own, budget)
    noise = seed_noise(rows)
    law: dict[str, Any] = {"noise": noise, "frontier": [point(row) for row in best], "laws": {}, "models": {}}
    if len(best) < LEAST:
        return law
    macs, loss = [row["macs"] for row in best], [row["loss"]["mean"] for row in best]
    law["laws"]["without a floor"] = fitted(macs, loss, False, noise)
    if len(best) >= LEAST_FLOOR:
        law["laws"]["with a floor"] = fitted(macs, loss, True, noise)
    sizes = PowerLaw.fit(macs, [row["parameters"]["total"] for row in best], -COMPUTE_EXPONENTS[::-1], floor=False)
    law["size"] = {"exponent": -sizes.exponent, "gain": sizes.gain}
    for name, line in by_model(own, budget).items():
        if len(line) >= LEAST:
            law["models"][name] = fitted(
                [row["macs"] for row in line], [row["loss"]["mean"] for row in line], False, noise
            )
    return law


def fitted(macs: Sequence[float], loss: Sequence[float], floor: bool, noise: float | None) -> dict[str, Any]:
    law = PowerLaw.fit(macs, loss, COMPUTE_EXPONENTS, floor)
    said: dict[str, Any] = {
        "floor": law.floor,
        "gain": law.gain,
        "exponent": law.exponent,
        "residual": law.residual,
        "relative_residual": law.residual / float(np.mean(loss)),
        "points": len(macs),
    }
    if noise is not None:
        said["exponent_90"] = exponent_range(macs, loss, noise, exponents=COMPUTE_EXPONENTS, floor=floor)
    return said


def frontier(rows: Sequence[Row], budget: str) -> list[Row]:
    """The run of the least loss at every budget at which most models were trained, in order of compute."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["point"][budget]].append(row)
    most = len(by_model(rows, budget)) / 2
    best = [min(group, key=lambda row: row["loss"]["mean"]) for group in groups.values() if len(group) > most]
    return sorted(best, key=lambda row: row["macs"])


def by_model(rows: Sequence[Row], budget: str) -> dict[str, list[Row]]:
    """Model -> its runs in order of compute."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines["-".join(choice for d, choice in row["point"].items() if d != budget)].append(row)
    return {name: sorted(line, key=lambda row: row["macs"]) for name, line in lines.items()}


def seed_noise(rows: Sequence[Row]) -> float | None:
    """Pooled relative deviation of the held-out loss between seeds of one run."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups["-".join(row["point"].values())].append(float(np.log(row["loss"]["mean"])))
    repeated = [values for values in groups.values() if len(values) > 1]
    if not repeated:
        return None
    return float(np.sqrt(sum(np.var(v, ddof=1) * (len(v) - 1) for v in repeated) / sum(len(v) - 1 for v in repeated)))


def along_markdown(rows: Sequence[Row], dimension: str) -> str:
    """A law through the held-out loss over a dimension whose choices are numbers, or why there is none."""
    own = [row for row in rows if row["seed"] == 0 and positive(row["point"][dimension])]
    places = sorted((float(row["point"][dimension]), row["loss"]["mean"]) for row in own)
    if len(places) < LEAST:
        return f"No law through the held-out loss L({dimension}): {too_few(len(places), 'choices that are numbers')}."
    law = PowerLaw.fit(*zip(*places, strict=True), floor=len(places) >= LEAST_FLOOR)
    floor = f"{law.floor:.4f} {law.gain:+.4f}" if len(places) >= LEAST_FLOOR else f"{law.gain:.4f}"
    return (
        f"Through the held-out loss L({dimension}): {floor} n^-{law.exponent:.2f}, "
        f"residual {law.residual:.4f} over {len(places)} points.{without_floor(len(places))}"
    )


def positive(choice: str) -> bool:
    """Whether a choice's name is a number above 0, as those of runs shown beside are not."""
    try:
        return 0 < float(choice) < float("inf")
    except ValueError:
        return False


def too_few(count: int, what: str) -> str:
    return f"there are {count} {what}, and it takes {LEAST}"


def without_floor(points: int) -> str:
    """Why there is no floor; empty where there is one."""
    if points >= LEAST_FLOOR:
        return ""
    return f" No floor was fitted: that takes {LEAST_FLOOR} points, and there are {points} for its three numbers."


def point(row: Row) -> dict[str, Any]:
    return {
        "run": row["run"],
        "macs": row["macs"],
        "parameters": row["parameters"]["total"],
        "samples": row["samples"],
        "loss": row["loss"]["mean"],
    }


def markdown(law: dict[str, Any]) -> str:
    """The laws as a table, and what chance does; or why there are none."""
    if not law["laws"]:
        few = too_few(len(law["frontier"]), "budgets with more than half of the models")
        return f"No law of compute yet: {few}."
    fits = {f"best of every budget, {name}": fit for name, fit in law["laws"].items()} | law["models"]
    rows = []
    for name, fit in fits.items():
        spread = "{:.3f} to {:.3f}".format(*fit["exponent_90"]) if "exponent_90" in fit else "no repeated seeds"
        share = f"{fit['relative_residual']:.1%}"
        rows.append([name, f"{fit['floor']:.3f}", f"{fit['gain']:.3g}", f"{fit['exponent']:.3f}", spread, share])
    head = ["L(C) = floor + gain C^-exponent", "floor", "gain", "exponent", "90% by seeds' noise", "residual"]
    noise = f"Noise between seeds: {law['noise']:.2%} of the loss. " if law["noise"] is not None else ""
    best = "; ".join(
        f"{p['macs']:.1e} MACs: {p['parameters'] / 1e6:.2f}M parameters, {p['loss']:.4f}" for p in law["frontier"]
    )
    sizes = f"Best size grows as C^{law['size']['exponent']:.2f}."
    floor = without_floor(len(law["frontier"]))
    return "\n\n".join([table_markdown(head, rows), f"{noise}Best of every budget: {best}. {sizes}{floor}"])


def scientific(value: float) -> str:
    """3.04e12 -> "3.0e12"."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
