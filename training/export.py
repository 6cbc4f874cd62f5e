"""Export a model into a model repository: three graphs, their configurations, the card.

    saccade export RUN MODEL_REPOSITORY [--facts FACTS.json]

Every graph is run in ONNX Runtime (or as TorchScript) on inputs, batches and sizes that the exporter never saw, and
must agree with eager torch before anything in the repository is touched.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from saccade.card import Card
from saccade.errors import InvalidInput
from saccade.repository import GRAPH, Tensor, check_name, sha256, write_config
from training.graphs import EXTERNAL_ABOVE, TORCHSCRIPT, verify, write_onnx, write_torchscript
from training.servable import PARTS, Part, Servable, Spec

Kind = Literal["onnx", "torchscript"]
MAX_BATCH = 64
WARM_UP_PX = 512
FILES: dict[Kind, str] = {"onnx": GRAPH, "torchscript": TORCHSCRIPT}
BACKENDS: dict[Kind, Literal["onnxruntime", "pytorch"]] = {"onnx": "onnxruntime", "torchscript": "pytorch"}


def export(
    servable: Servable,
    facts: Mapping[str, Any],
    repository: Path,
    *,
    kinds: Sequence[Kind] = ("onnx",),
    torchscript: Path | None = None,
    external_above: int = EXTERNAL_ABOVE,
) -> Card:
    """Write the model named in `facts`, in place of one of that name, and return its card, that of the first kind.

    `facts`: what the card says and the modules do not know: name, summary, licence, tasks, training. Of several `kinds`
    the TorchScript files are named <name>-torchscript, for Triton's backend `pytorch`; they go into `torchscript`, or
    beside the others. Weights of more than `external_above` bytes lie in a file beside their graph.
    Raises ModelError where a graph disagrees with eager torch, InvalidInput where the facts do not fit the model.
    """
    check(servable, facts)
    if torchscript is not None and "torchscript" not in kinds:
        kinds = (*kinds, "torchscript")
    cards = []
    for kind in kinds:
        beside = kind == "torchscript" and len(kinds) > 1
        named = {**facts, "name": f"{facts['name']}-torchscript"} if beside else facts
        where = torchscript if beside and torchscript is not None else repository
        cards.append(_export(servable, named, where, kind, external_above))
    return cards[0]


def check(servable: Servable, facts: Mapping[str, Any]) -> None:
    """Raises InvalidInput for facts that lack something, and ModelError for a name that no model can have."""
    missing = [key for key in ("name", "summary", "licence", "tasks", "training") if key not in facts]
    if missing:
        raise InvalidInput(f"the facts say nothing of {', '.join(missing)}", param="facts")
    check_name(facts["name"])
    labels = {task: fact["label"] for task, fact in facts["tasks"].items()}
    strange = [f"{task} {label}" for task, label in labels.items() if label not in servable.labels]
    if strange:
        raise InvalidInput(
            f"the facts label {', '.join(strange)}; the model was trained with {', '.join(map(str, servable.labels))}",
            param="facts",
        )


def folders_of(name: str) -> dict[Part, str]:
    """The model of each graph."""
    return {"encoder": f"{name}-encoder", "denoiser": name, "decoder": f"{name}-decoder"}


def _export(servable: Servable, facts: Mapping[str, Any], repository: Path, kind: Kind, external_above: int) -> Card:
    """One model as files of one kind."""
    folders = folders_of(facts["name"])
    with tempfile.TemporaryDirectory(dir=_made(repository), prefix=".draft-") as draft:
        files: dict[Part, Path] = {part: Path(draft) / part / FILES[kind] for part in PARTS}
        for part, file in files.items():
            if kind == "onnx":
                write_onnx(servable, part, file, MAX_BATCH, external_above)
            else:
                write_torchscript(servable, part, file)
            verify(servable, part, file)
        digests = {key: sha256(file) for part in PARTS for key, file in _written(folders[part], files[part])}
        card = describe(servable, facts, digests)
        for part in PARTS:
            install(files[part].parent, repository / folders[part])
    write_configs(repository, servable, folders, card, kind)
    return card


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _written(model: str, graph: Path) -> list[tuple[str, Path]]:
    """The model's files with their keys in a card's digests: the graph under the model's name, others behind it."""
    return [(model if file == graph else f"{model}/{file.name}", file) for file in sorted(graph.parent.iterdir())]


def install(draft: Path, folder: Path) -> None:
    """The files of `draft` as version 1 and only version of the model at `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.move(draft, folder / "1")


def describe(servable: Servable, facts: Mapping[str, Any], digests: dict[str, str]) -> Card:
    """The card: what the modules know, and what people and the run wrote into `facts`."""
    folders = folders_of(facts["name"])
    known = {
        "parameters": servable.parameters,
        "encoder": folders["encoder"],
        "decoder": folders["decoder"],
        "conditioning": [spec.name for spec in servable.conditioning],
        "latent": servable.latent,
        "noise": servable.noise,
        "digests": digests,
    }
    return Card.model_validate({**facts, **known})


def write_configs(
    repository: Path, servable: Servable, folders: Mapping[Part, str], card: Card, kind: Kind = "onnx"
) -> None:
    """A config.pbtxt for each graph; the denoiser's carries the card."""
    task, timestep = Tensor("task", (), "INT64"), Tensor("timestep", (), "INT64")
    pictures = [Tensor("image", (3, -1, -1)), Tensor("prompt", (3, -1, -1)), task]

    def tensor(spec: Spec) -> Tensor:
        return Tensor(spec.name, (spec.channels, -1, -1), cell=spec.cell)

    channels, stride = servable.latent.channels, servable.latent.stride
    latent, prediction = (tensor(Spec(name, channels, stride)) for name in ("latent", "prediction"))
    inputs = [latent, timestep, task, *map(tensor, servable.conditioning)]
    largest = max((task.defaults.processing_resolution for task in card.tasks.values()), default=0) or WARM_UP_PX
    edge = -(-largest // servable.latent.multiple) * servable.latent.multiple

    def write(part: Part, inputs: list[Tensor], outputs: list[Tensor], card: Card | None = None) -> None:
        backend = BACKENDS[kind]
        write_config(repository, folders[part], inputs, outputs, MAX_BATCH, card, backend=backend, warm_up_px=edge)

    write("encoder", pictures, list(map(tensor, servable.encoded)))
    write("denoiser", inputs, [prediction], card)
    write("decoder", [latent], [Tensor("picture", (servable.planes, -1, -1))])
