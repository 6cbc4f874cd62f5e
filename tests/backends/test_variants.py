"""GPU variants: whole configurations of the same model, which Triton's own parser takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade.card import PARAMETER
from saccade.errors import ModelError
from saccade.repository import Repository, read_config
from saccade.variants import main, variants, write
from tests import toy
from tests.triton.server import Tritons, TritonServer

SHIPPED = Path(__file__).parents[2] / "model_repository"
NAMES = {"cuda", "cuda-tf32", "tensorrt", "tensorrt-fp16", "tensorrt-graph"}


@pytest.mark.parametrize("name", ["saccade-s", "saccade-s-encoder", "saccade-s-decoder"])
def test_a_variant_is_the_shipped_model_run_otherwise(name: str) -> None:
    shipped = Repository(SHIPPED).config(name)
    found = variants(shipped)
    assert set(found) == NAMES
    for variant in found.values():
        assert (variant.input, variant.output, variant.model_warmup) == (
            shipped.input,
            shipped.output,
            shipped.model_warmup,
        )
        assert variant.parameters == shipped.parameters
        [accelerator] = variant.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name in ("cuda", "tensorrt")


def test_profiles_reach_from_64_to_1024_px() -> None:
    found = variants(Repository(SHIPPED).config("saccade-s"))["tensorrt-fp16"]
    parameters = found.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
    smallest, largest = (
        dict(entry.split(":") for entry in parameters[f"trt_profile_{key}_shapes"].split(",")) for key in ("min", "max")
    )
    assert smallest == {
        "latent": "1x26x8x8",
        "timestep": "1",
        "task": "1",
        "context": "1x192x4x4",
        "detail": "1x58x8x8",
    }
    assert (largest["latent"], largest["context"], largest["task"]) == ("8x26x128x128", "8x192x64x64", "8")


def test_a_graph_is_of_one_size() -> None:
    found = variants(Repository(SHIPPED).config("saccade-s-encoder"))["tensorrt-graph"]
    parameters = found.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
    assert len({parameters[f"trt_profile_{key}_shapes"] for key in ("min", "opt", "max")}) == 1
    assert parameters["trt_cuda_graph_enable"] == "1"


def test_files_lie_where_triton_looks(tmp_path: Path) -> None:
    repository = Repository(toy.build(tmp_path / "repository"))
    main([str(repository.path), "--engine-cache", "/elsewhere"])
    files = sorted((repository.path / "toy" / "configs").iterdir())
    assert {file.stem for file in files} == NAMES
    for file in files:
        config = read_config(file.read_text(), "toy")
        assert PARAMETER in config.parameters
    assert repository.models() == ["toy", "toy-decoder", "toy-encoder"], "they are no models"


def test_a_model_without_warm_up_is_refused(tmp_path: Path) -> None:
    config = Repository(toy.build(tmp_path)).config("toy")
    del config.model_warmup[:]
    with pytest.raises(ModelError, match="toy has no model_warmup"):
        variants(config)


@pytest.mark.triton
def test_triton_takes_a_variant_by_its_name(tritons: Tritons, tmp_path: Path) -> None:
    """Without a GPU it refuses to load it, and says that this is why."""
    del tritons
    repository = Repository(toy.build(tmp_path / "repository"))
    write(repository)
    server = TritonServer(repository.path, tmp_path / "triton", "--model-config-name=tensorrt-fp16")
    try:
        with pytest.raises(AssertionError, match="model toy has kind KIND_GPU but no GPUs are available"):
            server.start(10)
    finally:
        server.close()
