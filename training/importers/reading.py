"""Files from elsewhere, read as what they are: somebody's input. No pickle is executed, every fault is a ModelError."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.errors import ModelError, NotInstalled

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SAFE = ".safetensors"
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp16")
JSON_BYTES = 16 << 20
WRAPPERS = ("ema", "model_ema", "model", "state_dict")
"""Where training scripts put the weights; the averaged ones first."""
PREFIXES = ("module.", "_orig_mod.")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHOWN = 8

State = dict[str, Tensor]


def locate(place: str | Path) -> Path:
    """A local file or folder; else, where the network allows, the hub's repository "owner/name" in the local cache.

    Raises ModelError where there is neither, NotInstalled without huggingface_hub.
    """
    path = Path(place)
    if path.exists():
        return path
    if not _HUB.fullmatch(str(place)):
        raise ModelError(f"there is no file or folder {place}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise NotInstalled("names of the hub need huggingface_hub: pip install 'saccade[train]'") from error
    try:
        return Path(snapshot_download(str(place), allow_patterns=["*.json", "*.txt", f"*{SAFE}", "*.pt", "*.pth"]))
    except Exception as error:  # the hub's library has a tree of its own, over several HTTP libraries'
        raise ModelError(f"there is no folder {place}, and the hub did not give it: {type(error).__name__}") from error


def read_json(file: Path) -> dict[str, Any]:
    """An object."""
    try:
        if file.stat().st_size > JSON_BYTES:
            raise ModelError(f"{file.name} has more than {JSON_BYTES} bytes")
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{_shown(file)} cannot be read: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{_shown(file)} is not a JSON object")
    return found


def read_state(path: Path) -> State:
    """The weights of a file, or of a folder as diffusers writes them (one file, or shards with an index): float32, CPU.

    Of a training script's checkpoint the averaged weights; wrappers' prefixes are taken off. Raises ModelError for what
    is broken, not weights, not finite, or would need code to be run.
    """
    state = _folder(path) if path.is_dir() else _file(path)
    state = _without_prefixes(_unwrapped(state, path))
    if not state:
        raise ModelError(f"{_shown(path)} holds no weights")
    return {key: _checked(key, value, path) for key, value in state.items()}


def _folder(folder: Path) -> Mapping[str, Any]:
    for name in WEIGHTS:
        for variant in VARIANTS:
            for ending in (SAFE, *PICKLES):
                file = folder / f"{name}{variant}{ending}"
                if file.is_file():
                    return _file(file)
                index = folder / f"{name}{ending}.index{variant}.json"
                if index.is_file():
                    return _shards(index)
    raise ModelError(f"{_shown(folder)} holds no weights: {WEIGHTS[0]}{SAFE} or the like")


def _shards(index: Path) -> dict[str, Any]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{_shown(index)} has no weight_map")
    names = sorted({str(name) for name in placed.values()})
    if strange := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{_shown(index)} names files outside its folder: {listed(strange)}")
    state: dict[str, Any] = {}
    for name in names:
        state |= _file(index.parent / name)
    if set(state) != set(placed):
        raise ModelError(f"{_shown(index)} and its shards disagree on {listed(set(state) ^ set(placed))}")
    return state


def _file(file: Path) -> Mapping[str, Any]:
    try:
        found = _safetensors(file) if file.suffix == SAFE else _pickle(file)
    except ModelError:
        raise
    except Exception as error:  # each library has its own, down to struct and zipfile
        raise ModelError(f"{_shown(file)} is not a file of weights: {type(error).__name__}") from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{_shown(file)} holds a {type(found).__name__}, not weights by name")
    return found


def _safetensors(file: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return load_file(file)


def _pickle(file: Path) -> Any:
    """Tensors and plain containers only; argparse's Namespace, in which scripts keep their options, is as plain."""
    if file.suffix not in PICKLES:
        raise ModelError(f"{_shown(file)}: weights end in {SAFE}, {', '.join(PICKLES)}")
    import pickle

    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{_shown(file)} is broken, or holds more than weights and would run code to be read: "
                f"save its weights as {SAFE} where it comes from"
            ) from error


def _unwrapped(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for key in WRAPPERS:
        if isinstance(state.get(key), Mapping):
            return state[key]
    strange = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ModelError(f"{_shown(path)} holds what is no tensor: {listed(strange)}")
    return state


def _without_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    for prefix in PREFIXES * 2:
        if state and all(isinstance(key, str) and key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _checked(key: object, value: Any, path: Path) -> Tensor:
    if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ModelError(f"{_shown(path)}: {key!r} is not a named tensor")
    if not value.is_floating_point():
        return value
    value = value.float()
    if not bool(value.isfinite().all()):
        raise ModelError(f"{_shown(path)}: {key} has values that are not finite")
    return value


def assign(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Put the weights into a module built on the meta device. Raises ModelError that lists what is missing, left over
    or of another shape."""
    own = module.state_dict()
    both = {key: value for key, value in state.items() if key in own}
    wrong = [f"{k} {list(v.shape)}, not {list(own[k].shape)}" for k, v in both.items() if v.shape != own[k].shape]
    for told, keys in (("lacks", own.keys() - state.keys()), ("has too many", state.keys() - own.keys())):
        if keys:
            raise ModelError(f"{what} {told} of its keys: {listed(keys)}")
    if wrong:
        raise ModelError(f"{what} has weights of other shapes than its configuration: {listed(wrong)}")
    module.load_state_dict(dict(state), strict=True, assign=True)


def listed(names: Iterable[str]) -> str:
    """A few of them, sorted, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shown(path: Path) -> str:
    """The last two parts: enough to find it by, and nothing of whose machine it is."""
    return "/".join(path.parts[-2:])
