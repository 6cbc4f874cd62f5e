"""Plots of a study: loss against compute, and what each choice of an axis comes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from training.study import laws

Row = dict[str, Any]
PANELS = {
    "loss": "held-out loss ↓",
    "depth/abs_rel": "depth: AbsRel ↓",
    "flow/epe_px": "flow: EPE, px ↓",
    "amodal/iou": "amodal: IoU ↑",
}
DPI = 110
FEW = 3  # log rows, up to which they are points as well as a line
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "frameon": False}


def compute(rows: Sequence[Row], budget: str, law: dict[str, Any], path: Path) -> Path:
    """Left: held-out loss against training compute, a line for each model, the law through the best. Right: against the
    model's size at every budget."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    own = [row for row in rows if row["seed"] == 0]
    for name, line in laws.by_model(own, budget).items():
        label = f"{name} ({line[0]['parameters']['total'] / 1e6:.2g}M)"
        left.plot(
            [r["macs"] for r in line], [r["loss"]["mean"] for r in line], "o-", markersize=4, linewidth=1, label=label
        )
    again = [row for row in rows if row["seed"] != 0]
    if again:
        left.plot(
            [r["macs"] for r in again], [r["loss"]["mean"] for r in again], "kx", markersize=5, label="other seeds"
        )
    for (name, fit), style in zip(law["laws"].items(), ("k--", "k:"), strict=False):
        macs = np.geomspace(min(r["macs"] for r in own), max(r["macs"] for r in own), 100)
        label = f"{name}: exponent {fit['exponent']:.3f}, residual {fit['relative_residual']:.1%}"
        left.plot(macs, fit["floor"] + fit["gain"] * macs ** -fit["exponent"], style, linewidth=1, label=label)
    left.set(xscale="log", yscale="log", xlabel="training compute C, MACs", ylabel="held-out loss")
    left.legend(fontsize=7, ncols=2, **BELOW)
    groups: dict[str, list[Row]] = {}
    for row in own:
        groups.setdefault(row["point"][budget], []).append(row)
    for group in sorted(groups.values(), key=lambda group: group[0]["macs"]):
        group.sort(key=lambda row: row["parameters"]["total"])
        sizes, found = [r["parameters"]["total"] for r in group], [r["loss"]["mean"] for r in group]
        spent = laws.scientific(float(np.median([r["macs"] for r in group])))
        (drawn,) = right.plot(sizes, found, "o-", markersize=4, linewidth=1, label=f"{spent} MACs")
        best = int(np.argmin(found))
        right.plot(sizes[best], found[best], "*", markersize=12, color=drawn.get_color())
    right.set(xscale="log", yscale="log", xlabel="parameters", ylabel="held-out loss")
    right.legend(fontsize=7, ncols=3, title="budget, best starred", title_fontsize=7, **BELOW)
    for panel in (left, right):
        few_labels(panel)
        panel.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=DPI)
    return path


def few_labels(panel: Axes) -> None:
    """Labels along x at whole decades alone; where fewer than two are in view, at 1, 2 and 5 times them, or at three
    places if even of those there are fewer than two."""
    low, high = panel.get_xlim()
    panel.xaxis.set_minor_formatter(NullFormatter())
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    if np.sum((low <= decades) & (decades <= high)) > 1:
        return
    places = np.sort(np.outer(decades, (1, 2, 5)).ravel())
    places = places[(low <= places) & (places <= high)]
    if len(places) < 2:
        places = np.geomspace(low, high, 5)[1:-1]
    panel.set_xticks(places, [laws.scientific(float(place)) for place in places])


def axis(name: str, rows: Sequence[Row], path: Path) -> Path:
    """Training losses of the axis's runs, then a panel for the held-out loss and for every metric."""
    shown = [key for key in PANELS if any(value(row, key) is not None for row in rows)]
    figure = Figure(figsize=(4.6 + 2.4 * len(shown), max(2.8, 0.34 * len(rows) + 1.4)), layout="constrained")
    curves, *panels = figure.subplots(1, 1 + len(shown), width_ratios=[1.9, *[1] * len(shown)])
    labels = [label(row) for row in rows]
    colours = []
    for row, text in zip(rows, labels, strict=True):
        steps, losses = np.array(row["losses"], float).reshape(-1, 2).T
        marker = "o" if len(steps) <= FEW else ""
        (drawn,) = curves.plot(steps, smooth(losses), marker=marker, markersize=4, linewidth=1, label=text)
        colours.append(drawn.get_color())
    curves.set(xlabel="step", ylabel="training loss", yscale="log")
    curves.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    curves.set_title(name, fontsize=10, loc="left")
    places = np.arange(len(rows))[::-1]
    for number, (panel, key) in enumerate(zip(panels, shown, strict=True)):
        dots(panel, [value(row, key) for row in rows], places, colours)
        panel.set_title(PANELS[key], fontsize=9)
        panel.set_yticks(places, labels if number == 0 else [""] * len(rows), fontsize=8)
    figure.savefig(path, dpi=DPI)
    return path


def dots(panel: Axes, values: Sequence[float | None], places: np.ndarray, colours: Sequence[str]) -> None:
    """A dot and its number for every run, from top to bottom."""
    for found, place, colour in zip(values, places, colours, strict=True):
        if found is not None:
            panel.plot(found, place, "o", color=colour)
            panel.annotate(f"{found:.3f}", (found, place), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    panel.margins(x=0.25)
    panel.locator_params(axis="x", nbins=4)
    panel.set_ylim(-0.6, len(places) - 0.4)
    panel.tick_params(axis="x", labelsize=7)
    panel.grid(alpha=0.3, axis="x")


def value(row: Row, key: str) -> float | None:
    found: float | None = row["loss"]["mean"] if key == "loss" else row["metrics"].get(key)
    return found


def label(row: Row) -> str:
    text = ", ".join(choice for choice in row["point"].values() if choice) or row["stage"]
    return text if row["seed"] == 0 else f"{text}, seed {row['seed']}"


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean, about a twentieth of the whole."""
    width = max(1, len(values) // 20)
    if width == 1:
        return values
    padded = np.concatenate([np.full(width // 2, values[0]), values, np.full(width - 1 - width // 2, values[-1])])
    kernel: np.ndarray = np.convolve(padded, np.ones(width) / width, "valid")
    return kernel
