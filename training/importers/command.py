"""`saccade import`: a checkpoint from elsewhere becomes a servable directory, a run to train from, or both."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from saccade.card import Card
from saccade.errors import InvalidInput
from training.importers.imported import Imported
from training.importers.load import load

log = logging.getLogger(__name__)


def run_import(
    place: str,
    repository: Path | None = None,
    *,
    name: str | None = None,
    kind: str | None = None,
    checkpoint: Path | None = None,
    torchscript: Path | None = None,
    codec: str | None = None,
    dtr: bool = False,
    dtr_alpha: float | None = None,
    dtr_beta: float | None = None,
    active: int | None = None,
    heads: int | None = None,
    grid: int | None = None,
    schedule: str | None = None,
    prediction: str | None = None,
    zero_terminal_snr: bool | None = None,
    beta_start: float | None = None,
    beta_end: float | None = None,
    start: Literal["noise", "zeros"] | None = None,
    spacing: str | None = None,
    steps: int | None = None,
    resolution: int | None = None,
    licence: str | None = None,
) -> Card | None:
    """Import the checkpoint at a file, a folder or a hub's name; the card of what is now servable, or None.

    `repository`, `name`: write it there under that name, checked graph by graph; `torchscript`: there too, as
    TorchScript. `checkpoint`: write a run folder that finetune, upcycle and adapt start from. `kind` None is found out;
    the other options are those of `training.importers.imported.Choices`.
    Raises ModelError for files that are broken or of no known kind, InvalidInput for options that cannot be.
    """
    if repository is None and checkpoint is None:
        raise InvalidInput("name a repository to serve from, or a checkpoint folder to train from", param="repository")
    if repository is not None and name is None:
        raise InvalidInput("a servable model needs a name", param="name")
    imported = load(
        place, kind, codec=codec, dtr=dtr, dtr_alpha=dtr_alpha, dtr_beta=dtr_beta, active=active, heads=heads,
        grid=grid, schedule=schedule, prediction=prediction, zero_terminal_snr=zero_terminal_snr,
        beta_start=beta_start, beta_end=beta_end, start=start, spacing=spacing, steps=steps, resolution=resolution,
        licence=licence,
    )  # fmt: skip
    if checkpoint is not None:
        write_checkpoint(imported, checkpoint)
    if repository is None or name is None:
        return None
    return write_servable(imported, repository, name, torchscript)


def write_servable(imported: Imported, repository: Path, name: str, torchscript: Path | None = None) -> Card:
    """Raises InvalidInput where no autoencoder is known, ModelError where an exported graph disagrees with torch."""
    from training.export import export

    if imported.servable is None:
        raise InvalidInput(
            f"a {imported.kind} has no autoencoder of its own: name the folder (or hub name) of the one that it was "
            "trained with, e.g. stabilityai/sd-vae-ft-ema (codec)",
            param="codec",
        )
    card = export(imported.servable, {**imported.facts, "name": name}, repository, torchscript=torchscript)
    log.info("%s: %s, %.1f M parameters, digest %s", name, imported.kind, card.parameters / 1e6, card.digest[:12])
    return card


def write_checkpoint(imported: Imported, run: Path) -> None:
    """Raises InvalidInput for a model that no stage can start from."""
    from training.loop.checkpoint import write_weights

    if imported.about is None:
        raise InvalidInput(
            f"no stage can start from a {imported.kind}: it is none of our transformers", param="checkpoint"
        )
    write_weights(run, imported.state, "import", imported.about)
    log.info("%s: a run to start from, of %s", run, imported.kind)
