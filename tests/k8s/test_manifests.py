"""What the manifests name exists, and what they promise holds: settings, ports, metrics, images, deadlines, rights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from saccade import __version__
from server import routes
from server.health import PROBE_TIMEOUT_S
from server.service import Service
from server.settings import PREFIX, Settings
from server.telemetry import Metrics
from tests.k8s.reading import (
    K8S,
    ROOT,
    Object,
    base_settings,
    containers,
    flags,
    kustomizations,
    leaves,
    literals,
    objects,
    of,
    only,
    pods,
    settings,
)
from training import promote, refresh, train

OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
GATEWAY, TRITON = "Deployment saccade-gateway", "Deployment saccade-triton"
# Of Triton (docs: user_guide/metrics) and of kube-state-metrics.
FOREIGN = {"up", "nv_inference_request_success", "nv_inference_request_failure", "kube_job_failed"}
SECONDS = {"TRITON_DRAIN": 15, "MARGIN": 10}


def test_every_file_is_part_of_a_kustomization() -> None:
    used = {path.parent / "kustomization.yaml" for path in kustomizations()}
    for path, kustomization in kustomizations().items():
        generated = [name for one in kustomization.get("configMapGenerator", ()) for name in (
            *one.get("files", ()), *one.get("envs", ()))]  # fmt: skip
        patches = [patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch]
        used |= {path.parent / name for name in (*kustomization.get("resources", ()), *generated, *patches)}
    beside = {K8S / "README.md", K8S / "prometheus-adapter.yaml", K8S / "validate"}
    beside |= {K8S / "components/monitoring/alerts.test.yaml"}
    files = {p for p in K8S.rglob("*") if p.is_file() and not {"validation", "__pycache__"} & set(p.parts)}
    assert files - used - beside == set()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_are_settings_and_their_values_are_good(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings(f"overlays/{overlay}").items():
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    Settings.load()


def test_every_variable_of_the_gateway_is_a_setting() -> None:
    (gateway,) = containers(pods()[GATEWAY])
    written = [name for kustomization in kustomizations().values() for name in literals(kustomization)]
    for name in (*written, *base_settings(), *(one["name"] for one in gateway["env"])):
        assert name.startswith(PREFIX)
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields


def test_services_set_no_variables_that_look_like_settings() -> None:
    """A Service named saccade would give every pod SACCADE_PORT=tcp://..., which the gateway would refuse."""
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in pods().values())


def test_ports_agree() -> None:
    assert only("Service", "saccade")["spec"]["ports"][0]["targetPort"] == "http"
    assert _ports(GATEWAY) == {"http": int(base_settings()["SACCADE_PORT"])}
    assert _ports(TRITON) == {"grpc": 8001, "metrics": 8002}
    arguments = flags(_triton()["args"])
    assert (arguments["grpc-port"], arguments["metrics-port"]) == ("8001", "8002")
    assert settings("overlays/gpu")["SACCADE_TRITON_URL"] == "saccade-triton:8001"
    assert only("Service", "saccade-triton")["spec"]["clusterIP"] == "None"  # each Triton is an endpoint of its own
    for service in of("Service"):
        known = _ports(_pod_of(service["spec"]["selector"]))
        assert all(port["targetPort"] in known for port in service["spec"]["ports"])
    for monitor in of("ServiceMonitor"):
        ports = {port["name"] for port in _service_of(monitor)["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    for policy in of("NetworkPolicy"):
        for rule in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            named = {port["port"] for port in rule.get("ports", ()) if isinstance(port["port"], str)}
            target = policy["spec"] if "ingress" in policy["spec"] else rule.get("to", [{}])[0]
            assert not named or named <= _ports(_pod_of(target["podSelector"]["matchLabels"])).keys()


def test_probes_ask_for_what_is_there() -> None:
    (gateway,) = containers(pods()[GATEWAY])
    paths = {getattr(route, "path", None) for route in routes.router().routes}
    asked = {gateway[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert asked == {"/livez", "/readyz"} <= paths
    assert gateway["readinessProbe"]["timeoutSeconds"] > PROBE_TIMEOUT_S
    for monitor in of("ServiceMonitor"):
        assert monitor["spec"]["endpoints"][0]["path"] == "/metrics"
    assert "/metrics" in paths
    triton = _triton()
    assert all(triton[f"{kind}Probe"]["grpc"]["port"] == 8001 for kind in ("startup", "readiness", "liveness"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_drain_cuts_nothing_that_was_accepted(overlay: str) -> None:
    drain_s = float(settings(f"overlays/{overlay}")["SACCADE_DRAIN_TIMEOUT_S"])
    request_s = float(settings(f"overlays/{overlay}")["SACCADE_REQUEST_TIMEOUT_S"])
    assert drain_s >= 2 * request_s  # upload and work are counted each on its own
    grace_s = pods()[GATEWAY]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= _pre_stop_s(containers(pods()[GATEWAY])[0]) + drain_s + SECONDS["MARGIN"]


def test_triton_has_the_time_that_its_drain_needs() -> None:
    exit_s = float(flags(_triton()["args"])["exit-timeout-secs"])
    assert exit_s >= SECONDS["TRITON_DRAIN"]
    grace_s = pods()[TRITON]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= _pre_stop_s(_triton()) + exit_s + SECONDS["MARGIN"]


def test_one_broken_model_neither_stops_triton_nor_takes_it_out_of_its_service() -> None:
    arguments = flags(_triton()["args"])
    assert arguments.items() >= {
        "model-control-mode": "explicit", "load-model": "*", "exit-on-error": "false", "strict-readiness": "false"
    }.items()  # fmt: skip


def test_triton_runs_here_as_its_image_runs_it() -> None:
    text = (ROOT / "docker" / "triton.Dockerfile").read_text()
    command = json.loads(text[text.rindex("CMD [") + 4 :].replace("\\\n", ""))
    theirs, ours = flags(command), flags(_triton()["args"])
    shared = (theirs.keys() & ours.keys()) - {"model-repository"}
    assert len(shared) >= 8
    assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}


@pytest.fixture
def metrics() -> dict[str, set[str]]:
    """Every sample that the gateway can give, with its labels."""
    kept = Metrics()

    async def never(_: str | None) -> Any:
        raise AssertionError

    Service(Settings(), never, kept)
    found: dict[str, set[str]] = {}
    for collector in kept.registry._collector_to_names:
        labels = {*getattr(collector, "_labelnames", getattr(collector, "_labels", ()))}
        for family in collector.collect():
            ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            found |= {family.name + end: labels | ({"le"} if end == "_bucket" else set()) for end in ends}
    return found


def test_rules_and_scalers_ask_for_metrics_and_labels_that_exist(metrics: dict[str, set[str]]) -> None:
    (rules,) = of("PrometheusRule")
    expressions = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    expressions += [t["metadata"]["query"] for one in of("ScaledObject") for t in one["spec"]["triggers"]]
    for expression in expressions:
        names = set(re.findall(r"\b(?:saccade|nv|kube)_\w+\b|\bup\b", re.sub(r'"[^"]*"', '""', expression)))
        assert names
        assert names <= metrics.keys() | FOREIGN, expression
        for name, matchers in re.findall(r"(\bsaccade_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= metrics[name] | {"namespace", "pod"}
    (scaler,) = of("HorizontalPodAutoscaler")
    asked = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert asked in metrics
    adapter = yaml.safe_load((K8S / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == asked
    assert rule["seriesQuery"].startswith(asked + "{")


def test_both_scalers_scale_alike() -> None:
    (one,), (other,) = of("HorizontalPodAutoscaler"), of("ScaledObject")
    assert one["spec"]["scaleTargetRef"] == other["spec"]["scaleTargetRef"]
    assert one["spec"]["minReplicas"] == other["spec"]["minReplicaCount"]
    assert one["spec"]["maxReplicas"] == other["spec"]["maxReplicaCount"]
    target = one["spec"]["metrics"][0]["pods"]["target"]["averageValue"]
    assert target == other["spec"]["triggers"][0]["metadata"]["threshold"]
    assert "replicas" not in only("Deployment", "saccade-gateway")["spec"]


def test_every_alert_says_what_to_look_at() -> None:
    (rules,) = of("PrometheusRule")
    for rule in rules["spec"]["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_images_are_those_of_docker() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    made = {service["image"].partition(":")[0] for service in compose["services"].values()}
    made.add(re.findall(r"-t (\S+)", (ROOT / "docker" / "training.Dockerfile").read_text())[0])
    for pod in pods().values():
        assert {container["image"] for container in containers(pod)} <= made
    for path, kustomization in kustomizations().items():
        for image in kustomization.get("images", ()):
            assert {image["name"], image.get("newName", image["name"])} <= made
            assert image["newTag"] == __version__, path
    for overlay in (*(f"overlays/{name}" for name in OVERLAYS), "training"):
        tagged = {
            image["name"] for image in yaml.safe_load((K8S / overlay / "kustomization.yaml").read_text())["images"]
        }
        assert tagged == {image for image in made if image in _images(overlay)}, overlay


@pytest.mark.parametrize("made_by", sorted(pods()))
def test_pods_keep_to_the_restricted_profile_and_more(made_by: str) -> None:
    pod = pods()[made_by]["spec"]
    assert pod["automountServiceAccountToken"] is False
    security = pod["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] == security["runAsGroup"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("hostPath" not in volume for volume in pod["volumes"])
    assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
    for container in containers(pods()[made_by]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert {"requests", "limits"} <= container["resources"].keys()
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        mounted, known = {mount["name"] for mount in container["volumeMounts"]}, {v["name"] for v in pod["volumes"]}
        assert mounted <= known


def test_the_kubernetes_token_is_for_the_container_that_promotes() -> None:
    for made_by, pod in pods().items():
        tokens = {v["name"] for v in pod["spec"]["volumes"] if "serviceAccountToken" in set(map(str, leaves(v)))}
        holders = [c["name"] for c in containers(pod) if tokens & {mount["name"] for mount in c["volumeMounts"]}]
        assert holders == (["promote"] if made_by == "CronJob saccade-refresh" else [])


def test_the_promoter_may_patch_one_config_map() -> None:
    (role,), (binding,) = of("Role"), of("RoleBinding")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["saccade-model"], "verbs": ["patch"]}
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == ["saccade-promoter"]
    assert not of("ClusterRole")
    assert not of("ClusterRoleBinding")


def test_nothing_passes_that_no_policy_allows() -> None:
    deny = only("NetworkPolicy", "saccade-default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    anywhere = [
        policy["metadata"]["name"] for policy in of("NetworkPolicy")
        if any("from" not in rule for rule in policy["spec"].get("ingress", ()))
    ]  # fmt: skip
    assert anywhere == []


def test_only_the_gateway_reaches_triton_and_nobody_its_http() -> None:
    policies = [p["spec"] for p in of("NetworkPolicy") if "ingress" in p["spec"] and _chooses(p, "triton")]
    rules = {rule["ports"][0]["port"]: rule["from"] for policy in policies for rule in policy["ingress"]}
    assert rules.keys() == {"grpc", "metrics"}
    (gateway,) = rules["grpc"]
    assert gateway == {"podSelector": {"matchLabels": pods()[GATEWAY]["metadata"]["labels"]}}
    assert flags(_triton()["args"])["allow-http"] == "false"
    assert all(service["spec"].get("type", "ClusterIP") == "ClusterIP" for service in of("Service"))
    (ingress,) = of("Ingress")
    backends = {
        path["backend"]["service"]["name"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]
    }
    assert backends == {"saccade"}


def test_the_model_file_is_the_config_map_and_names_a_model_there_is() -> None:
    (gateway,) = containers(pods()[GATEWAY])
    (mount,) = (one for one in gateway["volumeMounts"] if one["name"] == "model")
    (volume,) = (one for one in pods()[GATEWAY]["spec"]["volumes"] if one["name"] == "model")
    config_map = only("ConfigMap", volume["configMap"]["name"])
    file = Path(base_settings()["SACCADE_MODEL_FILE"])
    assert file.parent == Path(mount["mountPath"])
    assert "subPath" not in mount
    assert (ROOT / "model_repository" / config_map["data"][file.name] / "config.pbtxt").is_file()
    assert all(
        "model.yaml" not in k.get("resources", ()) for p, k in kustomizations().items() if p.parent.name != "once"
    )


def test_the_refresh_calls_commands_that_exist_with_flags_that_they_have(capsys: pytest.CaptureFixture[str]) -> None:
    by_name = {container["name"]: container for container in containers(pods()["CronJob saccade-refresh"])}
    given = refresh._arguments().parse_args(_filled(by_name["train"]["args"]))
    assert given.repository == Path(_mounted(by_name["train"], "models"))
    judged = promote._arguments().parse_args(_filled(by_name["promote"]["args"]))
    assert judged.config_map == "saccade-model"
    assert judged.tolerance == 0
    reports = {"evaluate-current": judged.current, "evaluate-candidate": judged.candidate}
    for name, report in reports.items():
        assert by_name[name]["command"][:2] == ["saccade", "evaluate"]
        options = flags(_filled(by_name[name]["args"]))
        assert options.keys() <= {"model-repository", "model", "out"}
        assert Path(options["out"]) == report
    assert [by_name[name]["command"][-1] for name in ("train", "promote")] == [refresh.__name__, promote.__name__]
    assert list(by_name) == ["train", "evaluate-candidate", "evaluate-current", "promote"]


def test_the_training_jobs_pods_find_each_other() -> None:
    job, service = only("Job", "saccade-training"), only("Service", "saccade-training")
    (container,) = containers(pods()["Job saccade-training"])
    pod = pods()["Job saccade-training"]["spec"]
    nodes = int(next(one["value"] for one in container["env"] if one["name"] == "NODES"))
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == nodes
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    options = flags(container["args"])
    host, _, port = options["rdzv-endpoint"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(port) == service["spec"]["ports"][0]["port"] == _ports("Job saccade-training")["rendezvous"]
    module = container["args"].index("--module")
    assert container["args"][module + 1] == train.__name__


@pytest.mark.parametrize("recipe", sorted(K8S.rglob("recipe.toml")), ids=lambda path: path.parent.name)
def test_recipes_are_recipes(recipe: Path) -> None:
    assert train.Recipe.read(recipe).scenes == "/data/scenes"


def _triton() -> Object:
    (triton,) = pods()[TRITON]["spec"]["containers"]
    found: Object = triton
    return found


def _ports(made_by: str) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in containers(pods()[made_by]) for port in c.get("ports", ())}


def _pod_of(labels: dict[str, str]) -> str:
    (found,) = (name for name, pod in pods().items() if labels.items() <= pod["metadata"]["labels"].items())
    return found


def _service_of(monitor: Object) -> Object:
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (found,) = (service for service in of("Service") if wanted <= service["metadata"]["labels"].items())
    return found


def _chooses(policy: Object, component: str) -> bool:
    labels = policy["spec"]["podSelector"].get("matchLabels", {})
    return bool(labels.get("app.kubernetes.io/component") == component)


def _pre_stop_s(container: Object) -> float:
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    return float(seconds)


def _mounted(container: Object, volume: str) -> str:
    return next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == volume)


def _filled(arguments: list[str]) -> list[str]:
    """As the kubelet fills in variables."""
    return [
        re.sub(r"\$\((\w+)\)", lambda found: {"THREADS": "4"}.get(found[1], found[1].lower()), a) for a in arguments
    ]


def _images(overlay: str) -> set[str]:
    """The images that an overlay's own folder, the base and its components name."""
    folder = K8S / overlay
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    folders = [
        (folder / part).resolve() for part in ("", *kustomization.get("components", ()), *kustomization["resources"])
    ]
    return {
        container["image"] for path, found in objects() for container in _containers_of(found)
        if any(part in path.resolve().parents for part in folders)
    }  # fmt: skip


def _containers_of(found: Object) -> list[Object]:
    spec = found.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return containers(spec["template"]) if "template" in spec else []
