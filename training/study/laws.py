"""Power laws of a sweep over compute: which model is best at every budget, and how the loss falls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.report import table_markdown
from training.scaling import COMPUTE_EXPONENTS, PowerLaw, exponent_range

Row = dict[str, Any]
LEAST = 3  # budgets, to fit a law with a floor


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
    for name, floor in (("without a floor", False), ("with a floor", True)):
        law["laws"][name] = fitted(macs, loss, floor, noise)
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
    if noise:
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
    """A law through the held-out loss over a dimension whose choices are numbers."""
    places = sorted((float(row["point"][dimension]), row["loss"]["mean"]) for row in rows if row["seed"] == 0)
    if len(places) < LEAST:
        return ""
    law = PowerLaw.fit(*zip(*places, strict=True))
    return (
        f"Through the held-out loss L({dimension}): {law.floor:.4f} {law.gain:+.4f} n^-{law.exponent:.2f}, "
        f"residual {law.residual:.4f} over {len(places)} points."
    )


def point(row: Row) -> dict[str, Any]:
    return {
        "run": row["run"],
        "macs": row["macs"],
        "parameters": row["parameters"]["total"],
        "samples": row["samples"],
        "loss": row["loss"]["mean"],
    }


def markdown(law: dict[str, Any]) -> str:
    """The laws as a table, and what chance does."""
    if not law["laws"]:
        return ""
    fits = {f"best of every budget, {name}": fit for name, fit in law["laws"].items()} | law["models"]
    rows = []
    for name, fit in fits.items():
        spread = "{:.3f} to {:.3f}".format(*fit["exponent_90"]) if "exponent_90" in fit else ""
        share = f"{fit['relative_residual']:.1%}"
        rows.append([name, f"{fit['floor']:.3f}", f"{fit['gain']:.3g}", f"{fit['exponent']:.3f}", spread, share])
    head = ["L(C) = floor + gain C^-exponent", "floor", "gain", "exponent", "90% by seeds' noise", "residual"]
    noise = f"Noise between seeds: {law['noise']:.2%} of the loss. " if law["noise"] else ""
    best = "; ".join(
        f"{p['macs']:.1e} MACs: {p['parameters'] / 1e6:.2f}M parameters, {p['loss']:.4f}" for p in law["frontier"]
    )
    sizes = f"Best size grows as C^{law['size']['exponent']:.2f}."
    return "\n\n".join([table_markdown(head, rows), f"{noise}Best of every budget: {best}. {sizes}"])
