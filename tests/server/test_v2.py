"""The Open Inference Protocol under /v2: Triton's unchanged client, the same answers, refusals in its shape."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from saccade.backends import Ticket
from saccade.backends.embedded import Embedded
from saccade.repository import Repository
from server.problems import Problem
from server.v2 import tensors
from server.v2.tensors import LENGTH_HEADER, MAX_JSON_BYTES
from tests.server.house import files
from tests.server.process import Process, serving
from tests.toy import LABELS, LATENT, PLANES, STRIDE
from tests.triton.server import TritonServer

EDGE = 64
RANDOM = np.random.default_rng(0)
Tensors = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def server(toy_repository: Path) -> Iterator[Process]:
    with serving(toy_repository, max_processing_resolution=128) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator[triton.InferenceServerClient]:
    yield from connected(server.port)


def connected(port: int) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


def pictures(rows: int = 2) -> Tensors:
    image, prompt = RANDOM.uniform(-1, 1, (2, rows, 3, EDGE, EDGE)).astype(np.float32)
    return {"image": image, "prompt": prompt, "task": np.full((rows, 1), LABELS["flow"])}


def latents(rows: int = 2, edge: int = EDGE) -> Tensors:
    shape = (rows, LATENT, edge // STRIDE, edge // STRIDE)
    maps = {key: RANDOM.standard_normal(shape, np.float32) for key in ("latent", "image_latent", "prompt_latent")}
    return maps | {"timestep": np.full((rows, 1), 999), "task": np.full((rows, 1), LABELS["depth"])}


FEEDS = {"toy-encoder": pictures(), "toy": latents(), "toy-decoder": {"latent": latents()["latent"]}}


def sent(tensors: Tensors, binary: bool = True) -> list[triton.InferInput]:
    inputs = []
    for name, value in tensors.items():
        made = triton.InferInput(name, list(value.shape), "FP32" if value.dtype == np.float32 else "INT64")
        made.set_data_from_numpy(value, binary_data=binary)
        inputs.append(made)
    return inputs


def own(repository: Path, model: str, feeds: Tensors) -> Tensors:
    """What the embedded backend says by itself, a row at a time."""

    async def run() -> Tensors:
        backend = Embedded.load(Repository(repository), engine="onnxruntime", precision="fp32", threads=1)
        try:
            flat = {name: value.reshape(-1) if value.dtype == np.int64 else value for name, value in feeds.items()}
            rows = [
                {name: value[i : i + 1] for name, value in flat.items()} for i in range(len(next(iter(feeds.values()))))
            ]
            answers = [await one(backend, model, row) for row in rows]
        finally:
            await backend.aclose()
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    return asyncio.run(run())


async def one(backend: Embedded, model: str, row: Tensors) -> Tensors:
    if model == "toy-encoder":
        return dict(await backend.encode(row["image"], row["prompt"], row["task"], Ticket()))
    if model == "toy-decoder":
        return {"picture": await backend.decode(row["latent"], Ticket())}
    conditioning = {name: row[name] for name in backend.card.conditioning}
    return {"prediction": await backend.denoise(row["latent"], row["timestep"], row["task"], conditioning, Ticket())}


def test_what_the_client_asks_about_server_and_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "saccade"
    for name in FEEDS:
        assert client.is_model_ready(name)
        assert client.is_model_ready(name, "1")
    assert not client.is_model_ready("toy", "2")
    assert not client.is_model_ready("nobody")
    assert [(m["name"], m["state"]) for m in client.get_model_repository_index()] == [
        (m, "READY") for m in sorted(FEEDS)
    ]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("model", FEEDS)
def test_outputs_are_those_of_the_backend(
    client: triton.InferenceServerClient, toy_repository: Path, model: str, binary: bool
) -> None:
    wanted = own(toy_repository, model, FEEDS[model])
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in wanted]
    result = client.infer(model, sent(FEEDS[model], binary), model_version="1", outputs=outputs, request_id="mine")
    assert result.get_response()["id"] == "mine"
    for name, value in wanted.items():
        np.testing.assert_allclose(result.as_numpy(name), value, rtol=0, atol=1e-6)


def test_all_outputs_come_where_none_is_named(client: triton.InferenceServerClient) -> None:
    result = client.infer("toy-encoder", sent(FEEDS["toy-encoder"]))
    assert {output["name"] for output in result.get_response()["outputs"]} == {"image_latent", "prompt_latent"}
    assert result.as_numpy("image_latent").shape == (2, LATENT, EDGE // STRIDE, EDGE // STRIDE)


def test_the_three_graphs_make_an_answer(client: triton.InferenceServerClient) -> None:
    """What a caller builds who brings a sampler of their own."""
    seen = client.infer("toy-encoder", sent(pictures(1)))
    conditioning = {name: seen.as_numpy(name) for name in ("image_latent", "prompt_latent")}
    step = client.infer("toy", sent(latents(1) | conditioning))
    assert client.infer("toy-decoder", sent({"latent": step.as_numpy("prediction")})).as_numpy("picture").shape == (
        *(1, PLANES, EDGE, EDGE),
    )


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_read(client: triton.InferenceServerClient, algorithm: str) -> None:
    result = client.infer("toy-decoder", sent(FEEDS["toy-decoder"]), request_compression_algorithm=algorithm)
    assert result.as_numpy("picture").shape == (2, PLANES, EDGE, EDGE)


def test_concurrent_calls_of_the_client(server: Process) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4) as client:
        calls = [client.async_infer("toy", sent(FEEDS["toy"])) for _ in range(8)]
        answers = [call.get_result().as_numpy("prediction") for call in calls]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_statistics_count_what_ran(client: triton.InferenceServerClient, server: Process) -> None:
    def now() -> Any:
        [found] = client.get_inference_statistics("toy")["model_stats"]
        return found

    before = now()
    client.infer("toy", sent(FEEDS["toy"]))
    asked = now()
    assert asked["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert asked["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert asked["inference_count"] == before["inference_count"] + 2
    httpx.post(server.url + "/depth", files=files("depth"), params={"steps": 3, "ensemble_size": 1}).raise_for_status()
    assert now()["inference_count"] == asked["inference_count"] + 3  # the same lane, whoever asks
    assert sum(b["batch_size"] * b["compute_infer"]["count"] for b in now()["batch_stats"]) == now()["inference_count"]
    assert len(client.get_inference_statistics()["model_stats"]) == 3


def test_the_client_is_told_why(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="unknown model: 'nobody' is not found") as caught:
        client.infer("nobody", sent(FEEDS["toy"]))
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="model_file"):
        client.load_model("toy")
    with pytest.raises(InferenceServerException, match="is FP32 where INT64 belongs"):
        client.infer("toy", sent(FEEDS["toy"] | {"task": np.zeros((2, 1), np.float32)}))


def tensor(**changed: Any) -> dict[str, Any]:
    return {"name": "latent", "datatype": "FP32", "shape": [1, LATENT, 2, 2], "data": [0.5] * 4 * LATENT} | changed


def changed(model: str, **tensors: Any) -> list[dict[str, Any]]:
    """The model's inputs as JSON, with some of them changed; None leaves one out."""
    feeds = {name: value for name, value in (FEEDS[model] | tensors).items() if value is not None}
    kinds = {"f": "FP32", "i": "INT64"}
    return [
        {"name": name, "datatype": kinds[value.dtype.kind], "shape": list(value.shape), "data": value.ravel().tolist()}
        for name, value in feeds.items()
    ]


MALFORMED: dict[str, tuple[str, Any, str]] = {
    "no JSON": ("toy-decoder", b"{", "not valid JSON"),
    "no object": ("toy-decoder", [], "The request"),
    "no inputs": ("toy-decoder", {}, "inputs"),
    "an input is missing": ("toy", {"inputs": changed("toy", latent=None)}, "'latent' of model 'toy' is missing"),
    "an unknown input": ("toy-decoder", {"inputs": [tensor(), tensor(name="x")]}, "unexpected inference input 'x'"),
    "an input twice": ("toy-decoder", {"inputs": [tensor(), tensor()]}, "given twice"),
    "an unknown output": ("toy-decoder", {"inputs": [tensor()], "outputs": [{"name": "y"}]}, "output 'y'"),
    "an output twice": ("toy-decoder", {"inputs": [tensor()], "outputs": [{"name": "picture"}] * 2}, "twice"),
    "another datatype": ("toy-decoder", {"inputs": [tensor(datatype="FP16")]}, "FP16"),
    "no data": ("toy-decoder", {"inputs": [tensor(data=None)]}, "neither data nor"),
    "texts for numbers": ("toy-decoder", {"inputs": [tensor(data=["1"] * 4 * LATENT)]}, "must be numbers"),
    "too few numbers": ("toy-decoder", {"inputs": [tensor(data=[0.5])]}, "has 1 numbers, not 32"),
    "numbers beyond FP32": ("toy-decoder", {"inputs": [tensor(data=[1e300] * 4 * LATENT)]}, "not finite"),
    "a number beyond everything": ("toy-decoder", {"inputs": [tensor(data=[10**400] * 4 * LATENT)]}, "too large"),
    "a negative size": ("toy-decoder", {"inputs": [tensor(shape=[-1, LATENT, 2, 2])]}, "shape"),
    "other channels": ("toy-decoder", {"inputs": [tensor(shape=[1, 2, 4, 4])]}, "belongs"),
    "no rows": ("toy-decoder", {"inputs": [tensor(shape=[0, LATENT, 2, 2], data=[])]}, "shape"),
    "sizes beyond any": ("toy-decoder", {"inputs": [tensor(shape=[0, 1 << 31, 1 << 31, 1 << 31], data=[])]}, "shape"),
    "too many rows": ("toy-decoder", {"inputs": changed("toy-decoder", latent=latents(17, 16)["latent"])}, "1 to 16"),
    "rows that differ": ("toy", {"inputs": changed("toy", latent=latents(1)["latent"])}, "same number of rows"),
    "edges between the steps": ("toy-decoder", {"inputs": [tensor(shape=[1, LATENT, 1, 4])]}, "in steps of 16"),
    "too large a picture": ("toy-decoder", {"inputs": changed("toy-decoder", latent=latents(1, 256)["latent"])}, "128"),
    "another conditioning": ("toy", {"inputs": changed("toy", image_latent=latents(2, 32)["latent"])}, "goes with"),
    "an unknown task": ("toy", {"inputs": changed("toy", task=np.full((2, 1), 3))}, "'task'"),
    "a timestep before all": ("toy", {"inputs": changed("toy", timestep=np.full((2, 1), -1))}, "0 to 999"),
    "an image beside its prompt": (
        "toy-encoder",
        {"inputs": changed("toy-encoder", prompt=np.zeros((2, 3, 32, 32), np.float32))},
        "one shape",
    ),
    "shared memory": ("toy-decoder", {"inputs": [tensor(parameters={"shared_memory_region": "a"})]}, "not offered"),
    "classification": (
        "toy-decoder",
        {"inputs": [tensor()], "outputs": [{"name": "picture", "parameters": {"classification": 2}}]},
        "not offered",
    ),
    "binary without its header": ("toy-decoder", {"inputs": [tensor(parameters={"binary_data_size": 8})]}, "missing"),
    "a flag that is none": ("toy-decoder", {"inputs": [tensor()], "parameters": {"binary_data_output": 1}}, "true or"),
    "a thousand objects": ("toy-decoder", {"inputs": [tensor(data=[{}] * 1000)]}, "objects"),
    "a deep nest": ("toy-decoder", b'{"inputs": ' + b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_told_what_is_wrong(server: Process, case: str) -> None:
    model, body, told = MALFORMED[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{server.url}/v2/models/{model}/infer", content=content)
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["error"]


def binary(size: int, length: int | None = None, raw: bytes = b"\0" * 128) -> tuple[dict[str, str], bytes]:
    head = json.dumps({"inputs": [tensor(data=None, parameters={"binary_data_size": size})]}).encode()
    return {LENGTH_HEADER: str(len(head) if length is None else length)}, head + raw


@pytest.mark.parametrize(
    ("headers", "content", "status", "told"),
    [
        (*binary(128, 10_000), 400, "the body has"),
        (*binary(64), 400, "takes 128 bytes"),
        (*binary(128, raw=b"\0" * 64), 400, "64 are left"),
        (*binary(128, raw=b"\0" * 130), 400, "2 bytes of the body belong to no input"),
        (*binary(128, raw=b"\xff" * 128), 400, "not finite"),
        ({LENGTH_HEADER: "many"}, b"{}", 400, "number of bytes"),
        ({"Content-Encoding": "br"}, b"{}", 415, "gzip"),
        ({"Content-Encoding": "gzip"}, b"{}", 400, "not the gzip"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b"{}")[:-9], 400, "stops before"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b" " * (1 << 28)), 413, "Unpacked"),
        ({}, b" " * (MAX_JSON_BYTES + 1), 413, "binary data"),
    ],
)
def test_malformed_bodies(server: Process, headers: dict[str, str], content: bytes, status: int, told: str) -> None:
    answer = httpx.post(f"{server.url}/v2/models/toy-decoder/infer", content=content, headers=headers, timeout=30)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["error"]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_bodies_are_read_or_refused(data: st.DataObject) -> None:
    """Nothing but a refusal comes out of the reader, whatever comes in."""
    headers, body = binary(128)
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        junk = data.draw(
            st.sampled_from([b"", b"[", b"{", b'"', b"-", b"e9", b"null", b"\xff"]) | st.binary(max_size=4)
        )
        mutated[at : at + data.draw(st.integers(0, 8))] = junk
    length = data.draw(st.sampled_from([headers[LENGTH_HEADER], None, str(len(mutated)), "0", "-1", "9" * 30]))
    encoding = data.draw(st.sampled_from(["", "identity", "gzip", "deflate"]))
    assert status(bytes(mutated), length, encoding) in (200, 400, 413, 415)


def status(body: bytes, length: str | None, encoding: str) -> int:
    try:
        tensors.read(body, length, encoding, 1 << 20)
    except Problem as problem:
        return problem.kind.status
    return 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/nobody/config", 404),
        ("GET", "/v2/models/toy/versions/7", 404),
        ("GET", "/v2/models/toy/infer", 405),
        ("POST", "/v2/models/toy/versions/7/infer", 404),
    ],
)
def test_every_refusal_has_the_protocols_shape(server: Process, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]


def test_behind_triton_the_caller_is_sent_to_triton(toy_repository: Path) -> None:
    from tests.server.process import started

    with started(toy_repository, backend="triton", triton_url="127.0.0.1:9") as server:
        answer = httpx.get(server.url + "/v2/health/ready")
    assert answer.status_code == 404
    assert "ask it at its own" in answer.json()["error"]


@pytest.mark.triton
def test_the_same_answers_as_the_real_triton(
    client: triton.InferenceServerClient, tritons: Any, toy_repository: Path
) -> None:
    real: TritonServer = tritons(toy_repository)
    for there in connected(real.http):
        for model, feeds in FEEDS.items():
            assert client.get_model_metadata(model) == there.get_model_metadata(model)
            ours, theirs = client.get_model_config(model), there.get_model_config(model)
            for side in ("max_batch_size", "input", "output", "parameters", "model_warmup", "default_model_filename"):
                assert ours[side] == theirs[side], side
            mine, its = client.infer(model, sent(feeds)), there.infer(model, sent(feeds))
            for output in mine.get_response()["outputs"]:
                name = output["name"]
                np.testing.assert_allclose(mine.as_numpy(name), its.as_numpy(name), rtol=0, atol=1e-5)
