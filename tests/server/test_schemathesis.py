"""Requests generated from the OpenAPI document: what it promises holds, and nothing makes the server fail."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from saccade.tasks import TASKS
from tests.server.house import mask, png
from tests.server.process import serving

EXAMPLES = 40
# Not positive_data_acceptance: a schema cannot say that two pictures must be of one size, or that a file is a picture.
CHECKS = (
    not_a_server_error,
    allow_header_conformance,
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
PICTURES = st.sampled_from([png(), png(seed=1), mask(), png()[:100]])
schemathesis.openapi.format("binary", PICTURES | st.binary(max_size=200))
schemathesis.openapi.format("byte", PICTURES.map(lambda data: base64.b64encode(data).decode()))


@pytest.fixture(scope="module")
def api(place: None, toy_repository: Path) -> Iterator[schemathesis.BaseSchema]:
    bounds = {"max_steps": 6, "max_ensemble_size": 3, "max_processing_resolution": 96}
    with serving(toy_repository, **bounds) as server:
        yield schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("task", TASKS)
def test_generated_requests(api: schemathesis.BaseSchema, task: str, mode: GenerationMode) -> None:
    run(api[f"/{task}"]["POST"].as_strategy(generation_mode=mode), EXAMPLES)


@pytest.mark.parametrize("path", ["/", "/models", "/livez", "/readyz", "/metrics"])
def test_plain_paths(api: schemathesis.BaseSchema, path: str) -> None:
    run(api[path]["GET"].as_strategy(generation_mode=GenerationMode.POSITIVE), 1)


def run(cases: st.SearchStrategy[schemathesis.Case], examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def conforms(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=list(CHECKS))

    conforms()
