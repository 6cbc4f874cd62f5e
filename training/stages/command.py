"""The command of a stage, for `saccade STAGE` and for torchrun alike."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saccade.errors import InvalidInput, SaccadeError
from training.config import help_of, load
from training.loop.world import device_of
from training.stages import STAGES

BAD_INPUT, FAILED = 2, 1


def stage_of(name: str) -> Any:
    """The module of a stage."""
    return importlib.import_module(f"training.stages.{name}")


def start(name: str, config: Path | None, out: Path, overrides: Sequence[str], device: str | None, threads: int) -> Any:
    """Run a stage, with what it says of its progress on standard error. Raises what the stage raises."""
    device_of(device)
    if threads < 0:
        raise InvalidInput(f"threads must be at least 1 (0: every core), not {threads}", param="threads")
    stage = stage_of(name)
    chosen = load(stage.Config, config, overrides)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return stage.run(chosen, out, device=device)


def parser(name: str) -> argparse.ArgumentParser:
    """The stage's own, whose help explains every field of its configuration."""
    stage = stage_of(name)
    about = (stage.__doc__ or "").strip()
    made = argparse.ArgumentParser(
        prog=f"saccade {name}",
        description=about,
        epilog=f"fields of CONFIG (TOML or JSON), each also as name=value:\n{help_of(stage.Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("config", nargs="?", metavar="CONFIG", help="TOML or JSON file; training/configs has examples")
    made.add_argument("overrides", nargs="*", metavar="name=value", help="over what the file says: loop.steps=100")
    made.add_argument("-o", "--out", type=Path, required=True, help="folder of the run; one that was cut short goes on")
    made.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    made.add_argument("--threads", type=int, default=0, help="CPU threads (default: every core this process may use)")
    return made


def run(name: str, arguments: Sequence[str]) -> None:
    """Parse and start. Raises what the stage raises."""
    given = parser(name).parse_intermixed_args(arguments)
    overrides = list(given.overrides)
    config = given.config
    if config is not None and "=" in config and not Path(config).exists():
        overrides.insert(0, config)
        config = None
    start(name, None if config is None else Path(config), given.out, overrides, given.device, given.threads)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m training.stages STAGE ...`: errors become one line and an exit status."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name not in STAGES:
        sys.stderr.write(f"stages are {', '.join(STAGES)}\n")
        raise SystemExit(BAD_INPUT)
    try:
        run(name, rest)
    except (SaccadeError, OSError) as error:
        sys.stderr.write(f"saccade {name}: {error}\n")
        raise SystemExit(BAD_INPUT if isinstance(error, InvalidInput) else FAILED) from None
