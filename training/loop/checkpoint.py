"""Checkpoints: safetensors and JSON, written aside and renamed.

    RUN/config.json                              stage, `about` (all that defines the model), the loop's settings
    RUN/checkpoints/step-00000100/state.json     step, samples, seconds, world, torch, and a SHA-256 of every file
    RUN/checkpoints/step-00000100/model/         the weights as they are      *.safetensors, one or more a process
    RUN/checkpoints/step-00000100/average/       the averages of the trained ones
    RUN/checkpoints/step-00000100/optimizer/     NAME.step, NAME.exp_avg, NAME.exp_avg_sq

`torch.distributed.checkpoint` writes and reads the tensors, so any number of processes reads what any other number has
written. A folder without state.json is not a checkpoint: it is written last, and the folder gets its name after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from saccade.errors import ModelError, SaccadeError
from training.loop.world import World

T = TypeVar("T")
Parts = Mapping[str, Mapping[str, Tensor]]
ALONE = World(0, 1, torch.device("cpu"))
STATE, CONFIG = "state.json", "config.json"
FORMAT = 1


class NotSaved(SaccadeError, OSError):
    """A run's last checkpoint could not be written; the message says which one there is."""


_NAME = re.compile(r"step-\d{8,12}")
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError, SafetensorError)


def read(
    run: Path, which: Literal["model", "average"] = "average", step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole weights of a run (of its newest checkpoint, or of `step`), on the CPU; and config.json's fields with
    the checkpoint's step, samples and seconds. Parameters that are not trained are in both.

    Raises ModelError for what is missing or broken.
    """
    config, folder = read_config(run), find(run, step)
    state = check(folder)
    weights = _merged(folder, "model")
    if which == "average" and (folder / "average").is_dir():
        weights |= _merged(folder, "average")
    return weights, {**config, **{key: state[key] for key in ("step", "samples", "seconds")}}


def write_weights(run: Path, weights: Mapping[str, Tensor], stage: str, about: dict[str, Any]) -> None:
    """A run's folder with weights alone, at step 0: to `read` and to start from, not to resume. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    write_config(run, {"stage": stage, "about": about, "loop": {}})
    save(run, 0, {"model": weights}, {"samples": 0, "seconds": 0.0})


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json. Raises ModelError."""
    config = _json(run / CONFIG)
    if not isinstance(config.get("stage"), str) or not isinstance(config.get("about"), dict):
        raise ModelError(f"{run / CONFIG} needs a stage and a table `about`")
    return config


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Raises OSError."""
    draft = run / f"{CONFIG}.part"
    _write(draft, json.dumps(config, indent=1, default=str).encode())
    draft.replace(run / CONFIG)


def all_of(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((f for f in found if _NAME.fullmatch(f.name) and (f / STATE).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find(run: Path, step: int | None = None) -> Path:
    """A checkpoint's folder: the newest, or that of `step`. Raises ModelError."""
    folders = [folder for folder in all_of(run) if step in (None, step_of(folder))]
    if not folders:
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise ModelError(f"{run} has no {what}")
    return folders[-1]


def save(run: Path, step: int, parts: Parts, state: dict[str, Any], world: World = ALONE) -> Path:
    """Write a checkpoint, all processes together. Raises OSError on all of them where one could not write; what was
    there before is as it was."""
    final = run / "checkpoints" / f"step-{step:08d}"
    draft = final.with_name(f"{final.name}.part")
    world.agree(lambda: _begin(draft) if world.first else None)
    try:
        for name, tensors in parts.items():
            _save_tensors(draft / name, tensors, world)
        mine = world.agree(lambda: _digests(draft, world.rank))
        digests = {name: digest for some in world.gather(mine) for name, digest in some.items()}
        whole = {"format": FORMAT, "step": step, **state, "world": world.size, "torch": torch.__version__}
        world.agree(lambda: _end(draft, final, {**whole, "files": dict(sorted(digests.items()))}, world))
    except OSError:
        if world.first:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def load(folder: Path, parts: Parts, world: World = ALONE) -> dict[str, Any]:
    """Read a checkpoint into the tensors of `parts`, all processes together, and return its state.

    Raises ModelError where it is broken or is not one of these tensors."""
    state = world.agree(lambda: check(folder, world))
    if not isinstance(state.get("window"), dict) or not isinstance(state.get("loss"), float):
        raise ModelError(f"{folder} holds weights alone: a run may start from it in another folder, not go on")
    for name, tensors in parts.items():
        reader = HuggingFaceStorageReader(str(folder / name))
        world.agree(partial(_check_fit, folder / name, reader, tensors))
        with _quietly():
            _guarded(folder, partial(dcp.load, dict(tensors), storage_reader=reader, no_dist=world.size == 1))
    return state


def prune(run: Path, keep: int) -> None:
    """Drop all complete checkpoints but the newest `keep`, and what was never finished or half dropped."""
    for folder in all_of(run)[:-keep]:
        (folder / STATE).unlink(missing_ok=True)  # from here on it is not a checkpoint
        shutil.rmtree(folder, ignore_errors=True)
    for left in (run / "checkpoints").glob("step-*"):
        dropped = _NAME.fullmatch(left.name) and not (left / STATE).exists()  # a prune that was killed
        if left.suffix == ".part" or dropped:
            shutil.rmtree(left, ignore_errors=True)


def check(folder: Path, world: World = ALONE) -> dict[str, Any]:
    """A checkpoint's state, once its files are what was written (of many processes each looks at some).

    Raises ModelError."""
    state = _json(folder / STATE)
    kinds: dict[str, Any] = {"format": int, "step": int, "samples": int, "seconds": int | float, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise ModelError(f"{folder / STATE}: {key} is missing or malformed")
    if state["format"] != FORMAT:
        raise ModelError(f"{folder} is of format {state['format']}, this is for format {FORMAT}")
    files = {str(file.relative_to(folder)): file for file in _files(folder)}
    if files.keys() != state["files"].keys():
        odd = sorted(files.keys() ^ state["files"].keys())
        raise ModelError(f"{folder}: {odd[0]} is {'not of this checkpoint' if odd[0] in files else 'missing'}")
    for name in world.share_of(sorted(files)):
        if _guarded(folder, partial(_digest, files[name])) != state["files"][name]:
            raise ModelError(f"{files[name]} is not as it was written; delete {folder} to go on from the one before")
    return state


def _begin(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)


def _end(draft: Path, final: Path, state: dict[str, Any], world: World) -> None:
    if not world.first:
        return
    _write(draft / STATE, json.dumps(state, indent=1).encode())
    for folder in (draft, *(f for f in draft.iterdir() if f.is_dir())):
        _sync(folder)
    if final.exists():  # of a run that has come here before
        (final / STATE).unlink(missing_ok=True)
        shutil.rmtree(final)
    draft.rename(final)
    _sync(final.parent)


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with _quietly():
            dcp.save(dense, storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if all(isinstance(cause, OSError) for cause in causes):
            raise OSError(str(causes[0])) from None
        raise


def _merged(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of one part, whole."""
    reader = HuggingFaceStorageReader(str(folder / name))
    sizes = _sizes(folder / name, reader)
    tensors = {key: torch.zeros(meta.size, dtype=meta.properties.dtype) for key, meta in sizes.items()}
    with _quietly():
        _guarded(folder, partial(dcp.load, tensors, storage_reader=reader, no_dist=True))
    return tensors


def _sizes(folder: Path, reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """What a part has. Raises ModelError where its pieces do not make up whole tensors."""
    found = _guarded(folder, reader.read_metadata).state_dict_metadata
    for name, meta in found.items():
        if sum(chunk.sizes.numel() for chunk in meta.chunks) != meta.size.numel():
            raise ModelError(f"{folder}: {name} is not whole")
    return found


def _check_fit(folder: Path, reader: HuggingFaceStorageReader, wanted: Mapping[str, Tensor]) -> None:
    found = _sizes(folder, reader)
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise ModelError(f"{folder} is of another model: {odd[0]} is only {'there' if odd[0] in found else 'here'}")
    for name, tensor in wanted.items():
        if found[name].size != tensor.shape:
            raise ModelError(f"{folder} is of another model: {name} is {[*found[name].size]}, not {[*tensor.shape]}")


@contextmanager
def _quietly() -> Iterator[None]:
    """That one process is alone is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _guarded(folder: Path, work: Callable[[], T]) -> T:
    """Whatever goes wrong in reading, as one line."""
    try:
        return work()
    except ModelError:
        raise
    except CheckpointException as error:
        causes = [str(cause) for cause, _ in error.failures.values()]
        raise ModelError(f"{folder} cannot be read: {causes[0] if causes else error}") from None
    except _BROKEN as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file} is not a table")
    return found


def _files(folder: Path) -> Sequence[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != STATE)


def _digests(draft: Path, rank: int) -> dict[str, str]:
    """Of what a process has written: others' files may not be in sight yet on a network's file system."""
    return {str(file.relative_to(draft)): _digest(file) for file in draft.glob(f"*/shard-{rank + 1:05d}-*")}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
