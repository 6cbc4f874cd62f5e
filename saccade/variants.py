"""GPU settings for a repository's models, beside the ones it ships with.

    python -m saccade.variants MODEL_REPOSITORY [--engine-cache DIRECTORY]

For every ONNX model it writes <model>/configs/<variant>.pbtxt: the shipped configuration with other ways to run it.
`tritonserver --model-config-name=<variant>` takes them, and `config.pbtxt` where a model has none of that name.

    cuda            ONNX Runtime's CUDA provider, fp32 throughout
    cuda-tf32       the same, products of fp32 in TF32
    tensorrt        TensorRT through ONNX Runtime, fp32
    tensorrt-fp16   the same in fp16, norms in fp32
    tensorrt-graph  fp16 and CUDA graphs: for pictures of one size alone, that of the model's warm-up, one at a time
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from saccade.errors import ModelError
from saccade.repository import Repository

ENGINE_CACHE = "/var/cache/tensorrt"
ROWS = 8
SMALLEST, LARGEST = 4, 4  # a profile reaches from a quarter of the warm-up's edge to four times it
CUDA = {"cudnn_conv_use_max_workspace": "1", "use_tf32": "0"}
HALF = {"precision_mode": "FP16", "trt_layer_norm_fp32_fallback": "1"}


def variants(config: ModelConfig, engine_cache: str = ENGINE_CACHE) -> dict[str, ModelConfig]:
    """Name -> configuration. Raises ModelError for a model without a warm-up, whose sizes the profiles start from."""
    cached = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": engine_cache,
        "trt_engine_cache_prefix": config.name,
    }
    profile = cached | dict(_profile(config))
    one_size = cached | dict(_profile(config, fixed=True))
    one_row = ModelConfig()
    one_row.CopyFrom(config)
    one_row.max_batch_size = 1  # Triton would merge rows beyond the profile; the gateway's batches end there too
    return {
        "cuda": _on_gpu(config, "cuda", CUDA),
        "cuda-tf32": _on_gpu(config, "cuda", CUDA | {"use_tf32": "1"}),
        "tensorrt": _on_gpu(config, "tensorrt", {"precision_mode": "FP32"} | profile),
        "tensorrt-fp16": _on_gpu(config, "tensorrt", HALF | profile),
        "tensorrt-graph": _on_gpu(one_row, "tensorrt", HALF | one_size | {"trt_cuda_graph_enable": "1"}),
    }


def _on_gpu(config: ModelConfig, provider: str, parameters: dict[str, str]) -> ModelConfig:
    """One instance on each GPU, run by a provider of ONNX Runtime."""
    changed = ModelConfig()
    changed.CopyFrom(config)
    for group in changed.instance_group:
        group.kind = ModelInstanceGroup.KIND_GPU
    accelerator = changed.optimization.execution_accelerators.gpu_execution_accelerator.add(name=provider)
    accelerator.parameters.update(parameters)
    return changed


def _profile(config: ModelConfig, fixed: bool = False) -> Iterator[tuple[str, str]]:
    """TensorRT's least, usual and largest shapes of every input; with `fixed` all three are the warm-up's."""
    if not config.model_warmup:
        raise ModelError(f"{config.name} has no model_warmup")
    warm = config.model_warmup[0].inputs
    for key, edge, rows in (("min", -SMALLEST, 1), ("opt", 1, ROWS), ("max", LARGEST, ROWS)):
        edge, rows = (1, 1) if fixed else (edge, rows)
        shapes = [f"{port.name}:{_shape(port, warm[port.name].dims, edge, rows)}" for port in config.input]
        yield f"trt_profile_{key}_shapes", ",".join(shapes)


def _shape(port: object, warm: Sequence[int], edge: int, rows: int) -> str:
    """Rows and sizes; free sizes are the warm-up's times `edge`, or by -`edge` where that is negative."""
    if port.HasField("reshape"):  # type: ignore[attr-defined]
        return f"{rows}"
    sizes = [
        size if size != -1 else max(1, now // -edge if edge < 0 else now * edge)
        for size, now in zip(port.dims, warm, strict=True)  # type: ignore[attr-defined]
    ]
    return "x".join(map(str, (rows, *sizes)))


def write(repository: Repository, engine_cache: str = ENGINE_CACHE) -> list[Path]:
    """The files written. Raises ModelError."""
    written = []
    for name in repository.models():
        config = repository.config(name)
        if config.backend != "onnxruntime":
            continue
        folder = repository.path / name / "configs"
        folder.mkdir(exist_ok=True)
        for variant, changed in variants(config, engine_cache).items():
            written.append(folder / f"{variant}.pbtxt")
            written[-1].write_text(text_format.MessageToString(changed), "utf-8")
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write GPU variants of a repository's configurations")
    parser.add_argument("repository", type=Path)
    parser.add_argument(
        "--engine-cache", default=ENGINE_CACHE, help="where TensorRT keeps its engines, in Triton's eyes"
    )
    args = parser.parse_args(argv)
    try:
        write(Repository(args.repository), args.engine_cache)
    except ModelError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
