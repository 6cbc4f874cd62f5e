"""The peers' own answers, from their own files through our importer: in eager torch, in ONNX and in TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import Dim

from training.importers.load import load
from training.models.dit import DiT, Routing

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = 1e-5
FRESH = ((1, 6, 16), (3, 12, 8), (7, 16, 4))  # batch, height and width that no exporter saw
KINDS = ("dit", "dit_moe", "generalist", "dtr")
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Golden:
    """A file of theirs: its weights through the importer, its inputs and its answer."""

    def __init__(self, kind: str, folder: Path) -> None:
        tensors = load_file(GOLDEN / f"{kind}.safetensors")
        weights = {key.removeprefix("weights/"): x for key, x in tensors.items() if key.startswith("weights/")}
        if kind == "dtr":  # as its authors' buffers are saved
            weights |= {f"blocks.{block}.routing._unit_mapping": tensors["mask"].clone() for block in range(2)}
        file = folder / f"{kind}.safetensors"
        save_file(weights, file)
        self.inputs = tuple(tensors[f"in/{name}"] for name in "xty")
        self.out, self.mask = tensors["out"], tensors.get("mask")
        imported = load(file, heads=4, grid=4)
        self.model = DiT(imported.config).eval()
        self.model.load_state_dict(imported.state)

    def check(self, forward: Forward) -> None:
        """Their answer on their inputs; eager torch's on others."""
        assert_close(forward(*self.inputs), self.out)
        config, draw = self.model.config, torch.Generator().manual_seed(1)
        for batch, height, width in FRESH:
            x = torch.randn(batch, config.condition + config.channels, height, width, generator=draw)
            t = torch.randint(1000, (batch,), generator=draw)
            y = config.first_label + torch.randint(config.labels - config.first_label - 1, (batch,), generator=draw)
            assert_close(forward(x, t, y), self.model(x, t, y))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.fixture(params=KINDS, scope="module")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp("weights"))


@torch.no_grad()
def test_eager_torch_answers_as_the_reference_did(golden: Golden) -> None:
    assert_close(golden.model(*golden.inputs), golden.out)


@torch.no_grad()
def test_onnx_answers_as_the_reference_did(golden: Golden, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    batch, rows, columns = Dim("batch", min=1, max=64), Dim("rows", min=1, max=64), Dim("columns", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            golden.model, golden.inputs, str(file), input_names=list("xty"), output_names=["out"], dynamo=True,
            dynamic_shapes=({0: batch, 2: 2 * rows, 3: 2 * columns}, {0: batch}, {0: batch}), external_data=False,
            opset_version=20, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip("xty", inputs, strict=True)})[0])

    golden.check(forward)


@torch.no_grad()
def test_torchscript_answers_as_the_reference_did(golden: Golden, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(golden.model, golden.inputs, check_trace=False), file)
        golden.check(torch.jit.load(file))


def test_the_routing_table_is_the_references(tmp_path: Path) -> None:
    golden = Golden("dtr", tmp_path)
    assert golden.model.config.routing == Routing(alpha=4.0, beta=0.8)
    assert torch.equal(golden.model.masks, golden.mask.float())
