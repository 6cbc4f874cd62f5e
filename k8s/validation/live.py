"""Checks on a running control plane: what it accepts and refuses, how a settings change rolls, who may promote."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from k8s.validation import manifests, tools
from k8s.validation.manifests import FOLDER, Variant, named
from k8s.validation.plane import NAMESPACE, Plane
from k8s.validation.tools import Failed, Object

T = TypeVar("T")
LEGACY = Variant("overlays/legacy")
PATIENCE_S = 60.0
REASON = 150
PROMOTER = f"system:serviceaccount:{NAMESPACE}:saccade-promoter"
MAY, MUST_NOT = ("patch configmaps/saccade-model",), (
    "get configmaps/saccade-model",
    "update configmaps/saccade-model",
    "delete configmaps/saccade-model",
    "patch configmaps/saccade-settings",
    "patch configmaps",
    "list configmaps",
    "create configmaps",
    "get secrets",
    "patch deployments/saccade-gateway",
    "create pods",
    "patch roles/saccade-promoter",
    "create serviceaccounts/token",
)  # fmt: skip


def _spec(found: Object) -> Object:
    spec: Object = found["spec"]["template"]["spec"]
    return spec


# (what is broken, in which object, how)
BREAKS: tuple[tuple[str, str, Callable[[Object], object]], ...] = (
    ("a field nobody knows", "Deployment saccade-gateway", lambda o: o["spec"].update(replica=3)),
    ("a probe of a port beyond 65535", "Deployment saccade-gateway",
     lambda o: _spec(o)["containers"][0]["livenessProbe"]["httpGet"].update(port=80800)),
    ("labels that the selector does not choose", "Deployment saccade-gateway",
     lambda o: o["spec"]["template"]["metadata"]["labels"].update({"app.kubernetes.io/component": "other"})),
    ("a volume that is mounted and not there", "Deployment saccade-gateway", lambda o: _spec(o)["volumes"].pop()),
    ("a request above its limit", "Deployment saccade-triton",
     lambda o: _spec(o)["containers"][0]["resources"]["requests"].update(memory="64Gi")),
    ("an unknown policy for seccomp", "Deployment saccade-triton",
     lambda o: _spec(o)["securityContext"]["seccompProfile"].update(type="Default")),
    ("a budget with both bounds", "PodDisruptionBudget saccade-gateway", lambda o: o["spec"].update(minAvailable=1)),
    ("more replicas at least than at most", "HorizontalPodAutoscaler saccade-gateway",
     lambda o: o["spec"].update(minReplicas=20)),
    ("a metric without a target", "HorizontalPodAutoscaler saccade-gateway",
     lambda o: o["spec"]["metrics"][0]["pods"].pop("target")),
    ("a protocol that does not exist", "NetworkPolicy saccade-triton",
     lambda o: o["spec"]["ingress"][0]["ports"][0].update(protocol="GRPC")),
    ("a policy type that does not exist", "NetworkPolicy saccade-default-deny",
     lambda o: o["spec"].update(policyTypes=["Inbound"])),
    ("a schedule with four fields", "CronJob saccade-refresh", lambda o: o["spec"].update(schedule="0 3 1 *")),
    ("a job that always restarts", "CronJob saccade-refresh",
     lambda o: o["spec"]["jobTemplate"]["spec"]["template"]["spec"].update(restartPolicy="Always")),
    ("a role without verbs", "Role saccade-promoter", lambda o: o["rules"][0].pop("verbs")),
    ("an access mode that does not exist", "PersistentVolumeClaim saccade-models",
     lambda o: (o["metadata"].update(name="new"), o["spec"].update(accessModes=["ReadWriteAll"]))),
    ("a service's port out of range", "Service saccade", lambda o: o["spec"]["ports"][0].update(port=0)),
)  # fmt: skip


def accepted(plane: Plane) -> str:
    """Create what is created once, apply the overlay, find every object there and nothing changed by applying again."""
    plane.kubectl("create", "-k", FOLDER / "once")
    plane.kubectl("apply", "-f", "-", stdin=LEGACY.text())
    again = plane.kubectl("apply", "-f", "-", stdin=LEGACY.text())
    changed = [line for line in again.splitlines() if not line.endswith("unchanged")]
    if changed:
        raise Failed(f"applying twice changes: {'; '.join(changed)}")
    kinds = (
        "deployments",
        "horizontalpodautoscalers",
        "poddisruptionbudgets",
        "networkpolicies",
        "cronjobs.v1beta1.batch",
    )
    told = ", ".join(f"{len(plane.get(kind)['items'])} {kind.partition('.')[0]}" for kind in kinds)
    return f"{len(LEGACY.objects)} objects of {LEGACY}, among them {told}; applying again changes nothing"


def refused(plane: Plane) -> str:
    """Every manifest that is broken on purpose is refused; whole, all of them were accepted."""
    objects = {named(found): found for found in LEGACY.objects}
    told = []
    for what, where, damage in BREAKS:
        broken = copy.deepcopy(objects[where])
        damage(broken)
        done = plane.attempt("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(broken))
        if done.returncode == 0:
            raise Failed(f"{where} was accepted with {what}")
        told.append(f"{where}, {what}: {_reason(done)}")
    return "\n".join((f"{len(BREAKS)} of {len(BREAKS)} broken manifests", *told))


def _reason(done: tools.Done) -> str:
    """The end of what the server, or kubectl with the server's own schema, says."""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Warning")]
    text = " ".join(" ".join(lines).split()).removesuffix(
        "; if you choose to ignore these errors, turn validation off with --validate=false"
    )
    return text if len(text) <= REASON else f"...{text[-REASON:]}"


def rolled(plane: Plane) -> str:
    """A changed setting rolls the pods of the gateway, a changed model name does not, and a rollout can be undone."""
    first = _settings_in_use(plane)
    with tempfile.TemporaryDirectory() as folder:
        copied = manifests.copy(FOLDER, Path(folder))
        settings = copied / "base" / "settings.env"
        settings.write_text(settings.read_text().replace("SACCADE_QUEUE_LIMIT=1000", "SACCADE_QUEUE_LIMIT=500"))
        plane.kubectl("apply", "-f", "-", stdin=LEGACY.text(copied))
    second = _settings_in_use(plane)
    if first == second:
        raise Failed("a changed setting does not change the pods")
    sets = _until(lambda: _replica_sets(plane), lambda found: len(found) == 2, "a second ReplicaSet")
    model = _model(plane)
    _move(plane, model, "another")
    time.sleep(2)
    if _replica_sets(plane) != sets:
        raise Failed("moving the model rolls the pods")
    _move(plane, "another", model)
    plane.kubectl("rollout", "undo", "deployment/saccade-gateway")
    if _settings_in_use(plane) != first:
        raise Failed("the rollout was not undone")
    plane.kubectl("apply", "-f", "-", stdin=LEGACY.text())
    return f"{first} -> {second}: a new ReplicaSet, undone by `kubectl rollout undo`; a moved model rolls nothing"


def _settings_in_use(plane: Plane) -> str:
    container = _spec(plane.get("deployment", "saccade-gateway"))["containers"][0]
    return str(container["envFrom"][0]["configMapRef"]["name"])


def _replica_sets(plane: Plane) -> set[str]:
    found = plane.get("replicasets")["items"]
    return {one["metadata"]["name"] for one in found if one["metadata"]["name"].startswith("saccade-gateway-")}


def _move(plane: Plane, current: str, candidate: str) -> None:
    patch = [
        {"op": "test", "path": "/data/model", "value": current},
        {"op": "replace", "path": "/data/model", "value": candidate},
    ]
    plane.kubectl("patch", "configmap", "saccade-model", "--type=json", f"--patch={json.dumps(patch)}")


def promoted(plane: Plane) -> str:
    """What the promoter may do, and that `training.promote` does it with the promoter's own token."""
    for allowed, rights in ((True, MAY), (False, MUST_NOT)):
        for right in rights:
            if _can(plane, right, PROMOTER) != allowed:
                raise Failed(f"the promoter {'cannot' if allowed else 'can'} {right}")
    gateway = f"system:serviceaccount:{NAMESPACE}:saccade-gateway"
    for right in (*MAY, *MUST_NOT):
        if _can(plane, right, gateway):
            raise Failed(f"the gateway can {right}")
    told = f"may {MAY[0]} and none of {len(MUST_NOT)} other things, the gateway nothing"
    return f"{told}; {_promotion(plane)}"


def _can(plane: Plane, right: str, user: str) -> bool:
    verb, what = right.split()
    subresource = ("--subresource=token",) if what.endswith("/token") else ()
    done = plane.attempt("auth", "can-i", verb, what.removesuffix("/token"), *subresource, f"--as={user}")
    return done.stdout.strip() == "yes"


def _promotion(plane: Plane) -> str:
    interpreter = FOLDER.parent / ".venv-test" / "bin" / "python"
    if not interpreter.is_file():
        return "training.promote not run: `make test` has not made its environment"
    with tempfile.TemporaryDirectory() as folder:
        account, reports = Path(folder) / "account", Path(folder)
        _account(plane, account)
        for model, value in (("saccade-s", 0.20), ("better", 0.19), ("worse", 0.21)):
            _report(reports / model, model, value)
        last = ""
        for current, candidate, expected in (
            ("saccade-s", "worse", "saccade-s"),
            ("saccade-s", "better", "better"),
            ("saccade-s", "better", "better"),  # somebody was faster: refused
        ):
            done = _promote(interpreter, plane, account, reports / current, reports / candidate)
            last = done.stderr.strip()
            if _model(plane) != expected:
                raise Failed(f"from {current} to {candidate} the model is {_model(plane)}: {tools.said(done)}")
        if not last:
            raise Failed("a promotion from a model that no longer serves was not refused")
    again = plane.kubectl("apply", "-f", "-", stdin=LEGACY.text())
    if _model(plane) != "better" or "configmap/saccade-model " in again:
        raise Failed("applying the overlay again sets the model back")
    previous = plane.get("configmap", "saccade-model")["data"]["previous"]
    return (
        f"training.promote with its token kept {previous} for a worse candidate, moved to a better one and refused "
        "the late one; applying the overlay again leaves that"
    )


def _promote(interpreter: Path, plane: Plane, account: Path, *reports: Path) -> tools.Done:
    code = (
        "import sys; from pathlib import Path; from training import promote; promote.ACCOUNT = Path(sys.argv.pop(1));"
        "promote.run()"
    )
    environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(plane.port)}
    command: tuple[str | Path, ...] = (interpreter, "-c", code, account, *reports, "--config-map=saccade-model")
    return tools.attempt(*command, cwd=FOLDER.parent, env=environment)


def _account(plane: Plane, folder: Path) -> None:
    """What the kubelet projects into the pod."""
    folder.mkdir()
    (folder / "namespace").write_text(NAMESPACE)
    (folder / "token").write_text(plane.kubectl("create", "token", "saccade-promoter"))
    (folder / "ca.crt").write_text(plane.get("configmap", "kube-root-ca.crt")["data"]["ca.crt"])


def _report(folder: Path, model: str, abs_rel: float) -> None:
    folder.mkdir()
    mean = {"task": "depth", "group": "all", "metric": "abs_rel", "pictures": 1, "value": abs_rel}
    report = {"data": "d", "model": model, "means": [mean], "pictures": [{"task": "depth", "name": "p"}]}
    (folder / "report.json").write_text(json.dumps(report))


def _model(plane: Plane) -> str:
    return str(plane.get("configmap", "saccade-model")["data"]["model"])


def evicted(plane: Plane) -> str:
    """The budget of the gateways lets one of them go, and not the second before the first is back."""
    _until(lambda: len(_pods(plane)), lambda count: count == 2, "two gateways, the autoscaler's least")
    for pod in _pods(plane):
        ready = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
        plane.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge", f"--patch={json.dumps(ready)}")
    first, second = _pods(plane)
    _until(lambda: _allowed(plane), lambda count: count == 1, "one disruption allowed")
    if _evict(plane, first).returncode:
        raise Failed("the first eviction was refused")
    done = _evict(plane, second)
    if done.returncode == 0:
        raise Failed("the second eviction was allowed")
    return f"the first eviction passed, the second: {done.stderr.strip()[-120:]}"


def _pods(plane: Plane) -> list[str]:
    pods = plane.get("pods")["items"]
    wanted = [pod for pod in pods if pod["metadata"]["labels"].get("app.kubernetes.io/component") == "gateway"]
    return [pod["metadata"]["name"] for pod in wanted if "deletionTimestamp" not in pod["metadata"]]


def _allowed(plane: Plane) -> int:
    return int(
        plane.get("poddisruptionbudgets.v1beta1.policy", "saccade-gateway")["status"].get("disruptionsAllowed", 0)
    )


def _evict(plane: Plane, pod: str) -> tools.Done:
    eviction = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    return plane.attempt("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def started(plane: Plane) -> str:
    """The refresh, started by hand, becomes a pod whose label names its candidate."""
    cron = next(found for found in LEGACY.objects if found["kind"] == "CronJob")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "saccade-refresh-1"},
        "spec": cron["spec"]["jobTemplate"]["spec"],
    }
    plane.kubectl("create", "-f", "-", stdin=yaml.safe_dump(job))
    selector = "--selector=job-name=saccade-refresh-1"
    found = _until(lambda: plane.kubectl("get", "pods", selector, "-o", "name").split(), bool, "a pod of the Job")
    return f"{found[0].split('/')[1]}"


def _until(look: Callable[[], T], good: Callable[[T], bool], what: str) -> T:
    deadline = time.monotonic() + PATIENCE_S
    while not good(found := look()):
        if time.monotonic() > deadline:
            raise Failed(f"not within {PATIENCE_S:g} s: {what}; found {found}")
        time.sleep(0.3)
    return found


CHECKS = {
    "API server accepts": accepted,
    "eviction": evicted,
    "API server refuses": refused,
    "refresh starts": started,
    "promotion": promoted,
    "settings roll": rolled,
}
