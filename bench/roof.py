"""How near the machine's roof a request comes: forwards of the papers' a2, dense and of experts, and whole requests.

    python -m bench.roof [--rounds 8] [--out FILE] [--edges 256 512] [--model a2] [--parts dense experts]

Forwards: one denoising step at batch 1, with random weights, by eager torch, diffusers' DiTTransformer2DModel of the
same shape (dense only), ONNX Runtime fp32, OpenVINO fp32 and the server's choice, each in a process of its own, turn
about; the same of fixed size, as with the setting `ratios`; and what the server does not take, everything in bf16 by
OpenVINO's hint, of fixed size too. The error is the root mean square of the
difference to eager torch, relative to its output's. The roof is the product of two square matrices of 2048, before and
after the forwards and in the same process: the best one of all processes of that precision counts. Where the time goes
is what OpenVINO's own counters say.

Sharp attention: errors of the same model with queries and keys that are larger, for attention is in bf16 too.

Requests: one of each task at the same steps and members, through `saccade.pipeline`, phase by phase: the server's
engine, ONNX Runtime fp32, eager torch one member at a time; for the default model and for the a2 of 256 px.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gateway import EXAMPLES, PARTS
from bench.machine import describe
from saccade import render
from saccade.backends import Backend, bf16
from saccade.backends.embedded import Embedded
from saccade.backends.engines import default_threads, has_bf16, open_engine, openvino_properties
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Inputs, Options, Pipeline
from saccade.repository import Repository, find_repository
from saccade.tasks import TaskName
from server import allocator
from training.backend import TorchBackend
from training.codecs import CodecConfig
from training.cost import forward_macs
from training.export import export
from training.models.dit import DiTConfig, named
from training.models.moe import Experts
from training.objectives import DiffusionConfig
from training.perception import Perception, PerceptionConfig

LABELS = {"depth": 0, "flow": 1, "amodal": 2}
INPUTS = ("latent", "timestep", "task", "condition")
PARTS_OF_IT = ("dense", "experts", "sharp", "requests")
ROOF = 2048
TURNS = 2
Engine = tuple[str, str]
EAGER, DIFFUSERS = ("torch eager", "fp32"), ("diffusers", "fp32")
FIXED, HINT = "bf16, fixed size", "bf16 by hint, fixed size"
SHARPER = (1, 2, 4, 8)
"""Times as large as at random: queries, and keys."""


@dataclass(frozen=True)
class Forward:
    """What one process measured: seconds of forwards, operations a second of the roof, seconds by kind of operation;
    and what came out."""

    seconds: list[float]
    roof: float
    spent: dict[str, float]
    output: np.ndarray


def model_of(name: str, experts: bool) -> DiTConfig:
    mixture = Experts() if experts else None
    return named(name, channels=26, condition=32, labels=len(LABELS), inputs=1, experts=mixture)


def perception(config: DiTConfig, sharper: float = 1) -> Perception:
    """Random weights, gates and output included, so that every layer has something to do."""
    torch.manual_seed(0)
    model = Perception(PerceptionConfig(config, CodecConfig(), DiffusionConfig(), LABELS))
    for parameter in model.dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        for block in model.dit.blocks:
            block.attn.qkv.weight[: 2 * config.width] *= sharper
            block.attn.qkv.bias[: 2 * config.width] *= sharper
    return model


def exported(config: DiTConfig, repository: Path, edge: int, sharper: float = 1) -> str:
    """The model's name in a repository of its own."""
    defaults = {"steps": 4, "ensemble_size": 4, "reduction": "mean", "processing_resolution": edge}
    facts = {
        "name": "measured",
        "summary": "random weights",
        "licence": "none",
        "tasks": {task: {"label": label, "coding": {}, "defaults": defaults} for task, label in LABELS.items()},
        "training": {"data": [], "samples": 0, "wall_clock_s": 0, "device": "none"},
    }
    return export(perception(config, sharper).servable(), facts, repository).name


def engines(experts: bool) -> list[Engine]:
    lowered = ("bf16", FIXED, HINT) if has_bf16() else ()
    precisions = [("openvino", precision) for precision in ("fp32", *lowered)]
    return [EAGER, *([] if experts else [DIFFUSERS]), ("onnxruntime", "fp32"), *precisions]


def forward(config: DiTConfig, repository: Path, engine: Engine, edge: int, rounds: int) -> Forward:
    """Runs in a process of its own."""
    torch.set_num_threads(default_threads())
    feeds = [value.numpy() for value in perception(config).servable().examples(1, edge, edge, 0)["denoiser"]]
    run, counters = runner(config, repository, engine, feeds)
    roofs = [roof(engine)]
    run(feeds), run(feeds)
    output, seconds = run(feeds), []
    for _ in range(rounds):
        began = time.perf_counter()
        run(feeds)
        seconds.append(time.perf_counter() - began)
    return Forward(seconds, max(*roofs, roof(engine)), counters(feeds), np.asarray(output))


Runner = Callable[[list[np.ndarray]], Any]
Counters = Callable[[list[np.ndarray]], dict[str, float]]


def runner(config: DiTConfig, repository: Path, engine: Engine, feeds: list[np.ndarray]) -> tuple[Runner, Counters]:
    """How a forward is run, and where its time goes (for OpenVINO)."""
    if engine in (EAGER, DIFFUSERS):
        module = perception(config).servable().denoiser if engine == EAGER else Theirs(config)

        def eager(feeds: list[np.ndarray]) -> torch.Tensor:
            with torch.inference_mode():
                return module(*map(torch.from_numpy, feeds))

        return eager, lambda feeds: {}
    file = Repository(repository).graph("measured")
    if engine[1] in (FIXED, HINT):
        request = compiled(file, engine[1], feeds)

        def tried(given: list[np.ndarray]) -> Any:
            return request.infer(dict(zip(INPUTS, given, strict=True)), share_inputs=True)[0]

        return tried, lambda given: spent(file, engine, given)
    opened = open_engine(file, *engine, default_threads())

    def run(feeds: list[np.ndarray]) -> Any:
        return opened.run(dict(zip(INPUTS, feeds, strict=True)))["prediction"]

    return run, lambda feeds: spent(file, engine, feeds) if engine[0] == "openvino" else {}


def compiled(file: Path, precision: str, feeds: list[np.ndarray], **more: Any) -> Any:
    """As the server compiles it, or as was tried; of a fixed size that of `feeds`."""
    from openvino import Core

    core, properties = Core(), openvino_properties(default_threads()) | more
    model = core.read_model(str(file))
    if precision == HINT:
        properties["INFERENCE_PRECISION_HINT"] = "bf16"
    elif precision != "fp32":
        bf16.narrow(model)
    if precision in (FIXED, HINT):
        model.reshape({name: list(value.shape) for name, value in zip(INPUTS, feeds, strict=True)})
    return core.compile_model(model, "CPU", properties).create_infer_request()


class Theirs(torch.nn.Module):
    """diffusers' model of the same shape, with weights of its own."""

    def __init__(self, config: DiTConfig) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__()
        channels = config.condition + config.channels
        self.dit = DiTTransformer2DModel(
            num_attention_heads=config.heads, attention_head_dim=config.width // config.heads, in_channels=channels,
            out_channels=config.channels, num_layers=config.depth, sample_size=2 * config.grid,
            patch_size=config.patch, num_embeds_ada_norm=1000,
        ).eval()  # fmt: skip

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, task: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        return self.dit(torch.cat([condition, latent], 1), timestep, class_labels=task).sample


def roof(engine: Engine) -> float:
    """Operations a second of a square matrix product in the engine's precision."""
    if engine[0] == "openvino":
        return _roof_openvino("fp32" if engine[1] == "fp32" else "bf16")
    a = torch.randn(ROOF, ROOF)
    return 2 * ROOF**3 / min(_timed(lambda: a @ a) for _ in range(4))


def _roof_openvino(precision: str) -> float:
    from openvino import Core, Model
    from openvino import opset13 as ops

    given = ops.parameter([ROOF, ROOF], np.float32)
    weight = ops.constant(np.random.default_rng(0).standard_normal((ROOF, ROOF), np.float32))
    kind = "bf16" if precision == "bf16" else "f32"
    product = ops.matmul(ops.convert(given, kind), ops.convert(weight, kind), False, False)
    model = Model([ops.convert(product, "f32")], [given], "roof")
    compiled = Core().compile_model(model, "CPU", openvino_properties(default_threads()))
    request, matrix = compiled.create_infer_request(), np.ones((ROOF, ROOF), np.float32)
    return 2 * ROOF**3 / min(_timed(lambda: request.infer([matrix], share_inputs=True)) for _ in range(5))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


LINEAR, ATTENTION = "linear layers", "attention"
KINDS = {
    "FullyConnected": LINEAR,
    "MatMul": ATTENTION,
    "Subgraph": ATTENTION,
    "Softmax": ATTENTION,
    "Convert": "between precisions",
    "Transpose": "moving data",
    "Reorder": "moving data",
    "Gather": "moving data",
    "ScatterElementsUpdate": "moving data",
    "ScatterNDUpdate": "moving data",
}


def spent(file: Path, engine: Engine, feeds: list[np.ndarray]) -> dict[str, float]:
    """Seconds of one forward by kind of operation, as OpenVINO's counters have them."""
    request = compiled(file, engine[1], feeds, PERF_COUNT=True)
    for _ in range(3):
        request.infer(dict(zip(INPUTS, feeds, strict=True)))
    found: Counter[str] = Counter()
    for entry in request.profiling_info:
        found[KINDS.get(entry.node_type, "norms, sums, activations")] += entry.real_time.total_seconds()
    return dict(found)


def alone(*given: object) -> Forward:
    """`forward` in a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(forward, given)


def forwards(
    name: str, mixtures: Sequence[bool], edges: Sequence[int], rounds: int, told: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """Rows of the table of forwards, and of where the time goes; of the dense model, of one of experts, or both."""
    rows, where = [], []
    for experts in mixtures:
        config, label = model_of(name, experts), f"{name}-8E2A" if experts else name
        with tempfile.TemporaryDirectory() as folder:
            exported(config, Path(folder), max(edges))
            for edge in edges:
                seconds: dict[Engine, list[float]] = defaultdict(list)
                last: dict[Engine, Forward] = {}
                for turn in range(TURNS):
                    for engine in engines(experts):
                        told(f"{label}, {edge} px, {' '.join(engine)}, turn {turn + 1} of {TURNS}")
                        found = alone(config, Path(folder), engine, edge, -(-rounds // TURNS))
                        seconds[engine] += found.seconds
                        if engine not in last or found.roof > last[engine].roof:
                            last[engine] = found
                rows += _rows(label, edge, config, seconds, last)
                where += _where(label, edge, config, last)
    return rows, where


def _rows(
    label: str, edge: int, config: DiTConfig, seconds: dict[Engine, list[float]], last: dict[Engine, Forward]
) -> list[str]:
    cells = edge // 8
    work, tokens = 2 * forward_macs(config, cells, cells), (cells // config.patch) ** 2
    slowest, true = statistics.median(seconds[EAGER]), last[EAGER].output
    roofs: dict[bool, float] = defaultdict(float)
    for engine, found in last.items():
        roofs[engine[1] == "fp32"] = max(roofs[engine[1] == "fp32"], found.roof)
    rows = []
    for engine, times in seconds.items():
        took, roof = statistics.median(times), roofs[engine[1] == "fp32"]
        rate, off = work / took, "" if engine == DIFFUSERS else f"{_error(last[engine].output, true):.1e}"
        rows.append(
            f"| {label}, {tokens} tokens | {' '.join(engine)} | {took * 1e3:.1f} | {slowest / took:.2f} | "
            f"{rate / 1e9:.0f} | {rate / roof:.0%} of {roof / 1e9:.0f} | {off} |"
        )
    return rows


def _error(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - true) ** 2) / np.mean(true**2)))


def _where(label: str, edge: int, config: DiTConfig, last: dict[Engine, Forward]) -> list[str]:
    cells = edge // 8
    tokens = (cells // config.patch) ** 2
    attention = 4 * config.depth * tokens**2 * config.width
    linear = 2 * forward_macs(config, cells, cells) - attention
    rows = []
    for engine, found in last.items():
        if total := sum(found.spent.values()):
            parts = ", ".join(f"{kind} {s / total:.0%}" for kind, s in Counter(found.spent).most_common())
            linear_rate, attention_rate = linear / found.spent[LINEAR], attention / found.spent[ATTENTION]
            rows.append(
                f"| {label}, {tokens} tokens | {engine[1]} | {parts} | {linear_rate / 1e9:.0f} "
                f"({linear_rate / found.roof:.0%} of the roof) | {attention_rate / 1e9:.0f} |"
            )
    return rows


def sharp(name: str, edge: int, told: Callable[[str], None]) -> list[str]:
    """Rows of the table of errors by the size of attention's logits."""
    config, rows = model_of(name, False), []
    for sharper in SHARPER:
        told(f"{name}, {edge} px, queries and keys {sharper} times as large")
        with tempfile.TemporaryDirectory() as folder:
            exported(config, Path(folder), edge, sharper)
            file = Repository(Path(folder)).graph("measured")
            servable = perception(config, sharper).servable()
            tensors = servable.examples(1, edge, edge, 0)["denoiser"]
            feeds = [value.numpy() for value in tensors]
            largest = watched(servable.denoiser, config)
            with torch.inference_mode():
                true = servable.denoiser(*tensors).numpy()
            given = dict(zip(INPUTS, feeds, strict=True))
            found = [compiled(file, kind, feeds).infer(given)[0] for kind in ("fp32", "bf16", HINT)]
        rows.append(f"| {max(largest):.0f} | {' | '.join(f'{_error(output, true):.1e}' for output in found)} |")
    return rows


def watched(denoiser: torch.nn.Module, config: DiTConfig) -> list[float]:
    """Will have the largest logit of every attention that is run."""
    largest = []

    def watch(module: torch.nn.Module, given: object, qkv: torch.Tensor) -> None:
        q, k, _ = qkv.unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
        largest.append(float((q @ k.transpose(-1, -2)).abs().max()) * q.shape[-1] ** -0.5)

    for name, module in denoiser.named_modules():
        if name.endswith("attn.qkv"):
            module.register_forward_hook(watch)
    return largest


def inputs_of(task: TaskName) -> Inputs:
    files = {name: (EXAMPLES / file).read_bytes() for name, file in PARTS[task].items()}
    mask = files.pop("mask", None)
    pictures = {name: read_picture(data) for name, data in files.items()}
    return Inputs(task, mask=None if mask is None else read_mask(mask), **pictures)


async def phases(backend: Backend, task: TaskName, options: Options, rounds: int) -> dict[str, float]:
    """Median milliseconds of each phase."""
    pipeline, found = Pipeline(backend), defaultdict(list)
    inputs = inputs_of(task)
    for turn in range(rounds + 1):
        began = time.perf_counter()
        answer = await pipeline(inputs, options.resolve(pipeline.card, task))
        answered = time.perf_counter()
        await asyncio.to_thread(render.encode, answer, "png")
        ended = time.perf_counter()
        if turn:
            for phase in ("encode", "denoise", "decode", "ensemble"):
                found[phase].append(answer.timings_ms[phase])
            found["write"].append((ended - answered) * 1e3)
            found["all"].append((ended - began) * 1e3)
    return {phase: statistics.median(times) for phase, times in found.items()}


def requests(name: str, edge: int, default: Path, rounds: int, told: Callable[[str], None]) -> list[str]:
    rows = []
    options = Options(steps=4, ensemble_size=4, processing_resolution=edge)
    with tempfile.TemporaryDirectory() as folder:
        exported(model_of(name, False), Path(folder), edge)
        for label, path, eager in (
            ("default", default, lambda card: TorchBackend.load(Repository(default))),
            (name, Path(folder), lambda card: TorchBackend(perception(model_of(name, False)).servable(), card)),
        ):
            repository = Repository(path)
            card = repository.card(repository.default())
            for task in PARTS:
                for engine in (EAGER, ("onnxruntime", "fp32"), ("auto", "auto"), ("auto", FIXED)):
                    told(f"a request: {label}, {task}, {' '.join(engine)}")
                    backend = eager(card) if engine == EAGER else served(repository, engine, task)
                    said = " ".join(engine) if engine == EAGER else f"{backend.engine} {backend.precision}"
                    said += ", fixed size" if engine[1] == FIXED else ""
                    times = asyncio.run(_asked(backend, task, options, rounds))
                    cells = " | ".join(f"{ms:.0f}" for ms in times.values())
                    share = (times["ensemble"] + times["write"]) / times["all"]
                    rows.append(f"| {label} | {task} | {said} | {cells} | {share:.1%} |")
    return rows


RATIOS: dict[TaskName, tuple[int, int]] = {"depth": (2, 3), "flow": (3, 4), "amodal": (2, 3)}
"""Of the examples, height to width. One alone, for a large model is not compiled for more."""


def served(repository: Repository, engine: Engine, task: TaskName) -> Embedded:
    precision, ratios = ("auto", [RATIOS[task]]) if engine[1] == FIXED else (engine[1], [])
    return Embedded.load(repository, engine=engine[0], precision=precision, ratios=ratios)


async def _asked(backend: Backend, task: TaskName, options: Options, rounds: int) -> dict[str, float]:
    try:
        if isinstance(backend, Embedded):
            await backend.specialise(1)
        return await phases(backend, task, options, rounds)
    finally:
        await backend.aclose()


def bench(
    name: str, parts: Sequence[str], edges: Sequence[int], default: Path, rounds: int, told: Callable[[str], None]
) -> str:
    allocator.settle()  # as the server does
    mixtures = [experts for part, experts in (("dense", False), ("experts", True)) if part in parts]
    rows, where = forwards(name, mixtures, edges, rounds, told)
    blurred = sharp(name, min(edges), told) if "sharp" in parts else []
    asked = requests(name, min(edges), default, max(3, rounds // 3), told) if "requests" in parts else []
    return "\n".join(
        [
            f"Random weights, batch 1, medians of {rounds} forwards. GFLOP/s: two for every multiply-accumulate of the "
            "matrix products (`training.cost`), over the whole time.",
            f"Machine: {describe('onnxruntime', 'openvino', 'torch', 'diffusers')}.",
            "",
            "| model | engine | ms | times as fast as eager torch | GFLOP/s | share of the roof | error |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "## Where the time goes (OpenVINO's counters)",
            "",
            "| model | precision | share of the time | linear layers, GFLOP/s | attention, GFLOP/s |",
            "|---|---|---|---|---|",
            *where,
            "",
            f"## Sharp attention ({name}, {min(edges)} px, errors against eager torch)",
            "",
            "| largest logit | fp32 | bf16 | bf16 by hint |",
            "|---|---|---|---|",
            *blurred,
            "",
            f"## One request: 4 steps, 4 members, {min(edges)} px, milliseconds",
            "",
            "| model | task | engine | encode | denoise | decode | ensemble | write PNG | all | merging and writing |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *asked,
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="how near the machine's roof a request comes")
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--model", default="a2")
    parser.add_argument("--edges", type=int, nargs="+", default=[256, 512], help="pixels")
    parser.add_argument("--parts", nargs="+", choices=PARTS_OF_IT, default=PARTS_OF_IT)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)

    def told(what: str) -> None:
        sys.stderr.write(f"{what}\n")

    table = bench(args.model, args.parts, args.edges, find_repository(args.repository), args.rounds, told)
    sys.stdout.write(table + "\n")
    if args.out:
        args.out.write_text(f"# How near the roof\n\nMade by `python -m bench.roof`.\n\n{table}\n")


if __name__ == "__main__":
    main()
