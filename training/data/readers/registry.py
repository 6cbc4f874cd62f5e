"""The datasets by name, each read by a module that is imported when it is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path
from typing import Any

from saccade.errors import InvalidInput
from training.data.raw import Reader

# name -> (module, class, task)
READERS: dict[str, tuple[str, str, str]] = {
    "hypersim": ("hypersim", "Hypersim", "depth"),
    "hypersim-processed": ("hypersim", "Processed", "depth"),
    "nyu": ("nyu", "NYU", "depth"),
    "kitti-depth": ("kitti", "KITTIDepth", "depth"),
    "kitti-flow": ("kitti", "KITTIFlow", "flow"),
    "chairs": ("chairs", "FlyingChairs", "flow"),
    "things": ("things", "FlyingThings3D", "flow"),
    "sintel": ("sintel", "Sintel", "flow"),
    "sintel-depth": ("sintel", "SintelDepth", "depth"),
    "pix2gestalt": ("pix2gestalt", "Pix2Gestalt", "amodal"),
}


def open_reader(kind: str, folder: Path | str, **options: Any) -> Reader:
    """The dataset `kind` in `folder`; `options` are the reader's own (split, pass, ...). Raises InvalidInput."""
    if kind not in READERS:
        near = difflib.get_close_matches(kind, READERS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise InvalidInput(f"there is no dataset {kind!r}{meant}; they are {', '.join(READERS)}", param="kind")
    module, name, _ = READERS[kind]
    cls = getattr(import_module(f"training.data.readers.{module}"), name)
    try:
        reader: Reader = cls(Path(folder), **options)
    except TypeError as error:
        raise InvalidInput(f"{kind}: {error}") from error
    return reader
