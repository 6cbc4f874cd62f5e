"""/v2 in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.settings import Settings
from server.v2.tensors import DATATYPES, LENGTH_HEADER, MAX_TENSORS

Json = dict[str, Any]
_TEXT: Json = {"type": "string"}
_NAMED: Json = {"type": "object", "required": ["name"], "properties": {"name": _TEXT}}
_NAME: Json = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_VERSION: Json = _NAME | {"name": "version"}
_READING = {
    "": "What this server is",
    "/health/live": "Does the process answer",
    "/health/ready": "Does the model answer: a tiny inference",
    "/models/stats": "Inferences of every raw model",
}
_OF_A_MODEL = {
    "": ("metadata", "Its inputs and outputs"),
    "/ready": ("ready", "Does it answer"),
    "/config": ("config", "Its config.pbtxt as JSON"),
    "/stats": ("stats", "Inferences and batches"),
}


def paths(settings: Settings) -> Json:
    """Every path of `server.v2.routes.router`; none where Triton runs the models."""
    if settings.backend == "triton":
        return {}
    made: Json = {f"/v2{path}": {"get": _get("v2" + path, told)} for path, told in _READING.items()}
    for path, parameters in (
        ("/v2/models/{name}", [_NAME]),
        ("/v2/models/{name}/versions/{version}", [_NAME, _VERSION]),
    ):
        told_of = f"v2/{'version' if len(parameters) > 1 else 'model'}/"
        for ending, (name, told) in _OF_A_MODEL.items():
            made[path + ending] = {"get": _get(told_of + name, f"A raw model: {told}", parameters)}
        made[path + "/infer"] = {"post": _infer(told_of + "infer", parameters)}
    made["/v2/repository/index"] = {"post": _index()}
    return made


def refusal() -> Json:
    """Whatever the status."""
    error = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
    return {"description": "Refused, in the protocol's shape.", "content": {"application/json": {"schema": error}}}


def _get(name: str, summary: str, parameters: list[Json] | None = None) -> Json:
    return _operation(name, summary, {"type": "object"}, parameters or [], "500", "503")


def _index() -> Json:
    return _operation("v2/repository/index", "The models of the repository", {"type": "array", "items": _NAMED}, [])


def _infer(name: str, parameters: list[Json]) -> Json:
    header = {
        "name": LENGTH_HEADER,
        "in": "header",
        "description": "Bytes of JSON at the body's beginning, where tensors follow it in binary.",
        "schema": {"type": "integer", "minimum": 0},
    }
    answer = {"type": "object", "required": ["model_name", "model_version", "outputs"]}
    refusals = ("400", "408", "413", "415", "429", "500", "503")
    operation = _operation(name, "Run a raw model on tensors", answer, [*parameters, header], *refusals)
    operation["responses"]["200"]["content"]["application/octet-stream"] = {"schema": _TEXT | {"format": "binary"}}
    return operation | {"requestBody": {"required": True, "content": {"application/json": {"schema": _request()}}}}


def _request() -> Json:
    tensor = {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": _TEXT,
            "datatype": {"type": "string", "enum": list(DATATYPES)},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 8},
            "data": {"type": "array"},
        },
    }
    outputs = {"type": "array", "items": _NAMED, "maxItems": MAX_TENSORS}
    inputs = {"type": "array", "items": tensor, "maxItems": MAX_TENSORS}
    properties = {"id": _TEXT | {"maxLength": 256}, "inputs": inputs, "outputs": outputs}
    return {"type": "object", "required": ["inputs"], "properties": properties}


def _operation(name: str, summary: str, schema: Json, parameters: list[Json], *refusals: str) -> Json:
    good = {"description": summary + ".", "content": {"application/json": {"schema": schema}}}
    return {
        "operationId": name.replace("/", "-"),
        "summary": summary,
        "tags": ["Open Inference Protocol v2"],
        "parameters": parameters,
        "responses": {"200": good}
        | dict.fromkeys((*(["404"] if parameters else []), *(refusals or ("500",))), refusal()),
    }
