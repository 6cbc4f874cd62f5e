"""Write a measured quality curve into a model's card: `python -m training.annotate MODEL_REPOSITORY SWEEP.json`.

SWEEP.json is what `saccade evaluate FOLDER --sweep --out DIR` leaves in DIR. The graphs are not touched.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saccade.card import Card, QualityPoint
from saccade.errors import ModelError
from saccade.repository import Repository, replace_card
from training.report import ALL


def annotate(path: Path, quality: list[QualityPoint], name: str | None = None) -> Card:
    """Replace the card's quality by `quality` and return it. Raises ModelError for a repository not in order."""
    repository = Repository(path)
    name = name or repository.default()
    card = repository.card(name).model_copy(update={"quality": quality})
    replace_card(path, name, card)
    return card


def points(sweep: dict[str, Any], digest: str) -> list[QualityPoint]:
    """A sweep's means over all pictures of a task. Raises ModelError if it measured another model."""
    if sweep["digest"] != digest:
        raise ModelError(f"the sweep measured {sweep['model']} {sweep['digest'][:12]}, not the model in the repository")
    every = (QualityPoint.model_validate(point) for point in sweep["quality"])
    return [point for point in every if point.set.endswith(ALL)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write a measured quality curve into a model's card")
    parser.add_argument("repository", type=Path)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--model")
    args = parser.parse_args(argv)
    repository = Repository(args.repository)
    card = repository.card(args.model or repository.default())
    annotate(args.repository, points(json.loads(args.sweep.read_text()), card.digest), card.name)


if __name__ == "__main__":
    main()
