"""Export a trained run into a model repository: three ONNX graphs, their configurations, the card.

    python -m training.export RUN/checkpoint.pt MODEL_REPOSITORY --recipe RUN.toml --facts FACTS.json

Every graph is run in ONNX Runtime on inputs, batches and sizes that the exporter never saw, and must agree with eager
torch before anything in the repository is touched.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor as Torch
from torch import nn
from torch.export import Dim

from saccade.card import Card
from saccade.repository import GRAPH, Tensor, sha256, write_config
from training.models.codec import BLOCK
from training.models.perceiver import TASKS, Config, Model
from training.train import Recipe
from training.weights import name_initializers

log = logging.getLogger(__name__)
MULTIPLE = 16
MAX_BATCH = 64
TOLERANCE = 2e-4
OPSET = 20
WARM_UP_PX = 512
TORCHSCRIPT = "model.pt"
FRESH = ((1, 192, 144), (3, 64, 256), (5, 256, 256))  # batch, height, width


def load(checkpoint: Path, recipe: Recipe) -> tuple[Model, dict[str, Any]]:
    """The averaged weights of a run, in evaluation mode, and what the checkpoint says of the run."""
    state = torch.load(checkpoint, weights_only=True)
    config = Config(latent_channels=len(state["latent_std"]), latent_std=tuple(state["latent_std"]), **recipe.model)
    model = Model(config, recipe.noise)
    model.load_state_dict(state["average"])
    run = {"samples": state["samples"], "wall_clock_s": round(state["seconds"], 1), "step": state["step"]}
    return model.eval(), run


def examples(model: Model, batch: int, height: int, width: int, seed: int) -> dict[str, tuple[Torch, ...]]:
    """Random inputs of the three graphs for pictures of height x width; the second picture is the first, moved."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config

    def normal(*shape: int) -> Torch:
        return torch.randn(shape, generator=draw)

    picture = nn.functional.interpolate(
        normal(batch, 3, height // 4, width // 4), scale_factor=4, mode="bicubic"
    ).tanh()
    task = torch.randint(len(TASKS), (batch,), generator=draw)
    h, w = height // BLOCK, width // BLOCK
    latent = normal(batch, config.latent_channels, h, w)
    return {
        "encoder": (picture, picture.roll((1, 3), (2, 3)), task),
        "denoiser": (
            latent,
            torch.randint(1000, (batch,), generator=draw),
            task,
            normal(batch, config.width, h // 2, w // 2),
            normal(batch, config.detail_channels, h, w),
        ),
        "decoder": (latent,),
    }


NAMES = {
    "encoder": (["image", "prompt", "task"], ["context", "detail"]),
    "denoiser": (["latent", "timestep", "task", "context", "detail"], ["prediction"]),
    "decoder": (["latent"], ["picture"]),
}


def dynamic_shapes() -> dict[str, tuple[dict[int, Any], ...]]:
    """Batch and both sizes are free in every graph; sizes are tied to each other as strides demand."""
    batch = Dim("batch", min=1, max=MAX_BATCH)
    rows, columns = Dim("rows", min=1, max=256), Dim("columns", min=1, max=256)
    picture = {0: batch, 2: MULTIPLE * rows, 3: MULTIPLE * columns}
    latent = {0: batch, 2: 2 * rows, 3: 2 * columns}
    context = {0: batch, 2: rows, 3: columns}
    one = {0: batch}
    free = {0: batch, 2: Dim("h", min=1, max=512), 3: Dim("w", min=1, max=512)}
    return {"encoder": (picture, picture, one), "denoiser": (latent, one, one, context, latent), "decoder": (free,)}


def export_graph(part: str, module: nn.Module, inputs: tuple[Torch, ...], file: Path) -> None:
    """One module to one self-contained ONNX file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names, outputs = NAMES[part]
    with torch.no_grad():
        torch.onnx.export(
            module, inputs, str(file), input_names=names, output_names=outputs, dynamic_shapes=dynamic_shapes()[part],
            dynamo=True, external_data=False, opset_version=OPSET, optimize=True, verbose=False,
        )  # fmt: skip
    graph = onnx.load(file)
    for node in graph.graph.node:  # traces of source files are nobody's business
        del node.metadata_props[:]
    del graph.graph.metadata_props[:]
    del graph.graph.value_info[:]  # shapes between the nodes: engines infer them
    for value in (*graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]
    name_initializers(graph, module.state_dict())
    onnx.save(graph, file)


def export_torchscript(part: str, module: nn.Module, inputs: tuple[Torch, ...], file: Path) -> None:
    """One module to one TorchScript file, traced: `part` is for `export_graph`'s sake."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: `verify` finds out, at other sizes, what they only suspect
        torch.jit.save(torch.jit.trace(module, inputs, check_trace=False), file)


def disagreement(part: str, module: nn.Module, inputs: tuple[Torch, ...], file: Path) -> float:
    """Error of the file's graph against eager torch, relative to the output's deviation; NaN stays.

    A root mean square over each sample, the worst one's: where the tracker is misled, it carries rounding far at single
    places, and the order of additions is an engine's own.
    """
    with torch.no_grad():
        theirs, ours = (_outputs(answer) for answer in (_run_file(part, inputs, file), module(*inputs)))
    pairs = list(zip(theirs, ours, strict=True))
    errors = [np.sqrt(np.square(a - b).reshape(len(b), -1).mean(1).max()) / (b.std() + 1e-6) for a, b in pairs]
    return float(np.max(errors))


def _run_file(part: str, inputs: tuple[Torch, ...], file: Path) -> Any:
    if file.name == TORCHSCRIPT:
        return torch.jit.load(file)(*inputs)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(NAMES[part][0], inputs, strict=True)}
    return tuple(map(torch.from_numpy, session.run(NAMES[part][1], feeds)))


def _outputs(answer: Any) -> list[np.ndarray]:
    return [value.numpy() for value in (answer if isinstance(answer, tuple) else (answer,))]


def verify(part: str, model: Model, file: Path) -> None:
    """Raises RuntimeError where the graph disagrees with eager torch."""
    for batch, height, width in FRESH:
        inputs = examples(model, batch, height, width, seed=height)[part]
        error = disagreement(part, module_of(model, part), inputs, file)
        log.info("%s at %d x %d x %d: %.1e of a deviation from eager", part, batch, height, width, error)
        if not error <= TOLERANCE:
            raise RuntimeError(f"{part}: the exported graph is {error:.1e} off at batch {batch}, {height} x {width}")


def module_of(model: Model, part: str) -> nn.Module:
    """The module behind a graph."""
    return {"encoder": model.encoder, "denoiser": model.denoiser, "decoder": model.codec}[part]


def export(
    checkpoint: Path, recipe: Recipe, repository: Path, facts: dict[str, Any], *, torchscript: Path | None = None
) -> Card:
    """Write the model named in `facts`, in place of one of that name, and return its card.

    `torchscript`: a repository, this or another, that gets the same model as <name>-torchscript for Triton's backend
    `pytorch`. Raises RuntimeError where a graph disagrees with eager torch, ValueError where the facts do not fit the
    model.
    """
    model, run = load(checkpoint, recipe)
    card = export_for("onnxruntime", model, recipe, run, repository, facts)
    if torchscript is not None:
        export_for("pytorch", model, recipe, run, torchscript, {**facts, "name": f"{card.name}-torchscript"})
    return card


def export_for(
    backend: Literal["onnxruntime", "pytorch"],
    model: Model,
    recipe: Recipe,
    run: dict[str, Any],
    repository: Path,
    facts: dict[str, Any],
) -> Card:
    """One model as files of one kind."""
    name = facts["name"]
    folders = {"encoder": f"{name}-encoder", "denoiser": name, "decoder": f"{name}-decoder"}
    write, file_name = (export_graph, GRAPH) if backend == "onnxruntime" else (export_torchscript, TORCHSCRIPT)
    with tempfile.TemporaryDirectory() as draft:
        files = {part: Path(draft) / part / file_name for part in folders}
        for part, file in files.items():
            write(part, module_of(model, part), examples(model, 2, 96, 128, 0)[part], file)
            verify(part, model, file)
        digests = {folders[part]: sha256(file) for part, file in files.items()}
        card = describe(model, recipe, run, facts, folders, digests)
        for part, file in files.items():
            install(file, repository / folders[part])
    write_configs(repository, model.config, folders, card, backend)
    return card


def install(graph: Path, folder: Path) -> None:
    """The graph as version 1 and only version of the model at `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "1").mkdir(parents=True)
    shutil.move(graph, folder / "1" / graph.name)


def describe(
    model: Model,
    recipe: Recipe,
    run: dict[str, Any],
    facts: dict[str, Any],
    folders: dict[str, str],
    digests: dict[str, str],
) -> Card:
    """The card: what the run knows, and what people wrote into `facts`."""
    labels = {task: fact["label"] for task, fact in facts["tasks"].items()}
    if any(label != TASKS.index(task) for task, label in labels.items()):
        raise ValueError(f"the facts label the tasks {labels}, the model was trained with their places in {TASKS}")
    knee = facts["tasks"]["depth"].get("coding", {}).get("knee") if "depth" in facts["tasks"] else recipe.depth_knee
    if (knee or 0) != recipe.depth_knee:
        raise ValueError(f"the facts code depth with knee {knee}, the model was trained with {recipe.depth_knee:g}")
    training = {**facts["training"], "samples": run["samples"], "wall_clock_s": run["wall_clock_s"]}
    known = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "encoder": folders["encoder"],
        "decoder": folders["decoder"],
        "conditioning": NAMES["encoder"][1],
        "latent": {"channels": model.config.latent_channels, "stride": BLOCK, "scale": 1.0, "multiple": MULTIPLE},
        "noise": {
            "schedule": recipe.schedule,
            "zero_terminal_snr": recipe.zero_terminal_snr,
            "prediction": "v_prediction",
        },
        "digests": digests,
    }
    return Card.model_validate({**facts, **known, "training": training})


def write_configs(
    repository: Path,
    config: Config,
    folders: dict[str, str],
    card: Card,
    backend: Literal["onnxruntime", "pytorch"] = "onnxruntime",
) -> None:
    task, timestep = Tensor("task", (), "INT64"), Tensor("timestep", (), "INT64")
    pictures = [Tensor("image", (3, -1, -1)), Tensor("prompt", (3, -1, -1)), task]
    context = Tensor("context", (config.width, -1, -1), cell=2 * BLOCK)
    detail = Tensor("detail", (config.detail_channels, -1, -1), cell=BLOCK)
    latent, prediction = (Tensor(n, (config.latent_channels, -1, -1), cell=BLOCK) for n in ("latent", "prediction"))
    picture = Tensor("picture", (4, -1, -1))
    largest = max(task.defaults.processing_resolution for task in card.tasks.values())
    write = partial(
        write_config, repository, max_batch_size=MAX_BATCH, backend=backend, warm_up_px=largest or WARM_UP_PX
    )
    write(folders["encoder"], pictures, [context, detail])
    write(folders["denoiser"], [latent, timestep, task, context, detail], [prediction], card=card)
    write(folders["decoder"], [latent], [picture])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="export a trained run into a model repository")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--recipe", type=Path, required=True, help="the run's TOML configuration")
    parser.add_argument(
        "--facts", type=Path, required=True, help="JSON: name, summary, licence, tasks, training data, quality"
    )
    parser.add_argument(
        "--torchscript",
        type=Path,
        metavar="REPOSITORY",
        help="also write the model there as <name>-torchscript, for Triton's backend pytorch",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)  # and not the exporter's hundreds of lines
    facts = json.loads(args.facts.read_text())
    card = export(args.checkpoint, Recipe.read(args.recipe), args.repository, facts, torchscript=args.torchscript)
    log.info("%s: %.1f M parameters, digest %s", card.name, card.parameters / 1e6, card.digest[:12])


if __name__ == "__main__":
    main()
