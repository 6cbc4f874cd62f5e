"""Read and write a model repository: a directory in Triton's layout, whose denoisers carry a card.

    <repository>/<model>/config.pbtxt
    <repository>/<model>/<version>/model.onnx

A directory is somebody's input: names, numbers, texts and digests are checked, and what is wrong is a ModelError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from saccade.card import PARAMETER, Card, parse
from saccade.errors import ModelError

CONFIG = "config.pbtxt"
GRAPH = "model.onnx"
VARIABLE = "SACCADE_MODEL_REPOSITORY"
DEFAULT = "model_repository"
CONFIG_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CARD_BEGINS = f'parameters {{\n  key: "{PARAMETER}"'
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


class Repository:
    """The models under `path`. Cards and configurations are read anew at every call; nothing is kept."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ModelError(f"the model repository is not a directory: {path}")
        self.path = path

    def models(self) -> list[str]:
        """Every directory with a configuration, sorted."""
        return sorted(
            entry.name for entry in self.path.iterdir() if _NAME.fullmatch(entry.name) and (entry / CONFIG).is_file()
        )

    def denoisers(self) -> list[str]:
        """The models that carry a card, sorted. A configuration that cannot be read is an error, not a lack."""
        return [name for name in self.models() if PARAMETER in self.config(name).parameters]

    def default(self) -> str:
        """The only denoiser."""
        return only(self.denoisers(), f"the repository {self.path}")

    def config(self, name: str) -> ModelConfig:
        """The model's configuration, as Triton's protobuf."""
        file = self._inside(name, CONFIG)
        config = read_config(_text(file, f"{name}/{CONFIG}"), name)
        if config.name not in ("", name):
            raise ModelError(f"{name}/{CONFIG} says that the model's name is {config.name!r}")
        return config

    def card(self, name: str) -> Card:
        """The denoiser's card."""
        return read_card(self.config(name), name)

    def graph(self, name: str) -> Path:
        """`model.onnx` of the highest version."""
        versions = [entry.name for entry in self._inside(name).iterdir() if _VERSION.fullmatch(entry.name)]
        if not versions:
            raise ModelError(f"model {name} has no version: put its graph at {name}/1/{GRAPH}")
        return self._inside(name, max(versions, key=int), GRAPH)

    def verify(self, card: Card) -> None:
        """Check the files of the card's models against its digests.

        A digest is of `model.onnx`. Files beside it (external data) have keys of their own, "<model>/<file>"; where a
        model has a digest, a file beside its graph without one is refused.
        """
        for key, digest in card.digests.items():
            name, _, beside = key.partition("/")
            file = self._sibling(name, beside)
            found = sha256(file)
            if found != digest:
                raise ModelError(f"{key}: {file.name} has sha256 {found[:12]}..., its card says {digest[:12]}...")
            strangers = [f for f in _beside(file) if f"{name}/{f}" not in card.digests]
            if strangers:
                raise ModelError(f"{name}: the card has no digest of {', '.join(strangers)}")

    def _sibling(self, name: str, file: str) -> Path:
        """A file in the directory of the model's graph; the graph itself for ''."""
        graph = self.graph(name)
        return self._inside(name, graph.parent.name, file) if file else graph

    def _inside(self, name: str, *parts: str) -> Path:
        """An existing path of the model that does not lead out of the repository."""
        check_name(name)
        root = self.path.resolve()
        try:
            found = self.path.joinpath(name, *parts).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise ModelError(f"the repository has no {'/'.join((name, *parts))}") from error
        if not found.is_relative_to(root):
            raise ModelError(f"{'/'.join((name, *parts))} leads out of the repository")
        if not (found.is_file() if parts else found.is_dir()):
            raise ModelError(f"{'/'.join((name, *parts))} is not a {'file' if parts else 'directory'}")
        return found


def find_repository(explicit: Path | None = None) -> Path:
    """`explicit`, else $SACCADE_MODEL_REPOSITORY, else ./model_repository, else the one beside the package."""
    named = explicit or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        if not named.is_dir():
            raise ModelError(f"the model repository is not a directory: {named}")
        return named
    for candidate in (Path(DEFAULT), Path(__file__).resolve().parents[1] / DEFAULT):
        if candidate.is_dir():
            return candidate
    raise ModelError(f"no model repository found: make ./{DEFAULT} or set {VARIABLE}")


def only(denoisers: Sequence[str], where: str) -> str:
    """The one of `denoisers`. Raises ModelError that says how to name one."""
    if len(denoisers) == 1:
        return denoisers[0]
    if not denoisers:
        raise ModelError(f"no model of {where} carries a card ({PARAMETER} in {CONFIG})")
    raise ModelError(f"{where} has several models; name one of {', '.join(denoisers)}")


def check_name(name: str) -> None:
    """Raises ModelError for what cannot be a model's name."""
    if not _NAME.fullmatch(name):
        raise ModelError(f"not a model name: {name!r}")


def read_config(text: str, name: str) -> ModelConfig:
    """Protobuf text -> configuration. Raises ModelError with the line at fault."""
    try:
        return text_format.Parse(text, ModelConfig())
    except (text_format.ParseError, UnicodeError, RecursionError) as error:
        raise ModelError(f"{name}/{CONFIG} is not a Triton model configuration: {error}") from error


def read_card(config: ModelConfig, name: str) -> Card:
    """The card inside a denoiser's configuration."""
    if PARAMETER not in config.parameters:
        raise ModelError(f"model {name} has no card: {CONFIG} lacks parameters {PARAMETER!r}")
    card = parse(config.parameters[PARAMETER].string_value)
    if card.name != name:
        raise ModelError(f"the card inside {name}/{CONFIG} belongs to {card.name!r}")
    return card


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _beside(file: Path) -> list[str]:
    """Names of the other files in a version's directory, without the graph and hidden ones."""
    return sorted(f.name for f in file.parent.iterdir() if f.name not in (file.name, GRAPH) and f.name[0] != ".")


def _text(file: Path, shown: str) -> str:
    """A configuration's text; one beyond `CONFIG_BYTES` is refused unread."""
    try:
        if file.stat().st_size > CONFIG_BYTES:
            raise ModelError(f"{shown} has more than {CONFIG_BYTES} bytes")
        return file.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise ModelError(f"{shown} cannot be read: {type(error).__name__}") from error


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph, without the batch; -1 is any size. `dims` () is one number per sample.

    `cell`: picture pixels along the edge of one cell of a map whose sizes are free: 1 for a picture.
    """

    name: str
    dims: tuple[int, ...]
    dtype: Literal["FP32", "INT64"] = "FP32"
    cell: int = 1

    def text(self, name: str) -> str:
        reshape = "" if self.dims else ", reshape { shape: [ ] }"
        return f'{{ name: "{name}", data_type: TYPE_{self.dtype}, dims: [ {_listed(self.dims or (1,))} ]{reshape} }}'

    def warm_up(self, name: str, edge: int) -> str:
        """What it is given for pictures of `edge` pixels: noise, and label or timestep 0."""
        dims = tuple(edge // self.cell if size == -1 else size for size in self.dims) or (1,)
        data = "random_data" if self.dtype == "FP32" else "zero_data"
        value = f"data_type: TYPE_{self.dtype}, dims: [ {_listed(dims)} ], {data}: true"
        return f'  inputs {{ key: "{name}", value {{ {value} }} }}'


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def write_config(
    path: Path,
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    max_batch_size: int,
    card: Card | None = None,
    *,
    backend: Literal["onnxruntime", "pytorch"] = "onnxruntime",
    warm_up_px: int | None = None,
) -> Path:
    """Write <path>/<name>/config.pbtxt, full and explicit; its path. Raises ModelError for what Triton cannot read.

    `backend`: LibTorch's wants every tensor's place behind its name. `warm_up_px`: edge of the picture that Triton runs
    before it calls the model ready.
    """
    check_name(name)

    def named(tensors: Sequence[Tensor]) -> list[tuple[Tensor, str]]:
        return [(t, f"{t.name}__{place}" if backend == "pytorch" else t.name) for place, t in enumerate(tensors)]

    warm_up = []
    if warm_up_px is not None:
        given = [tensor.warm_up(there, warm_up_px) for tensor, there in named(inputs)]
        warm_up = ["model_warmup {", f'  name: "{warm_up_px} px", batch_size: 1', *given, "}"]
    text = "\n".join(
        [
            f'name: "{name}"',
            f'backend: "{backend}"',
            f"max_batch_size: {max_batch_size}",
            *(f"input {tensor.text(there)}" for tensor, there in named(inputs)),
            *(f"output {tensor.text(there)}" for tensor, there in named(outputs)),
            "dynamic_batching { max_queue_delay_microseconds: 500 }",
            "instance_group { count: 1, kind: KIND_AUTO }",
            *warm_up,
            *([] if card is None else _parameter(card)),
            "",
        ]
    )
    read_config(text, name)
    file = path / name / CONFIG
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return file


def replace_card(path: Path, name: str, card: Card) -> None:
    """Put another card into the denoiser's configuration, whose end it is. Raises ModelError if it is not."""
    file = path / name / CONFIG
    text = _text(file, f"{name}/{CONFIG}")
    head, old, _ = text.partition(_CARD_BEGINS)
    changed = "\n".join([head + _parameter(card)[0], *_parameter(card)[1:], ""])
    before, after = read_config(text, name), read_config(changed, name)
    for config in (before, after):
        config.parameters.pop(PARAMETER, None)
    if not old or before != after:
        raise ModelError(f"{name}/{CONFIG} does not end with its card")
    file.write_text(changed, "utf-8")


def _parameter(card: Card) -> list[str]:
    """The card as JSON in adjacent string pieces, a line each, so that people can read it where it lies."""
    lines = readable(json.loads(card.model_dump_json()))
    pieces = [f"      '{line}'" for line in (text.replace("\\", "\\\\").replace("'", "\\'") for text in lines)]
    return ["parameters {", f'  key: "{PARAMETER}"', "  value {", "    string_value:", *pieces, "  }", "}"]


def readable(value: Any, width: int = 120, indent: str = "") -> list[str]:
    """JSON in lines of at most `width` where that can be: what fits on a line stays on it."""
    line = json.dumps(value)
    if len(indent) + len(line) <= width or not isinstance(value, dict | list) or not value:
        return [indent + line]
    entries = list(value.items()) if isinstance(value, dict) else [(None, entry) for entry in value]
    lines = []
    for position, (key, entry) in enumerate(entries):
        inner = readable(entry, width, indent + "  ")
        if key is not None:
            inner[0] = f"{indent}  {json.dumps(key)}: {inner[0].lstrip()}"
        inner[-1] += "," if position < len(entries) - 1 else ""
        lines += inner
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return [indent + opening, *lines, indent + closing]
