"""What all operations of the OpenAPI document share: request ids, keys where they are on, links to one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server import keys, problems, v2
from server.logs import HEADER
from server.settings import Settings
from server.v2.errors import is_v2

Json = dict[str, Any]
METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
SCHEMES: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
}
FOLLOWING: dict[tuple[str, str], dict[str, Json]] = {
    ("v2-repository-index", "200"): {
        operation: {"name": "$response.body#/0/name"}
        for operation in ("v2-model-metadata", "v2-model-config", "v2-model-ready", "v2-model-stats")
    },
    ("v2-model-metadata", "200"): {
        operation: {"name": "$response.body#/name", "version": "$response.body#/versions/0"}
        for operation in ("v2-version-metadata", "v2-version-infer")
    },
}
"""(operation, status) -> operations that go on from its answer, with where their parameters come from."""


def dress(document: Json, settings: Settings) -> Json:
    """Add it all to a finished document, and return that."""
    known = {operation["operationId"] for _, operation in _operations(document)}
    for path, operation in _operations(document):
        _link(operation, known)
        if settings.keys_file is not None:
            _lock(path, operation)
    if settings.keys_file is not None:
        document["components"]["securitySchemes"] = SCHEMES
    for response in _responses(document):
        response["headers"] = response.get("headers", {}) | {HEADER: _header()}
    return document


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in METHODS:
                yield path, operation


def _link(operation: Json, known: set[str]) -> None:
    for status, response in operation["responses"].items():
        chosen = FOLLOWING.get((operation["operationId"], status), {})
        links = {name: {"operationId": name, "parameters": how} for name, how in chosen.items() if name in known}
        if links:
            response["links"] = response.get("links", {}) | links


def _lock(path: str, operation: Json) -> None:
    if keys.is_open(path):
        operation["security"] = []
        return
    operation["security"] = [{name: []} for name in SCHEMES]
    for kind in (problems.UNAUTHORIZED, problems.FORBIDDEN, problems.RATE_LIMITED):
        told = v2.refusal() if is_v2(path) else {"$ref": f"#/components/responses/{kind.slug}"}
        operation["responses"].setdefault(str(kind.status), told)


def _responses(document: Json) -> Iterator[Json]:
    """All that are written out, where they are used or among the components."""
    yield from document["components"]["responses"].values()
    for _, operation in _operations(document):
        yield from (response for response in operation["responses"].values() if "$ref" not in response)


def _header() -> Json:
    told = "Names this request in the server's log; yours, if you sent one."
    return {"description": told, "required": True, "schema": {"type": "string"}}
