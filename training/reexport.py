"""Export a model of the default architecture anew, with its own weights: for what the exporter has learnt since.

    python -m training.reexport MODEL_REPOSITORY [--model NAME]

Its card stays but for the digests of the graphs, and so what was measured of it, which the weights decide.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from saccade.card import Card
from saccade.errors import SaccadeError
from saccade.repository import Repository
from training.backend import TorchBackend
from training.export import export

TOLD = {"version", "name", "summary", "licence", "tasks", "training", "quality"}
"""Of a card: what the modules do not know."""


def reexport(repository: Path, name: str | None = None) -> Card:
    """The new card. Raises ModelError for a repository not in order, or where a graph disagrees with eager torch;
    ValueError for weights of another architecture."""
    backend = TorchBackend.load(Repository(repository), name)
    return export(backend.servable, backend.card.model_dump(mode="json", include=TOLD), repository)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="export a model of the default architecture anew")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--model")
    args = parser.parse_args(argv)
    try:
        card = reexport(args.repository, args.model)
    except (SaccadeError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{card.name}: digest {card.digest[:12]}\n")


if __name__ == "__main__":
    main()
