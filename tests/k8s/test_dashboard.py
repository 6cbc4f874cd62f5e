"""The Grafana dashboard asks for nothing that the server does not export, and neither do the alerts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from saccade.backends.embedded import Embedded
from saccade.repository import Repository
from tests.k8s.reading import K8S
from tests.server.house import running

FOLDER = K8S / "components" / "monitoring"
METRIC = re.compile(r"\b((?:saccade|process)_[a-z_]+)\b(\{[^}]*\})?")
LABEL = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)")
BY = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")
ADDED = {"job", "instance", "namespace", "pod", "le"}
"""Labels that Prometheus adds."""


@cache
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def asked() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def alerted() -> Iterator[str]:
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.fixture(scope="module")
def exported(toy_repository: Path) -> dict[str, set[str]]:
    """Each series that the server exports, and its labels."""
    backend = Embedded.load(Repository(toy_repository), engine="onnxruntime", precision="fp32", threads=1)

    async def scrape() -> tuple[str, dict[str, set[str]]]:
        async with running(backend, jobs_file=toy_repository.parent / "jobs.sqlite") as house:
            text = (await house.client.get("/metrics")).text
            known = house.service.metrics.registry._names_to_collectors
            return text, {name: set(getattr(one, "_labelnames", None) or ()) for name, one in known.items()}

    text, labels = asyncio.run(scrape())
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    found = {
        family.name + ending: labels.get(family.name + ending, set())
        | {key for one in family.samples for key in one.labels}
        for family in text_string_to_metric_families(text)
        for ending in endings.get(family.type, [""])
    }
    # Made of what there is when it is asked: without a Triton there is no sample to read the labels from.
    return found | {"saccade_triton_endpoint": {"model", "address", "state"}}


@pytest.mark.parametrize("expression", sorted({*asked(), *alerted()}))
def test_every_query_names_what_is_exported(exported: dict[str, set[str]], expression: str) -> None:
    named = METRIC.findall(expression)
    assert named or "up{" in expression or "nv_" in expression or "kube_" in expression
    for metric, matchers in named:
        assert metric in exported, f"{metric} is not exported"
        unknown = set(LABEL.findall(matchers)) - exported[metric] - ADDED
        assert not unknown, f"{metric} has no label {unknown}"
    if named:
        grouped = {label.strip() for labels in BY.findall(expression) for label in labels.split(",")}
        assert grouped <= set().union(*(exported[metric] for metric, _ in named)) | ADDED


def test_the_panels_are_named_apart_and_lie_beside_each_other() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)


def test_the_component_loads_it() -> None:
    (made,) = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"]
    assert made["files"] == ["dashboard.json"]
    assert made["options"]["labels"] == {"grafana_dashboard": "1"}
