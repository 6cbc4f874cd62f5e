"""Which idea is worth what: the same short run again and again, with one change each.

    python -m training.ablate CONFIG.toml VALIDATION --facts FACTS.json --out DIR

CONFIG has a recipe (`training.train.Recipe`) and a table `[changes.NAME]` for every change: `about` in words, and the
fields that differ (`model.FIELD` those of the network). Every run is trained to its end and judged on VALIDATION (a
folder of `training.validation`) by the evaluation's own protocol. Runs that are done are not done again;
DIR/ablations.md is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import logging
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.backend import Eager, TorchBackend
from training.evaluate import evaluate
from training.report import LABELS
from training.train import Recipe, Run

log = logging.getLogger(__name__)
SHOWN = (("depth", "abs_rel"), ("flow", "epe_px"), ("amodal", "iou"))


@dataclass(frozen=True)
class Variant:
    """`recipe` with one change, which `about` describes; `fields` are those that differ."""

    name: str
    about: str
    recipe: Recipe
    fields: dict[str, Any]


def read(path: Path) -> Iterator[Variant]:
    """The recipe as it is, then each change of it. Raises InvalidInput for what no recipe has."""
    raw = tomllib.loads(path.read_text())
    changes = raw.pop("changes")
    yield Variant("as it is", "", Recipe.from_table(raw), {})
    for name, change in changes.items():
        about = change.pop("about")
        model = {**raw.get("model", {}), **change.get("model", {})}
        yield Variant(name, about, Recipe.from_table({**raw, **change, "model": model}), change)


def judged(variant: Variant, out: Path, validation: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Train (or finish) one run in its own folder, and what its averaged weights are worth."""
    progress = Run(variant.recipe, out).train()
    depth = facts["tasks"]["depth"]
    coding = {**depth["coding"], "knee": variant.recipe.depth_knee or None}
    tasks = {**facts["tasks"], "depth": {**depth, "coding": coding}}
    report = evaluate(validation, Eager(TorchBackend.of_run(out, facts={**facts, "tasks": tasks})))
    done = {"samples": progress.samples, "wall_clock_s": round(progress.seconds, 1)}
    means = {f"{mean.task}/{mean.group}/{mean.metric}": mean.value for mean in report.means()}
    return {"name": variant.name, "about": variant.about, "fields": variant.fields, **done, "means": means}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; beside every value the change from the first row's, in percent."""
    names = [f"{task}: {LABELS[metric]}" for task, metric in SHOWN]
    head = f"| change | {' | '.join(names)} | samples | s |\n|{'---|' * (len(names) + 3)}\n"
    first = rows[0]["means"]

    def cell(row: dict[str, Any], task: str, metric: str) -> str:
        key = f"{task}/all/{metric}"
        value = row["means"][key]
        beside = "" if row is rows[0] else f" ({value / first[key] - 1:+.1%})"
        return f"{value:.3f}{beside}"

    lines = [
        f"| {row['about'] or row['name']} | {' | '.join(cell(row, *what) for what in SHOWN)} | {row['samples']:,} | "
        f"{row['wall_clock_s']:.0f} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the same short run with one change each")
    parser.add_argument("config", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--facts", type=Path, required=True, help="JSON, as for training.export")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    facts, rows = json.loads(args.facts.read_text()), []
    for variant in read(args.config):
        result = args.out / variant.name.replace(" ", "-") / "result.json"
        if not result.exists():
            row = judged(variant, result.parent, args.validation, facts)
            result.write_text(json.dumps(row, indent=1))
        rows.append(json.loads(result.read_text()))
        (args.out / "ablations.md").write_text(table(rows))
        log.info("%s: %s", variant.name, rows[-1]["means"])


if __name__ == "__main__":
    main()
