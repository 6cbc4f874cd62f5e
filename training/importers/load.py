"""From a path or a hub's name to a model of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saccade.errors import InvalidInput, ModelError
from training.importers import diffusers_dit, dit_moe, generalist, keys, marigold, meta_dit
from training.importers.imported import Choices, Imported
from training.importers.reading import locate, read_json, read_state

SOURCES: dict[str, Callable[[Path, Choices], Imported]] = {
    "meta-dit": meta_dit.load,
    "diffusers-dit": diffusers_dit.load,
    "dit-moe": dit_moe.load,
    "generalist": generalist.load,
    "marigold": marigold.load,
}


def load(place: str | Path, kind: str | None = None, **told: Any) -> Imported:
    """The checkpoint at a file, a folder or a hub's name. `kind` None is found out; `told`: fields of `Choices`.

    Raises ModelError for files that are broken or of no known kind (every key must be accounted for), InvalidInput for
    what was told wrongly.
    """
    if strange := sorted(set(told) - set(Choices.__dataclass_fields__)):
        raise InvalidInput(f"an import takes no {', '.join(strange)}", param=strange[0])
    if kind is not None and kind not in SOURCES:
        raise InvalidInput(f"kind must be one of {', '.join(SOURCES)}, not {kind}", param="kind")
    path = weights_in(locate(place))
    return SOURCES[kind or detect(path)](path, Choices(**told))


def weights_in(path: Path) -> Path:
    """A folder that is nothing but one file of weights is that file."""
    if not path.is_dir() or any((path / name).exists() for name in ("config.json", "model_index.json", "unet")):
        return path
    files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".pt", ".pth")]
    return files[0] if len(files) == 1 else path


def detect(path: Path) -> str:
    """The kind of a file or folder. Raises ModelError for none."""
    if not path.is_dir():
        return keys.detect(read_state(path))
    if (path / "unet").is_dir():
        return "marigold"
    if (path / "transformer").is_dir() or (path / "config.json").is_file():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        said = read_json(folder / "config.json").get("_class_name")
        if said == diffusers_dit.CLASS:
            return "diffusers-dit"
        raise ModelError(f"{folder.name}/config.json is of {said}: no importer knows it")
    return keys.detect(read_state(path))
