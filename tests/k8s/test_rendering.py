"""What the overlays come to, rendered by this machine's kubectl or kustomize; skipped where it has neither."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from k8s.validation import tools
from k8s.validation.manifests import VARIANTS, Variant
from tests.k8s.reading import K8S, Object, containers, kustomizations, leaves

COMPONENT = "app.kubernetes.io/component"


@pytest.fixture(autouse=True, scope="module")
def renderer() -> None:
    """The one that is here; nothing is fetched for a test."""
    kubectl = shutil.which("kubectl")
    told = tools.attempt(kubectl, "version", "--client").stdout if kubectl else ""
    if not shutil.which("kustomize") and "Kustomize Version: v5" not in told:
        pytest.skip("neither kustomize nor a kubectl with kustomize 5 is here")


def rendered(variant: Variant, kind: str) -> dict[str, Object]:
    return {found["metadata"]["name"]: found for found in variant.objects if found["kind"] == kind}


def of(folder: str, *components: str) -> Variant:
    (found,) = (variant for variant in VARIANTS if (variant.folder, variant.components) == (folder, components))
    return found


def test_every_overlay_and_component_is_checked() -> None:
    folders = {variant.folder for variant in VARIANTS}
    assert {f"overlays/{path.name}" for path in (K8S / "overlays").iterdir()} <= folders
    chosen = {component for variant in VARIANTS for component in variant.components}
    listed = {Path(name).name for one in kustomizations().values() for name in one.get("components", ())}
    assert {path.name for path in (K8S / "components").iterdir()} == chosen | listed


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_image_has_a_tag_and_every_object_the_namespace(variant: Variant) -> None:
    for found in variant.objects:
        assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "saccade"
        spec = found.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            assert all(":" in container["image"] for container in containers(spec["template"]))


def test_no_secret_is_written_here() -> None:
    assert not [found for variant in VARIANTS for found in variant.objects if found["kind"] == "Secret"]


def test_triton_asks_for_a_gpu() -> None:
    deployment = rendered(of("overlays/gpu"), "Deployment")["saccade-triton"]
    (triton,) = deployment["spec"]["template"]["spec"]["containers"]
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == triton["resources"]["requests"]["nvidia.com/gpu"] == 1


def test_settings_reach_the_pods_under_the_name_that_rolls_them() -> None:
    for folder in ("overlays/cpu", "overlays/gpu"):
        (name,) = (name for name in rendered(of(folder), "ConfigMap") if name.startswith("saccade-settings-"))
        assert name in set(leaves(rendered(of(folder), "Deployment")["saccade-gateway"]))


def test_legacy_has_no_word_that_its_kubernetes_does_not_know() -> None:
    words = {word for found in of("overlays/legacy").objects for word in leaves(found)}
    unknown = {"podFailurePolicy", "timeZone", "unhealthyPodEvictionPolicy", "grpc", "--allow-http=false"}
    assert words & unknown == {"grpc"}  # the name of a port
    versions = {(found["apiVersion"], found["kind"]) for found in of("overlays/legacy").objects}
    assert versions >= {
        ("autoscaling/v2beta2", "HorizontalPodAutoscaler"), ("policy/v1beta1", "PodDisruptionBudget"),
        ("batch/v1beta1", "CronJob"),
    }  # fmt: skip


def test_keda_takes_the_autoscalers_place() -> None:
    variant = of("overlays/cpu", "keda", "ingress")
    assert rendered(variant, "ScaledObject")
    assert not rendered(variant, "HorizontalPodAutoscaler")


def test_an_image_volume_takes_the_claims_place() -> None:
    variant = of("overlays/gpu", "triton", "image-volume")
    assert not rendered(variant, "PersistentVolumeClaim")
    pod = rendered(variant, "Deployment")["saccade-triton"]["spec"]["template"]["spec"]
    assert not pod.get("initContainers")
    (models,) = (volume for volume in pod["volumes"] if volume["name"] == "models")
    assert models["image"]["reference"]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_mounted_is_there(variant: Variant) -> None:
    for found in variant.objects:
        spec = found.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" not in spec:
            continue
        volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
        for container in containers(spec["template"]):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
