"""Requests generated from the OpenAPI document: what it promises holds, and nothing makes the server fail."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.transport import Response
from schemathesis.schemas import BaseSchema
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
from server import openapi, walls
from server.settings import Settings
from tests.server.house import PICTURES as PICTURES_OF
from tests.server.house import mask, png
from tests.server.process import serving

EXAMPLES = 40
CHAINS = 30
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


BOUNDS = {"max_steps": 6, "max_ensemble_size": 3, "max_processing_resolution": 96}
DOCUMENT = walls.dress(openapi.document(Settings.load()), Settings.load())
OTHERS = [
    (path, method, mode)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if path[1:] not in TASKS and method != "parameters"
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or "requestBody" in operation or path.startswith("/jobs")
]
"""All that can be asked, rightly and, where there is something to get wrong, wrongly."""
asked: Counter[tuple[str, int]] = Counter()
"""Operations and the statuses they answered."""


@pytest.fixture(scope="module")
def api(place: None, toy_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseSchema]:
    jobs = tmp_path_factory.mktemp("jobs") / "jobs.sqlite"
    with serving(toy_repository, jobs_file=jobs, **BOUNDS) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        schema.config.checks.negative_data_rejection.expected_statuses.append("413")  # more pictures than there may be
        yield schema
    counts = Counter(status for _, status in asked.elements())
    operations = len({operation for operation, _ in asked})
    print(f"\nschemathesis: {asked.total()} calls of {operations} operations, answered {dict(sorted(counts.items()))}")


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("task", TASKS)
def test_generated_requests(api: BaseSchema, task: str, mode: GenerationMode) -> None:
    run(api[f"/{task}"]["POST"].as_strategy(generation_mode=mode), EXAMPLES)


def behind_triton(api: BaseSchema) -> bool:
    return "/v2" not in api.raw_schema["paths"]


@pytest.mark.parametrize(("path", "method", "mode"), OTHERS)
def test_every_other_operation(api: BaseSchema, path: str, method: str, mode: GenerationMode) -> None:
    if path.startswith("/v2") and behind_triton(api):
        pytest.skip("behind Triton, ask Triton itself")
    run(api[path][method.upper()].as_strategy(generation_mode=mode), EXAMPLES // 4)


def test_chains_of_requests(api: BaseSchema) -> None:
    """A good request becomes a job, that is looked at, followed, fetched, cancelled: whatever order the links allow."""
    if behind_triton(api):
        pytest.skip("jobs and links know nothing of where the model runs")
    api.config.generation.update(modes=[GenerationMode.POSITIVE])

    class Chains(api.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: schemathesis.Case) -> None:
            task = case.operation.path[1:]
            if task in TASKS:
                case.media_type, case.query = "application/json", {"steps": 1}
                case.headers = CaseInsensitiveDict({"Prefer": "respond-async"})
                case.body = {name: base64.b64encode(data).decode() for name, data in PICTURES_OF[task].items()}

        def validate_response(self, response: Response, case: schemathesis.Case, **_: Any) -> None:
            asked[case.operation.label, response.status_code] += 1
            case.validate_response(response, checks=list(CHECKS))

    Chains.run(settings=quietly(CHAINS, stateful_step_count=8))
    followed = {operation for operation, status in asked if status in (200, 409)}  # 409: not done yet
    assert {"GET /jobs/{identity}", "GET /jobs/{identity}/result", "GET /jobs/{identity}/events"} <= followed


@st.composite
def judged(draw: st.DrawFn, cases: st.SearchStrategy[schemathesis.Case]) -> schemathesis.Case:
    """Without the wrong cases of which schemathesis itself cannot say whether they are wrong: with bytes in them."""
    try:
        return draw(cases)
    except ValueError as error:
        if "Binary" not in str(error):
            raise
        reject()


def run(cases: st.SearchStrategy[schemathesis.Case], examples: int) -> None:
    @quietly(examples)
    @given(judged(cases))
    def conforms(case: schemathesis.Case) -> None:
        response = case.call()
        asked[case.operation.label, response.status_code] += 1
        case.validate_response(response, checks=list(CHECKS))

    conforms()


def quietly(examples: int, **more: Any) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **more,
    )
