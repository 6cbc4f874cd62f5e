"""The run that a stage begins with, read back: what kind of model it is, its configuration and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from saccade.errors import InvalidInput, ModelError
from training.codecs import CodecConfig
from training.config import build
from training.loop import checkpoint
from training.models.dit import DiTConfig
from training.objectives import DiffusionConfig
from training.perception import PerceptionConfig

PERCEPTION, CLASSES = "perception", "classes"


@dataclass(frozen=True)
class ClassesConfig:
    """A class-conditional model of pictures' latents. `classes`: without the null label, the row after them."""

    model: DiTConfig
    codec: CodecConfig
    diffusion: DiffusionConfig
    classes: int
    size: tuple[int, int] = (256, 256)


@dataclass(frozen=True)
class Started:
    """`config` says which kind it is. `lineage`: the stages before, oldest first."""

    config: PerceptionConfig | ClassesConfig
    state: dict[str, Tensor]
    lineage: tuple[dict[str, Any], ...]

    @property
    def labels(self) -> dict[str, int]:
        """Of the tasks that it knows."""
        return dict(self.config.tasks) if isinstance(self.config, PerceptionConfig) else {}


def open_start(run: str, which: str = "average") -> Started:
    """Raises ModelError for a run that is not whole, InvalidInput for one of which no stage can begin."""
    if not Path(run).is_dir():
        raise InvalidInput(f"no such run: {run}", param="start")
    kept: Literal["model", "average"] = "model" if which == "model" else "average"
    state, said = checkpoint.read(Path(run), kept)
    about = said["about"]
    config = config_of(about, run)
    before = {"stage": said["stage"], "step": said.get("step", 0), "samples": said.get("samples", 0)}
    before["seconds"] = said.get("seconds", 0.0)
    return Started(config, state, (*about.get("lineage", ()), before))


def config_of(about: Mapping[str, Any], run: str | Path) -> PerceptionConfig | ClassesConfig:
    """What a run's config.json says of its model. Raises InvalidInput, or ModelError where it is broken."""
    for kind, wanted in ((PERCEPTION, PerceptionConfig), (CLASSES, ClassesConfig)):
        if kind in about:
            try:
                return build(wanted, about[kind])
            except InvalidInput as error:
                raise ModelError(f"{run}: its configuration is broken: {error}") from error
    raise InvalidInput(f"{run} is not a run of pretrain, finetune, upcycle or adapt", param="start")


def said_of(
    config: PerceptionConfig | ClassesConfig, stage_config: Any, lineage: tuple[dict[str, Any], ...], data: list[str]
) -> dict[str, Any]:
    """The `about` of a run: its model, the stage's whole configuration, what came before, what it learned from."""
    kind = PERCEPTION if isinstance(config, PerceptionConfig) else CLASSES
    return {kind: asdict(config), "config": asdict(stage_config), "lineage": list(lineage), "data": data}
