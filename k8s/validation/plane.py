"""A Kubernetes control plane of this machine's own: etcd, API server, controller manager, from Debian's packages.

Debian packages of Kubernetes no more than its client, but the source package of bookworm holds the whole of 1.20, and
Go 1.19 builds it. The build is kept in the cache; a run keeps everything in a folder that is deleted at its end,
listens on loopback, and has no nodes: pods are made and stay pending.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k8s.validation import tools
from k8s.validation.tools import OLD, Done, Failed, Object, run

VERSION = "1.20.2"
PROGRAMS = ("kube-apiserver", "kube-controller-manager")
MODULE = "k8s.io/kubernetes"
GO = Path("usr/lib/go-1.19")
BUILD_S, START_S = 3600.0, 60.0
LOOPBACK = "127.0.0.1"
NAMESPACE = "saccade"


def built() -> Path | None:
    """The folder of the programs, if they have been built."""
    place = tools.cache() / f"kubernetes-{VERSION}"
    return place if place.is_dir() else None


def build() -> Path:
    """The folder of the programs. Minutes of two cores the first time. Raises Skipped where packages cannot be had."""
    place = built()
    if place is None:
        place = tools.cache() / f"kubernetes-{VERSION}"
        toolchain = tools.unpacked(("golang-1.19-go", "golang-1.19-src"), OLD) / GO
        with tools.draft(place) as made, tempfile.TemporaryDirectory(dir=made.parent) as work:
            _Build(Path(work), toolchain).programs(made)
    return place


class _Build:
    """In GOPATH mode, as that Kubernetes is built, and without its scripts."""

    def __init__(self, work: Path, toolchain: Path) -> None:
        self.go = toolchain / "bin" / "go"
        self.tree = work / "go" / "src" / MODULE
        self.tree.mkdir(parents=True)
        tools.source("kubernetes", OLD, work)
        with tarfile.open(next(work.glob("kubernetes_*.orig.tar.gz"))) as archive:
            top = archive.getnames()[0].partition("/")[0]
            archive.extractall(work, filter="tar")
        (work / top).rename(work / "kubernetes")
        self.tree.rmdir()
        (work / "kubernetes").rename(self.tree)
        self.environment = {
            "GOROOT": str(toolchain),
            "GOPATH": str(work / "go"),
            "GOCACHE": str(work / "cache"),
            "GOTMPDIR": str(work),
            "GO111MODULE": "off",
            "GOFLAGS": "",
            "CGO_ENABLED": "0",
            "PATH": f"{self.go.parent}:{os.environ['PATH']}",
        }

    def programs(self, into: Path) -> None:
        generator = into / "openapi-gen"
        self._run(self.go, "build", "-o", generator, f"{MODULE}/vendor/k8s.io/kube-openapi/cmd/openapi-gen")
        # The one kind of generated source that the package leaves out.
        self._generate(generator, "pkg/generated/openapi", "pkg", "vendor/k8s.io")
        extensions = "vendor/k8s.io/apiextensions-apiserver"
        self._generate(
            generator, f"{extensions}/pkg/generated/openapi", extensions, "vendor/k8s.io/apimachinery",
            "vendor/k8s.io/api/autoscaling/v1",
        )  # fmt: skip
        generator.unlink()
        variable = f"{MODULE}/vendor/k8s.io/component-base/version.gitVersion"
        flags = f"-s -w -X {variable}=v{VERSION}"
        self._run(
            self.go, "build", "-trimpath", "-ldflags", flags, "-o", into, *(f"{MODULE}/cmd/{p}" for p in PROGRAMS)
        )

    def _generate(self, generator: Path, package: str, *folders: str) -> None:
        tagged = sorted({name for folder in folders for name in self._tagged(folder)})
        self._run(
            generator, "--input-dirs", ",".join(tagged), "--output-package", f"{MODULE}/{package}",
            "--output-file-base", "zz_generated.openapi", "--report-filename", generator.with_name("violations"),
            "--go-header-file", self.tree / "hack/boilerplate/boilerplate.generatego.txt",
            "--output-base", self.tree.parents[1],
        )  # fmt: skip
        generator.with_name("violations").unlink()

    def _tagged(self, folder: str) -> Iterator[str]:
        """Packages under the folder that ask for a description."""
        for where, _, files in os.walk(self.tree / folder, followlinks=True):
            if any(part in where for part in ("code-generator", "sample-apiserver", "kube-openapi")):
                continue
            sources = (Path(where) / name for name in files if name.endswith(".go"))
            if any(b"+k8s:openapi-gen=" in source.read_bytes() for source in sources):
                yield f"{MODULE}/{Path(where).relative_to(self.tree)}"

    def _run(self, *command: str | Path) -> None:
        patient = ("nice", "-n", "10", *command)
        run(*patient, cwd=self.tree, env={**self.environment, "PWD": str(self.tree)}, timeout_s=BUILD_S)


@dataclass(frozen=True)
class Plane:
    """A running one. `kubectl` speaks as its administrator."""

    folder: Path
    port: int

    @property
    def configuration(self) -> Path:
        return self.folder / "kubeconfig"

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        return run(*self._command(*arguments), stdin=stdin)

    def attempt(self, *arguments: str | Path, stdin: str | None = None) -> Done:
        return tools.attempt(*self._command(*arguments), stdin=stdin)

    def get(self, what: str, name: str = "") -> Object:
        """A list's or an object's JSON."""
        found: Object = json.loads(self.kubectl("get", what, *filter(None, (name,)), "-o", "json"))
        return found

    def _command(self, *arguments: str | Path) -> tuple[str | Path, ...]:
        kubectl = tools.program("kubectl", "kubectl")
        options = (f"--kubeconfig={self.configuration}", f"--cache-dir={self.folder / 'cache'}")
        return (kubectl, *options, f"--namespace={NAMESPACE}", *arguments)


@contextlib.contextmanager
def running() -> Iterator[Plane]:
    """Gone without a trace at the end. Raises Failed with the end of a log if it does not come up."""
    programs = build()
    etcd = tools.program("etcd", "etcd-server")
    folder = Path(tempfile.mkdtemp(prefix="saccade-k8s-"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        plane = _configured(folder)
        for command in _commands(plane, programs, etcd):
            started.append(_start(command, folder))
            if Path(command[0]).name != "etcd":
                _await(plane, started[-1], Path(command[0]).name)
        yield plane
    finally:
        for process in reversed(started):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        shutil.rmtree(folder)


def _configured(folder: Path) -> Plane:
    run("openssl", "genrsa", "-out", folder / "accounts.key", "2048")
    token = secrets.token_hex(16)
    (folder / "tokens.csv").write_text(f"{token},administrator,1,system:masters\n")
    plane = Plane(folder, _free_port())
    access = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "plane",
        "clusters": [
            {
                "name": "plane",
                "cluster": {
                    "server": f"https://{LOOPBACK}:{plane.port}",
                    "certificate-authority": str(folder / "certificates" / "apiserver.crt"),
                },
            }
        ],
        "users": [{"name": "administrator", "user": {"token": token}}],
        "contexts": [{"name": "plane", "context": {"cluster": "plane", "user": "administrator"}}],
    }
    plane.configuration.write_text(json.dumps(access))
    return plane


def _commands(plane: Plane, programs: Path, etcd: Path) -> Iterator[list[str]]:
    folder, store, peer = plane.folder, f"http://{LOOPBACK}:{_free_port()}", f"http://{LOOPBACK}:{_free_port()}"
    yield [
        *(str(etcd), f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync"),
        *(f"--listen-client-urls={store}", f"--advertise-client-urls={store}", f"--listen-peer-urls={peer}"),
        *(f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"),
    ]
    yield [
        *(str(programs / "kube-apiserver"), f"--etcd-servers={store}", f"--secure-port={plane.port}"),
        *(f"--bind-address={LOOPBACK}", f"--cert-dir={folder / 'certificates'}", "--authorization-mode=RBAC"),
        *(f"--token-auth-file={folder / 'tokens.csv'}", "--service-cluster-ip-range=10.96.0.0/24"),
        *(f"--service-account-key-file={folder / 'accounts.key'}", "--service-account-issuer=https://saccade.test"),
        f"--service-account-signing-key-file={folder / 'accounts.key'}",
    ]
    yield [
        *(str(programs / "kube-controller-manager"), f"--kubeconfig={plane.configuration}"),
        *("--port=0", "--secure-port=0", "--use-service-account-credentials"),
        f"--service-account-private-key-file={folder / 'accounts.key'}",
        f"--root-ca-file={folder / 'certificates' / 'apiserver.crt'}",
    ]


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / f"{Path(command[0]).name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _await(plane: Plane, process: subprocess.Popen[bytes], name: str) -> None:
    """The API server answers; the controller manager has made the first account of a namespace."""
    ready = _answers if name == "kube-apiserver" else _has_accounts
    deadline = time.monotonic() + START_S
    while not ready(plane):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{name} did not come up: {(plane.folder / f'{name}.log').read_text()[-1500:]}")
        time.sleep(0.2)


def _answers(plane: Plane) -> bool:
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE  # nothing is sent, and its answer is not believed
    url = f"https://{LOOPBACK}:{plane.port}/readyz"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5, context=trust) as answer:
        return bool(answer.status == 200)
    return False


def _has_accounts(plane: Plane) -> bool:
    return plane.attempt("get", "serviceaccount", "default", "--namespace", "default").returncode == 0


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])
