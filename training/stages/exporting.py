"""A run to a model repository: what `saccade export` does."""

from __future__ import annotations

from pathlib import Path

from saccade.card import Card
from saccade.errors import InvalidInput
from training.config import read
from training.export import export
from training.loading import Which, merged, model_name, open_run


def export_run(
    run: Path,
    repository: Path,
    *,
    name: str | None = None,
    facts: Path | None = None,
    which: Which = "average",
    step: int | None = None,
    torchscript: Path | None = None,
    licence: str | None = None,
) -> Card:
    """The run's model in the repository, under `name`, that of the facts, or the run's folder's.

    Raises InvalidInput, ModelError.
    """
    servable, found = open_run(run, which, step)
    said = merged(found, {} if facts is None else read(facts), name)
    said.setdefault("name", model_name(run))
    if licence is not None:
        said["licence"] = licence
    if "tasks" not in said:
        raise InvalidInput("a run of the default model needs facts of its tasks: --facts FACTS.json", param="facts")
    return export(servable, said, repository, torchscript=torchscript)
