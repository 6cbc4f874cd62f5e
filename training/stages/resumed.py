"""A run that goes on as the model that it is: what was measured when it began is kept, and what defines the model may
not change under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from saccade.errors import InvalidInput
from training.codecs import CodecConfig
from training.loop import Loop, LoopConfig, Objective, Progress, checkpoint
from training.perception import PerceptionConfig
from training.stages.started import ClassesConfig, config_of

MAY_CHANGE = ("size", "diffusion.weighting", "diffusion.gamma", "diffusion.shift", "diffusion.noise")
"""What a run was last asked for, and how its loss counts: the weights are those of the same model."""


def earlier(out: Path | None) -> PerceptionConfig | ClassesConfig | None:
    """The model of the run in `out`, if it has come to a checkpoint. Raises ModelError where it is broken."""
    if out is None or not checkpoint.all_of(out):
        return None
    try:
        return config_of(checkpoint.read_config(out)["about"], out)
    except InvalidInput:  # of no stage: the loop says which run it is
        return None


def codec_of(codec: CodecConfig, out: Path | None) -> CodecConfig:
    """The codec, with the deviations that were measured when the run in `out` began where it names none itself."""
    known = earlier(out)
    if known is None or known.codec.kind != codec.kind:
        return codec
    return replace(
        codec,
        picture_std=codec.picture_std or known.codec.picture_std,
        target_std=codec.target_std or known.codec.target_std,
    )


def check_same(out: Path, config: PerceptionConfig | ClassesConfig) -> None:
    """Raises InvalidInput that names the field in which `config` is another model than that of the run in `out`."""
    known = earlier(out)
    if known is None:
        return
    if type(known) is not type(config):
        raise InvalidInput(f"{out} holds a run of another kind of model; begin another folder", param="out")
    begun, asked = (dict(_leaves(asdict(each))) for each in (known, config))
    for name in [*begun, *(name for name in asked if name not in begun)]:
        if begun.get(name) != asked.get(name) and not name.startswith(MAY_CHANGE):
            was, now = ("nothing" if each.get(name) is None else each[name] for each in (begun, asked))
            raise InvalidInput(
                f"{out} was begun with {name} = {_short(was)}, not {_short(now)}: a run goes on as the model that it "
                "is; begin another folder",
                param=name,
            )


def train(
    made: Objective,
    loop: LoopConfig,
    out: Path,
    stage: str,
    config: PerceptionConfig | ClassesConfig,
    about: dict[str, Any],
    device: str | None,
) -> Progress:
    """To the end, or on with what lies in `out`. Raises InvalidInput, ModelError."""
    if checkpoint.all_of(out) and checkpoint.read_config(out)["stage"] == stage:
        check_same(out, config)
    return Loop(made, loop, out, stage, about, device=device).run()


def _leaves(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of tables in tables, by its full name."""
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def _short(value: Any) -> str:
    told = str(value)
    return told if len(told) <= 60 else f"{told[:57]}..."
