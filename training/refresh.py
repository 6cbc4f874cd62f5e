"""Train a candidate for a model that serves, and put it beside that one in the repository.

    python -m training.refresh saccade-s-2 --like saccade-s --recipe RECIPE.toml --runs RUNS --repository MODELS

The candidate has the name given and the tasks, defaults, licence and sources of the model it is `like`; what was
measured of that model is not said of this one. RUNS/NAME is the run's folder: the same command goes on with a run that
was cut short. `training.promote` decides whether the candidate serves.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saccade.card import Card
from saccade.errors import InvalidInput, SaccadeError
from saccade.repository import Repository, check_name
from training.export import export
from training.loading import merged, open_run
from training.train import Recipe, Run

log = logging.getLogger(__name__)


def refresh(name: str, like: str, recipe: Recipe, runs: Path, repository: Path) -> Card:
    """The candidate's card. Raises InvalidInput for a name that cannot be taken, ModelError for a model that is not in
    order, Diverged where the loss does."""
    check_name(name)
    if name == like:
        raise InvalidInput(f"a candidate needs a name of its own: {name} serves", param="name")
    facts = inherited(Repository(repository).card(like), name)
    Run(recipe, runs / name).train()
    servable, found = open_run(runs / name)
    return export(servable, merged(found, facts), repository)


def inherited(card: Card, name: str) -> dict[str, Any]:
    """The facts of `card` that hold for a model of its kind, trained here and now."""
    facts = card.model_dump(mode="json", include={"version", "summary", "licence", "tasks", "training"})
    device = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return {**facts, "name": name, "training": {**facts["training"], "device": device}}


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    for module in ("training.loop", __name__):
        logging.getLogger(module).setLevel(logging.INFO)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    card = refresh(args.name, args.like, Recipe.read(args.recipe), args.runs, args.repository)
    log.info("%s: %.1f M parameters, digest %s", card.name, card.parameters / 1e6, card.digest[:12])


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.refresh", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", help="the candidate's name in the repository")
    parser.add_argument(
        "--like", required=True, metavar="MODEL", help="the model of the repository that it may replace"
    )
    parser.add_argument("--recipe", type=Path, required=True, help="TOML of the run")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs' folders")
    parser.add_argument("--repository", type=Path, required=True, help="model repository")
    parser.add_argument("--threads", type=int, default=0, help="0: every core this process may use")
    return parser


if __name__ == "__main__":
    try:
        main()
    except SaccadeError as error:
        sys.stderr.write(f"refresh: {error}\n")
        raise SystemExit(2 if isinstance(error, InvalidInput) else 1) from error
