"""What a study says: report.md with a table for every axis, laws.json, and a plot for every axis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.report import table_markdown
from training.study import laws, plots

Row = dict[str, Any]
METRICS = {
    "depth/abs_rel": "depth: AbsRel ↓",
    "depth/delta1": "delta1 ↑",
    "flow/epe_px": "flow: EPE, px ↓",
    "amodal/iou": "amodal: IoU ↑",
}
LOSSES = ("depth", "flow", "amodal")


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """The report of what is done so far; returns the files written."""
    parts, files, found = [f"# {results['about']}" if results["about"] else "# Study"], [], {}
    for name, axis in results["axes"].items():
        rows = rows_of(results["runs"], name, axis)
        parts += [f"## {name}", axis["about"], axis_table(rows, axis["dimensions"])]
        if axis["law"]:
            law = laws.of(rows, axis["law"])
            found[name] = law
            parts += [laws.markdown(law)]
            files.append(plots.compute(rows, axis["law"], law, out / f"{name}.png"))
        else:
            parts.append(laws.along_markdown(rows, axis["fit"]) if axis["fit"] else "")
            files.append(plots.axis(name, rows, out / f"{name}.png"))
    report, numbers = out / "report.md", out / "laws.json"
    report.write_text("\n\n".join(part for part in parts if part) + "\n")
    numbers.write_text(json.dumps(found, indent=1))
    return [report, numbers, *files]


def rows_of(runs: Sequence[Row], name: str, axis: dict[str, Any]) -> list[Row]:
    """The runs of other axes that are shown beside, under their names, then the axis's own."""
    first, *others = axis["dimensions"] or [""]
    beside = [row for wanted in axis["beside"] for row in runs if row["run"] == wanted]
    named = [{**row, "point": {first: row["run"], **dict.fromkeys(others, "")}} for row in beside]
    return [*named, *(row for row in runs if row["axis"] == name)]


def axis_table(rows: Sequence[Row], dimensions: Sequence[str]) -> str:
    """One line a run."""
    metrics = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    tasks = [name for name in LOSSES if any(name in row["loss"] for row in rows)]
    seeds = len({row["seed"] for row in rows}) > 1
    few = any(row["parameters"]["trainable"] != row["parameters"]["total"] for row in rows)
    sparse = any(row["parameters"]["active"] != row["parameters"]["total"] for row in rows)
    head = [
        *dimensions,
        *(["seed"] if seeds else []),
        "parameters",
        *(["active"] if sparse else []),
        *(["trained"] if few else []),
        "samples seen",
        "MACs",
        "s",
        "held-out loss ↓",
        *tasks,
        *(METRICS[name] for name in metrics),
    ]
    lines = []
    for row in rows:
        counts = row["parameters"]
        lines.append(
            [
                *(row["point"][d] for d in dimensions),
                *([str(row["seed"])] if seeds else []),
                millions(counts["total"]),
                *([millions(counts["active"])] if sparse else []),
                *([millions(counts["trainable"])] if few else []),
                f"{row['samples']:,}",
                laws.scientific(row["macs"]),
                f"{row['seconds']:.0f}",
                f"{row['loss']['mean']:.4f}",
                *(f"{row['loss'][task]:.4f}" if task in row["loss"] else "" for task in tasks),
                *(f"{row['metrics'][name]:.3f}" if name in row["metrics"] else "" for name in metrics),
            ]
        )
    return table_markdown(head, lines)


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e5 else f"{count / 1e3:.1f}k"
