"""The OpenAPI document tells the truth about this server."""

from __future__ import annotations

import asyncio
from typing import Any

import jsonschema_rs
import pytest

from saccade.backends import Backend
from saccade.render import FORMATS, FORMATS_OF_SEVERAL, MEDIA_TYPES
from saccade.tasks import TASKS
from server.options import ALIASES
from tests.server.house import running
from tests.server.test_events import STREAM


@pytest.fixture(scope="module")
def document(backend: Backend) -> dict[str, Any]:
    async def fetch() -> dict[str, Any]:
        async with running(backend, max_steps=7) as house:
            found: dict[str, Any] = (await house.client.get("/openapi.json")).json()
            return found

    return asyncio.run(fetch())


def test_bounds_are_those_of_the_settings(document: dict[str, Any]) -> None:
    parameters = {p["name"]: p["schema"] for p in document["paths"]["/depth"]["post"]["parameters"]}
    assert parameters["steps"] == {"type": "integer", "minimum": 1, "maximum": 7}
    assert parameters["reduction"]["enum"] == list(TASKS["depth"].reductions)


@pytest.mark.parametrize("task", TASKS)
def test_both_bodies_take_every_option(document: dict[str, Any], task: str) -> None:
    operation = document["paths"][f"/{task}"]["post"]
    options = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"}
    assert options >= {"steps", "seed", "format", "render", "encoding", *ALIASES}
    for body in operation["requestBody"]["content"].values():
        files = {name for way in body["schema"]["anyOf"] for name in way["required"]}
        assert set(body["schema"]["properties"]) == options | files
        assert ("video" in files) == (task != "amodal")


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_type_and_refusal_is_listed(document: dict[str, Any], task: Any) -> None:
    responses = document["paths"][f"/{task}"]["post"]["responses"]
    several = {"application/zip"} | ({"video/mp4"} if "mp4" in FORMATS_OF_SEVERAL[task] else set())
    assert set(responses["200"]["content"]) == {MEDIA_TYPES[kind] for kind in FORMATS[task]} | several | {STREAM}
    refused = {"400", "406", "408", "412", "413", "415", "422", "429", "500", "501", "503", "504"}
    assert set(responses) == {"200", "202", *refused}


def test_examples_work_and_answers_fit_their_schema(backend: Backend, document: dict[str, Any]) -> None:
    async def try_examples() -> list[tuple[int, Any]]:
        async with running(backend) as house:
            bodies = {path: item["post"]["requestBody"]["content"]["application/json"]["example"]
                      for path, item in document["paths"].items() if path[1:] in TASKS}  # fmt: skip
            answers = [await house.client.post(path, json=body) for path, body in bodies.items()]
            answers.append(await house.client.get("/models"))
            return [(answer.status_code, answer.json()) for answer in answers]

    *tasks, models = asyncio.run(try_examples())
    for status, answer in tasks:
        assert status == 200, answer
        jsonschema_rs.validate({"$ref": "#/components/schemas/Answer", "components": document["components"]}, answer)
    assert models[0] == 200
    jsonschema_rs.validate({"$ref": "#/components/schemas/Models", "components": document["components"]}, models[1])
