"""Checks that need no cluster. Each says what it has done, or raises Skipped or Failed."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from k8s.validation import tools
from k8s.validation.manifests import FOLDER, LEGACY, NEWEST, VARIANTS, Variant, named, renderer
from k8s.validation.tools import Failed, Object

CUSTOM = ("monitoring.coreos.com/v1", "keda.sh/v1alpha1")
MODELS = {
    "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor",
    "PrometheusRule": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule",
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
}
NODE = ("typescript@7.0.2", "@kubernetes-models/prometheus-operator@6.0.0", "@kubernetes-models/keda@0.4.2")
# Validates each document of standard input, one JSON list, with the arguments' version; prints what is wrong.
VALIDATE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import kubernetes_validate
wrong = []
for place, document in enumerate(json.load(sys.stdin)):
    try:
        kubernetes_validate.validate(document, sys.argv[1], strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(str(part) for part in error.path)
        wrong.append([place, f"{where}: {error.message}"[:300]])
json.dump(wrong, sys.stdout)
"""


def rendering() -> str:
    """Everything is rendered, and every object has a kind, a name and a namespace."""
    kinds: Counter[str] = Counter()
    for variant in VARIANTS:
        kinds.update(found["kind"] for found in variant.objects)
        for found in variant.objects:
            if found["kind"] != "Namespace" and found["metadata"].get("namespace") != "saccade":
                raise Failed(f"{variant}: {named(found)} is not in namespace saccade")
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{len(VARIANTS)} kustomizations by `{' '.join(renderer())}`, {sum(kinds.values())} objects: {told}"


def schemas() -> str:
    """Every object against its kind's schema, oldest and newest version, nothing unknown allowed; and a broken one."""
    wrong, counts = [], []
    for version in sorted({version for variant in VARIANTS for version in variant.versions}):
        known = [(variant, found) for variant in VARIANTS if version in variant.versions for found in variant.objects]
        known = [(variant, found) for variant, found in known if found["apiVersion"] not in CUSTOM]
        faults = _invalid([found for _, found in known], version)
        wrong += [f"{known[place][0]}, {version}: {named(known[place][1])}: {fault}" for place, fault in faults]
        counts.append(f"{version}: {len(known)}")
    if wrong:
        raise Failed("\n".join(wrong))
    return f"objects valid, by version of Kubernetes, {', '.join(counts)}. {_broken_ones_are_found()}"


def _invalid(objects: list[Object], version: str) -> list[tuple[int, str]]:
    """(place, what is wrong there) of the objects that the version's schemas refuse."""
    legacy = version in LEGACY
    interpreter = tools.python(tools.LEGACY_ENVIRONMENT, "venv-legacy") if legacy else tools.python(tools.ENVIRONMENT)
    return [
        (place, fault)
        for place, fault in json.loads(tools.run(interpreter, "-c", VALIDATE, version, stdin=json.dumps(objects)))
    ]


def _broken_ones_are_found() -> str:
    """A validator that finds nothing has proved nothing until it has found something."""
    deployment = next(found for found in Variant("overlays/gpu").objects if found["kind"] == "Deployment")
    breaks: dict[str, Callable[[Object], object]] = {
        "an unknown field": lambda broken: broken["spec"].update(replica=2),
        "a text for a number": lambda broken: broken["spec"].update(replicas="two"),
        "a missing selector": lambda broken: broken["spec"].pop("selector"),
    }
    for what, damage in breaks.items():
        broken = copy.deepcopy(deployment)
        damage(broken)
        if not _invalid([broken], NEWEST):
            raise Failed(f"{what} in a Deployment was not found")
    return f"Broken on purpose, and found: {', '.join(breaks)}"


def custom_resources() -> str:
    """ServiceMonitor, PrometheusRule and ScaledObject against their operators' types, nothing unknown allowed."""
    place = tools.node(NODE)
    objects = [found for variant in VARIANTS for found in variant.objects if found["apiVersion"] in CUSTOM]
    if not objects:
        raise Failed("there is none")
    complaints = _typed(place, objects)
    if complaints:
        raise Failed(complaints)
    broken = copy.deepcopy(objects[0])
    broken["spec"]["endpoint"] = []
    if not _typed(place, [broken]):
        raise Failed("an unknown field was not found")
    kinds = Counter(found["kind"] for found in objects)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{told} by TypeScript over {', '.join(NODE[1:])}; no other schema of them is on PyPI, npm or Debian"


def _typed(place: Path, objects: list[Object]) -> str:
    """What the compiler says of the objects as literals of their types; empty: nothing."""
    lines = [f'import {{ I{kind} }} from "{module}";' for kind, module in MODELS.items()]
    lines += [f"const o{i}: I{found['kind']} = {json.dumps(found)};" for i, found in enumerate(objects)]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        file = Path(folder) / "objects.ts"
        file.write_text("\n".join(lines))
        options = ("--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022")
        done = tools.attempt("node", place / "node_modules" / "typescript" / "bin" / "tsc", *options, file)
    return tools.said(done) if done.returncode else ""


def alerts() -> str:
    """`promtool check rules`, and the unit tests in which every alert fires and stays silent."""
    promtool = tools.program("promtool", "promtool")
    spec = _rules(Variant("overlays/gpu"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "alerts.yaml").write_text(yaml.safe_dump(spec))
        tests = FOLDER / "components" / "monitoring" / "alerts.test.yaml"
        (Path(folder) / tests.name).write_text(tests.read_text())
        tools.run(promtool, "check", "rules", "--lint-fatal", "alerts.yaml", cwd=Path(folder))
        tools.run(promtool, "test", "rules", tests.name, cwd=Path(folder))
    untested = {rule["alert"] for group in spec["groups"] for rule in group["rules"]} - set(_fired(tests))
    if untested:
        raise Failed(f"no test in which it fires: {', '.join(sorted(untested))}")
    rules = sum(len(group["rules"]) for group in spec["groups"])
    version = tools.run(promtool, "--version").splitlines()[0].split(" (")[0]
    return f"{rules} alerts, each with a test in which it fires, by {version}"


def _rules(variant: Variant) -> Object:
    rules: Object = next(found for found in variant.objects if found["kind"] == "PrometheusRule")["spec"]
    return rules


def _fired(tests: Path) -> Iterator[str]:
    for test in yaml.safe_load(tests.read_text())["tests"]:
        for expected in test["alert_rule_test"]:
            if expected.get("exp_alerts"):
                yield expected["alertname"]
