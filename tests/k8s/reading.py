"""The manifests as they stand in k8s/, unrendered, and what is inside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
Object = dict[str, Any]
SPECIAL = ("kustomization.yaml", "alerts.test.yaml", "prometheus-adapter.yaml")


@cache
def kustomizations() -> dict[Path, Object]:
    return {path: yaml.safe_load(path.read_text()) for path in sorted(K8S.rglob("kustomization.yaml"))}


@cache
def objects() -> list[tuple[Path, Object]]:
    """Every object of every file that is one, not patches."""
    files = [path for path in sorted(K8S.rglob("*.yaml")) if path.name not in SPECIAL and "overlays" not in path.parts]
    return [(path, found) for path in files for found in yaml.safe_load_all(path.read_text())]


def of(kind: str) -> list[Object]:
    return [found for _, found in objects() if found["kind"] == kind]


def only(kind: str, name: str) -> Object:
    (found,) = (one for one in of(kind) if one["metadata"]["name"] == name)
    return found


@cache
def pods() -> dict[str, Object]:
    """Pod templates by the kind and name of what makes them."""
    found = {}
    for _, one in objects():
        spec = one.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            found[f"{one['kind']} {one['metadata']['name']}"] = spec["template"]
    return found


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def literals(kustomization: Object) -> dict[str, str]:
    """The settings that a kustomization writes into saccade-settings."""
    generated = kustomization.get("configMapGenerator", ())
    listed = (line for one in generated if one["name"] == "saccade-settings" for line in one.get("literals", ()))
    return dict(line.split("=", 1) for line in listed)


def base_settings() -> dict[str, str]:
    lines = (K8S / "base" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def settings(overlay: str) -> dict[str, str]:
    """The environment of an overlay's gateways: the base's settings, its components', its own."""
    folder = K8S / overlay
    own = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = base_settings()
    for component in own.get("components", ()):
        found |= literals(yaml.safe_load((folder / component / "kustomization.yaml").read_text()))
    return found | literals(own)


def flags(arguments: list[str]) -> dict[str, str]:
    """--name=value -> {name: value}"""
    pairs = (argument.removeprefix("--").partition("=") for argument in arguments if argument.startswith("--"))
    return {name: value for name, _, value in pairs}


def leaves(value: object) -> Iterator[object]:
    """Everything in a document that is no list and no mapping, and every key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value
