"""What docker/ says about itself, without building anything: names, pins, users, ports and grace periods agree."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from server.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = {path.name: path.read_text() for path in sorted(DOCKER.glob("*.Dockerfile"))}
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = re.compile(r"(?:[a-z0-9.-]+/)*[a-z0-9-]+:\d+\.\d+(?:\.\d+)?-[a-z0-9-]+(?:@sha256:[0-9a-f]{64})?")
VARIABLE = re.compile(r"\$\{[A-Z_]+:-([^}]*)\}")


def instructions(dockerfile: str, *kinds: str) -> list[list[str]]:
    """The words of every instruction of these kinds, in order; continued lines are joined, comments left out."""
    kept = "\n".join(line for line in DOCKERFILES[dockerfile].splitlines() if not line.startswith("#"))
    lines = [shlex.split(line) for line in kept.replace("\\\n", " ").splitlines() if line.strip()]
    return [words for words in lines if words[0] in kinds]


def arguments(dockerfile: str) -> dict[str, str]:
    return dict(word.split("=", 1) for _, word in instructions(dockerfile, "ARG") if "=" in word)


def environment(dockerfile: str) -> dict[str, str]:
    return dict(word.split("=", 1) for words in instructions(dockerfile, "ENV") for word in words[1:])


def resolved(value: str) -> str:
    """Compose's defaults put in."""
    return VARIABLE.sub(r"\1", value)


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def locked(name: str) -> dict[str, list[tuple[Requirement, str]]]:
    """The requirements of a lock file by package, each with the text of its options."""
    found: dict[str, list[tuple[Requirement, str]]] = {}
    for entry in re.split(r"\n(?=[a-z])", (DOCKER / "locks" / name).read_text()):
        if not entry.startswith("#"):
            head, _, options = entry.replace("\\\n", " ").partition(" --hash")
            requirement = Requirement(head.strip())
            found.setdefault(requirement.name, []).append((requirement, options))
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_told_only_settings_that_exist(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {name: resolved(str(value)) for name, value in SERVICES[service].get("environment", {}).items()}
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert all(name.removeprefix(PREFIX).lower() in Settings.model_fields for name in told)
    assert settings.backend == ("triton" if service == "gateway" else "embedded")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_sets_only_settings_that_exist(dockerfile: str) -> None:
    told = {name for name in environment(dockerfile) if name.startswith(PREFIX)}
    assert {name.removeprefix(PREFIX).lower() for name in told} <= Settings.model_fields.keys()


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_bases_are_arguments_pinned_by_a_full_version(dockerfile: str) -> None:
    stages: set[str] = set()
    for words in instructions(dockerfile, "FROM"):
        source = words[1]
        assert source in stages or source in ("${BASE}", "${TRITON}")
        stages |= {words[3]} if len(words) > 3 else set()
    bases = [value for name, value in arguments(dockerfile).items() if name in ("BASE", "TRITON")]
    assert all(PINNED.fullmatch(base) for base in bases)
    assert bases or dockerfile == "tritonserver.Dockerfile"


@pytest.mark.parametrize("service", SERVICES)
def test_compose_builds_from_the_same_bases(service: str) -> None:
    build = SERVICES[service]["build"]
    dockerfile = Path(build["dockerfile"]).name
    assert (DOCKER / build["context"]).resolve() == ROOT
    for name, value in build["args"].items():
        assert resolved(value) == arguments(dockerfile)[name]
    assert build.get("target") in (None, *(words[3] for words in instructions(dockerfile, "FROM") if len(words) > 3))


@pytest.mark.parametrize("dockerfile", ["gateway.Dockerfile", "triton.Dockerfile", "training.Dockerfile"])
def test_images_end_as_a_user_without_privileges(dockerfile: str) -> None:
    stages = re.split(r"(?m)^FROM ", DOCKERFILES[dockerfile])[1:]
    finals = stages[-2:] if dockerfile == "gateway.Dockerfile" else stages[-1:]
    assert all(re.findall(r"(?m)^USER (.*)$", stage)[-1] == "10001:10001" for stage in finals)


@pytest.mark.parametrize("service", SERVICES)
def test_services_are_contained(service: str) -> None:
    told = SERVICES[service]
    assert (told["user"], told["read_only"], told["cap_drop"]) == ("10001:10001", True, ["ALL"])
    assert told["security_opt"] == ["no-new-privileges:true"]
    assert told["init"] is True
    assert "privileged" not in told


def test_ports_agree() -> None:
    port = environment("gateway.Dockerfile")["SACCADE_PORT"]
    assert instructions("gateway.Dockerfile", "EXPOSE") == [["EXPOSE", port]]
    for service in ("gateway", "embedded"):
        assert [resolved(published) for published in SERVICES[service]["ports"]] == [f"127.0.0.1:8080:{port}"]
    triton = instructions("triton.Dockerfile", "CMD")[-1]
    grpc = next(word for word in triton if "--grpc-port=" in word).strip('[],"').removeprefix("--grpc-port=")
    for told in (environment("gateway.Dockerfile"), SERVICES["gateway"]["environment"]):
        assert told["SACCADE_TRITON_URL"] == f"triton:{grpc}"


@pytest.mark.parametrize("service", ["triton", "triton-gpu"])
def test_triton_is_the_gateways_alone(service: str) -> None:
    assert "ports" not in SERVICES[service]
    assert list(SERVICES[service]["networks"]) == ["behind"]
    assert COMPOSE["networks"]["behind"]["internal"] is True
    assert SERVICES[service]["networks"]["behind"]["aliases"] == ["triton"]


@pytest.mark.parametrize("service", ["gateway", "embedded"])
def test_a_drain_has_the_time_it_may_take(service: str) -> None:
    drain = float(SERVICES[service]["environment"]["SACCADE_DRAIN_TIMEOUT_S"])
    assert seconds(SERVICES[service]["stop_grace_period"]) > drain


@pytest.mark.parametrize("service", ["triton", "triton-gpu"])
def test_triton_has_the_time_it_may_take(service: str) -> None:
    told = DOCKERFILES["triton.Dockerfile"]
    assert seconds(SERVICES[service]["stop_grace_period"]) > int(re.findall(r"--exit-timeout-secs=(\d+)", told)[0])


def test_every_profile_has_exactly_one_gateway() -> None:
    published = {name: service["profiles"] for name, service in SERVICES.items() if "ports" in service}
    assert sorted(profile for profiles in published.values() for profile in profiles) == ["cpu", "embedded", "gpu"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_is_there_and_not_ignored(dockerfile: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    for words in instructions(dockerfile, "COPY"):
        if not words[1].startswith("--from"):
            for source in words[1:-1]:
                assert (ROOT / source).exists()
                assert any(source == path or source.startswith(f"{path}/") for path in kept), source


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("gateway.txt", ("otel",)), ("embedded.txt", ("cpu", "otel", "video")), ("training.txt", ("cpu", "train"))],
)
def test_locks_are_complete_and_hashed(lock: str, extras: tuple[str, ...]) -> None:
    """And hold what pyproject.toml asks for; PyTorch comes apart."""
    found = locked(lock)
    assert all("sha256:" in options for entries in found.values() for _, options in entries)
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower()
        if name == "torch":
            assert name not in found
            assert str(requirement.specifier) == f"=={arguments('training.Dockerfile')['TORCH']}"
            continue
        for entry, _ in found[name]:
            (pin,) = entry.specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(Version(pin.version)), requirement
    assert ("scipy" in found) == ("train" in extras)
    assert ("opencv-python-headless" in found) == bool({"train", "video"} & set(extras))


@pytest.mark.parametrize("script", ["build-local", "environment", "lock"])
def test_scripts_are_programs(script: str) -> None:
    path = DOCKER / script
    assert os.access(path, os.X_OK)
    shell = path.read_text().splitlines()[0].rpartition("/")[2].split()[-1]
    subprocess.run([shell, "-n", str(path)], check=True)


def test_no_file_of_the_images_names_a_mirror() -> None:
    """Package sources and registries are those of whoever builds."""
    named = {
        host
        for path in DOCKER.rglob("*")
        if path.is_file() and path.suffix not in (".md", ".pyc")
        for host in re.findall(r"https?://([A-Za-z0-9.-]+)", path.read_text())
    }
    allowed = ("127.0.0.1", "download.pytorch.org")
    assert all(any(fnmatch(host, pattern) for pattern in allowed) for host in named), named
