"""Write a measured quality curve into a model's card: `python -m training.annotate MODEL_REPOSITORY SWEEP.json`.

SWEEP.json is what `saccade evaluate FOLDER --sweep --out DIR` leaves in DIR. The graphs are not touched.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from tritonclient.grpc.model_config_pb2 import TYPE_INT64

from saccade.card import Card, QualityPoint
from saccade.errors import ModelError
from saccade.repository import Repository, Tensor, write_config
from training.report import ALL


def annotate(path: Path, quality: list[QualityPoint], name: str | None = None) -> Card:
    """Replace the card's quality by `quality` and return it. Raises ModelError for a repository not in order."""
    repository = Repository(path)
    name = name or repository.default()
    config = repository.config(name)
    card = repository.card(name).model_copy(update={"quality": quality})
    write_config(path, name, _tensors(config.input), _tensors(config.output), config.max_batch_size, card)
    return card


def _tensors(ports: RepeatedCompositeFieldContainer[Any]) -> list[Tensor]:
    return [
        Tensor(
            port.name,
            () if port.HasField("reshape") else tuple(port.dims),
            "INT64" if port.data_type == TYPE_INT64 else "FP32",
        )
        for port in ports
    ]


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
