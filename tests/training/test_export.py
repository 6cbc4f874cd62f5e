"""What the exporter writes: the same functions, the same weights, a repository that the server reads.

One export of a small model serves all tests. Its cost volumes are smaller than the shipped ones: they make most of the
exporter's work, all of the same kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from saccade.card import QualityPoint
from saccade.errors import InvalidInput, ModelError
from saccade.local import Local
from saccade.repository import Repository
from tests.toy import build
from tests.training.conftest import TINY
from training import annotate, export, graphs, loading, weights
from training.loop import checkpoint as checkpoints
from training.models.perceiver import Config, Matcher, Model
from training.servable import Part, Servable
from training.stages.exporting import export_run
from training.train import Recipe, Run

pytestmark = [  # what the exporter says of its own innards
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FACTS = Path(export.__file__).parent / "configs" / "saccade-s.json"
MODELS: dict[Part, str] = {"encoder": "saccade-s-encoder", "denoiser": "saccade-s", "decoder": "saccade-s-decoder"}
STD = tuple(np.linspace(0.1, 1.2, 26).tolist())


@pytest.fixture(scope="module", autouse=True)
def small_cost_volumes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matcher, "STILL", 1)
        patch.setattr(Matcher, "MOVED", 0)
        yield


def network(recipe: Recipe, seed: int) -> Model:
    """Random weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    model = Model(Config(latent_channels=26, latent_std=STD, **recipe.model), recipe.noise).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Exported:
    model: Model
    recipe: Recipe
    repository: Path

    @property
    def run(self) -> Path:
        return self.repository.parent / "run"

    def graph(self, part: str) -> Path:
        return self.repository / MODELS[part] / "1" / "model.onnx"

    @property
    def servable(self) -> Servable:
        return loading.default_servable(self.model, self.recipe.schedule, self.recipe.zero_terminal_snr)

    def module(self, part: Part) -> nn.Module:
        return self.servable.module(part)


CONFIG = """
scenes = "nowhere"
schedule = "cosine"
[[stages]]
steps = 4
sizes = [[32, 32]]
per_task = 1
lr = 1e-3
lr_end = 1e-4
[model]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Through the command, from a checkpoint whose average is not its model."""
    folder = tmp_path_factory.mktemp("export")
    config = folder / "run.toml"
    config.write_text(CONFIG + "\n".join(f"{key} = {json.dumps(value)}" for key, value in TINY.items()))
    recipe = Recipe.read(config)
    model, other = network(recipe, 0), network(recipe, 1)
    run = folder / "run"
    run.mkdir()
    about = {"recipe": asdict(recipe), "latent_std": list(STD)}
    checkpoints.write_config(run, {"stage": "train", "about": about, "loop": {}})
    learned = dict(model.named_parameters())  # buffers are in `model` alone, as the loop keeps them
    own = {key: value if key not in learned else other.state_dict()[key] for key, value in model.state_dict().items()}
    checkpoints.save(run, 4, {"model": own, "average": learned}, {"samples": 12, "seconds": 3.14159})
    export_run(run, folder / "repository", facts=FACTS)
    return Exported(model, recipe, folder / "repository")


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 160), (4, 112, 80)])
def test_graphs_answer_as_eager_torch_at_fresh_batches_and_sizes(
    exported: Exported, part: Part, batch: int, height: int, width: int
) -> None:
    size = batch, height, width
    assert graphs.disagreement(exported.servable, part, exported.graph(part), size, seed=99) < 1e-4


@pytest.mark.parametrize("part", MODELS)
def test_weights_come_back_bit_for_bit(exported: Exported, part: Part) -> None:
    other = replace(exported, model=network(exported.recipe, 5)).module(part)
    for value in other.state_dict().values():
        value.zero_()
    weights.read(exported.graph(part), other)
    expected = exported.module(part).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("part", "other", "named"), [("denoiser", "encoder", "signal"), ("encoder", "decoder", r"stem\.")]
)
def test_another_models_graph_is_refused(exported: Exported, part: Part, other: str, named: str) -> None:
    module = exported.module(part)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=rf"model\.onnx holds no weight ({named})"):
        weights.read(exported.graph(other), module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_graph_of_another_size_is_refused(exported: Exported) -> None:
    wider = Config(latent_channels=26, latent_std=STD, **TINY | {"width": 48})
    model = Model(wider, exported.recipe.noise)
    with pytest.raises(ValueError, match=r"holds weight x_embedder.weight as \(3, 240, 32\), not as \(3, 240, 48\)"):
        weights.read(exported.graph("denoiser"), model.denoiser)


def test_the_repository_is_one_that_the_server_reads(exported: Exported) -> None:
    repository = Repository(exported.repository)
    assert repository.models() == sorted(MODELS.values())
    assert repository.denoisers() == [repository.default()] == ["saccade-s"]
    card = repository.card("saccade-s")
    repository.verify(card)
    assert (card.encoder, card.decoder) == (MODELS["encoder"], MODELS["decoder"])
    assert card.conditioning == ["context", "detail"]
    assert set(card.digests) == set(MODELS.values())
    assert card.parameters == sum(p.numel() for p in exported.model.parameters())
    assert card.noise.model_dump(exclude_none=True) == {
        "schedule": "cosine",
        "timesteps": 1000,
        "zero_terminal_snr": True,
        "prediction": "v_prediction",
        "start": "noise",
        "steps_offset": 0,
        "final": "clean",
    }
    assert (card.training.samples, card.training.wall_clock_s) == (12, 3.1)
    assert card.latent.model_dump() == {"channels": 26, "stride": 8, "scale": 1.0, "multiple": 16}
    assert {task: fact.label for task, fact in card.tasks.items()} == {"depth": 0, "flow": 1, "amodal": 2}


def test_what_was_exported_answers_requests(exported: Exported) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    mask = np.zeros((50, 70), bool)
    mask[10:40, 20:60] = True
    with Local(exported.repository, engine="onnxruntime", threads=1, batch_size=2) as local:
        answers = [
            local.depth(picture, processing_resolution=64),
            local.flow(picture, picture[:, ::-1].copy(), processing_resolution=64),
            local.amodal(picture, mask, processing_resolution=64),
        ]
    assert [answer.prediction.shape for answer in answers] == [(50, 70), (50, 70, 2), (50, 70)]
    assert all(np.isfinite(answer.prediction).all() for answer in answers)


@pytest.mark.parametrize("part", MODELS)
def test_configurations_declare_the_graphs_inputs_and_outputs(exported: Exported, part: Part) -> None:
    """Names, types and, past the batch, sizes: -1 where the graph leaves them open."""
    config = Repository(exported.repository).config(MODELS[part])
    graph = onnx.load(exported.graph(part)).graph
    types = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}

    def of_graph(values: Any) -> dict[str, Any]:
        tensors = {v.name: v.type.tensor_type for v in values}
        return {name: (types[t.elem_type], [d.dim_value or -1 for d in t.shape.dim][1:]) for name, t in tensors.items()}

    def of_config(values: Any) -> dict[str, Any]:
        kind = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
        return {v.name: (kind[v.data_type].name, [] if v.HasField("reshape") else list(v.dims)) for v in values}

    assert of_config(config.input) == of_graph(graph.input)
    assert of_config(config.output) == of_graph(graph.output)
    assert config.max_batch_size == export.MAX_BATCH


@pytest.mark.parametrize("part", MODELS)
def test_graphs_say_nothing_of_the_machine_they_were_made_on(exported: Exported, part: Part) -> None:
    data = exported.graph(part).read_bytes()
    for trace in (b"training/models", b"forward(self", str(Path.cwd()).encode(), b".py"):
        assert trace not in data


def test_a_graph_that_disagrees_with_torch_is_found_out(exported: Exported) -> None:
    other = network(exported.recipe, 0)
    servable = replace(exported, model=other).servable
    other.codec.synthesis *= 1.01
    with pytest.raises(ModelError, match=r"decoder: the exported graph is .* off at batch 1, 192 x 144"):
        graphs.verify(servable, "decoder", exported.graph("decoder"))
    other.codec.synthesis *= torch.nan
    with pytest.raises(ModelError, match="nan off"):
        graphs.verify(servable, "decoder", exported.graph("decoder"))


def test_a_run_begins_with_what_was_exported(exported: Exported, recipe: Recipe, tmp_path: Path) -> None:
    run = Run(replace(recipe, start=str(exported.repository)), tmp_path)
    wanted = exported.model.state_dict()
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, wanted[key]), key


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_failed_export_leaves_the_repository_as_it_was(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(servable: Servable, part: Part, file: Path, *more: Any) -> None:
        file.parent.mkdir()
        file.write_bytes(b"another graph")

    def found_out(servable: Servable, part: Part, file: Path) -> None:
        if part == "decoder":
            raise ModelError("decoder: off")

    before = contents(exported.repository)
    monkeypatch.setattr(export, "write_onnx", wrong)
    monkeypatch.setattr(export, "verify", found_out)
    with pytest.raises(ModelError, match="decoder"):
        export_run(exported.run, exported.repository, facts=FACTS)
    assert contents(exported.repository) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tasks": {"depth": {"label": 7, "coding": {"knee": 0.2}}}}, "label depth 7"),
        ({"tasks": {"depth": {"label": 0, "coding": {}}}}, "knee 0, the run with 0.2"),
        ({"licence": None}, "licence"),
    ],
)
def test_facts_that_do_not_fit_the_run_are_refused(
    exported: Exported, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    facts = {k: v for k, v in {**json.loads(FACTS.read_text()), **change}.items() if v is not None}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(InvalidInput, match=told):
        export_run(exported.run, tmp_path / "repository", facts=tmp_path / "facts.json")
    assert not (tmp_path / "repository").exists()


def test_a_run_of_the_default_model_needs_facts(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="facts"):
        export_run(exported.run, tmp_path)


def test_a_measured_curve_is_written_into_the_card_and_nothing_else_changes(tmp_path: Path) -> None:
    repository = Repository(build(tmp_path / "repository"))
    before, card = repository.config("toy"), repository.card("toy")
    point = {"task": "depth", "steps": 2, "ensemble_size": 5, "metric": "AbsRel", "value": 0.3, "pictures": 7}
    sweep = {"model": "toy", "digest": card.digest, "quality": [point | {"set": "x: all"}, point | {"set": "x: dense"}]}
    annotate.annotate(repository.path, annotate.points(sweep, card.digest))
    after = repository.config("toy")
    assert repository.card("toy") == card.model_copy(update={"quality": [QualityPoint(**point, set="x: all")]})
    assert (after.input, after.output, after.max_batch_size) == (before.input, before.output, before.max_batch_size)
    with pytest.raises(ModelError, match="not the model"):
        annotate.points(sweep, "another")


@pytest.mark.parametrize("part", MODELS)
def test_graphs_compute_in_single_precision(exported: Exported, part: Part) -> None:
    """Older engines, Triton's among them, have no kernels for double's sines and cosines."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(exported.graph(part))).graph
    double = onnx.TensorProto.DOUBLE
    assert not [value.name for value in graph.value_info if value.type.tensor_type.elem_type == double]
    assert not [value.name for value in graph.initializer if value.data_type == double]
    casts = [a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    assert double not in casts
