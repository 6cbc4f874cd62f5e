"""The two programs that images are built with: the health check and the bill of materials."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "docker"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


sbom = module("sbom")


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server's port; it says `status` to /readyz."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(b"Not ready: a tiny inference failed.")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def health(port: object, *arguments: str) -> tuple[int, str]:
    """As the images run it: isolated, without site-packages."""
    done = subprocess.run(
        [sys.executable, "-IS", str(DOCKER / "healthcheck.py"), *arguments],
        env={"SACCADE_PORT": str(port)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def test_ready_is_healthy() -> None:
    with answering(200) as port:
        assert health(port) == (0, "")
        assert health("", f"http://127.0.0.1:{port}/readyz") == (0, "")


def test_not_ready_is_unhealthy_and_says_why() -> None:
    with answering(503) as port:
        assert health(port) == (1, "503 Not ready: a tiny inference failed.\n")


def test_nobody_there_is_one_line() -> None:
    with answering(200) as port:
        pass
    status, said = health(port)
    assert (status, said.count("\n")) == (1, 1)
    assert "Traceback" not in said


def test_installed_packages_alone_are_in_the_bill(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9+deb12u10\n"
        "Description: GNU C Library\n Package: not a field\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    (found,) = sbom.debian_packages(tmp_path, "debian-12")
    assert found["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12"
    assert (found["name"], found["version"]) == ("libc6", "2.36-9+deb12u10")


def test_images_without_dpkg_have_a_file_for_each_package(tmp_path: Path) -> None:
    (tmp_path / "status.d").mkdir()
    (tmp_path / "status.d" / "tzdata").write_text("Package: tzdata\nArchitecture: all\nVersion: 2025b-0\n")
    assert [part["name"] for part in sbom.debian_packages(tmp_path, "debian-12")] == ["tzdata"]


def test_every_graph_is_in_the_bill() -> None:
    found = {part["name"]: part["hashes"][0]["content"] for part in sbom.models(DOCKER.parent / "model_repository")}
    assert {"saccade-s", "saccade-s-encoder", "saccade-s-decoder"} <= found.keys()
    assert all(len(digest) == 64 for digest in found.values())


@pytest.mark.parametrize(
    ("text", "name"), [('NAME="Debian"\nID=debian\nVERSION_ID="12"\n', "debian-12"), ("ID=arch\n", "arch")]
)
def test_the_distribution_is_named(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "os-release").write_text(text)
    assert sbom.distribution(tmp_path / "os-release") == name
