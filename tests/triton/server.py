"""The real Triton on a machine without a GPU or containers: its server from a PyPI wheel, with stand-in backends.

    python -m tests.triton.server            # fetch and lay out what is missing, say where it is

The wheel `nvidia-pytriton` carries `tritonserver` with its Python backend. ONNX Runtime's and LibTorch's backends are
not to be had outside NVIDIA's containers, so `backends/onnxruntime` and `backends/pytorch` stand in for them: Triton
finds them by the name that a model's configuration asks for, and so serves a repository as it stands.

Everything lies in a cache outside the repository, $SACCADE_TEST_CACHE or ~/.cache/saccade.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import grpc
from tritonclient.grpc.service_pb2 import ServerReadyRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

WHEEL = "nvidia-pytriton==0.7.0"
# This server's Python backend corrupts tensors silently under NumPy 2.
MODELS_NEED = ("numpy<2", "onnxruntime>=1.23,<2")
BACKENDS = Path(__file__).parent / "backends"
SHARED_MEMORY = Path("/dev/shm")
PATIENCE_S, STARTS = 60.0, 3
LOOPBACK = "127.0.0.1"


def cache() -> Path:
    named = os.environ.get("SACCADE_TEST_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "saccade").absolute()


@dataclass(frozen=True)
class Installation:
    """A server and the Python environment of its models, under one folder of the cache."""

    folder: Path

    @classmethod
    def here(cls) -> Installation:
        return cls(cache() / f"triton-{WHEEL.rpartition('=')[2]}-{sysconfig.get_python_version()}")

    @property
    def server(self) -> Path:
        return self.folder / "pytriton" / "tritonserver"

    @property
    def environment(self) -> Path:
        return self.folder / "venv"

    @property
    def complete(self) -> bool:
        return (self.folder / "complete").is_file()

    def obstacle(self) -> str | None:
        """Why this machine cannot run it; None if it can."""
        if sys.platform != "linux" or os.uname().machine != "x86_64":
            return "the wheel's server is for Linux on x86-64"
        if not (3, 11) <= sys.version_info[:2] <= (3, 12):
            return "NumPy 1, which the server's models need, is there for Python 3.11 and 3.12 alone"
        if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
            return "this Python has no shared libpython for the server's Python backend to load"
        return None

    def prepare(self) -> None:
        """Fetch and lay out, or nothing if that has been done; a second one at the same time waits."""
        if self.complete:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:  # held until it is closed, or its process has ended
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.complete:
                self._unpack_server()
                self._make_environment()
                (self.folder / "complete").touch()

    def _unpack_server(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _pip(sys.executable, "download", "--no-deps", "--dest", folder, WHEEL)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                wanted = ("pytriton/tritonserver/", "nvidia_pytriton.libs/")
                wheel.extractall(self.folder, [name for name in wheel.namelist() if name.startswith(wanted)])
        stub = self.server / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"
        for program in (self.server / "bin" / "tritonserver", stub):
            program.chmod(0o755)
        link = self.server / "backends" / "python" / stub.name
        link.unlink(missing_ok=True)
        link.symlink_to(Path("../../python_backend_stubs") / stub.parent.name / stub.name)

    def _make_environment(self) -> None:
        venv.create(self.environment, clear=True, with_pip=True)
        _pip(str(self.environment / "bin" / "python"), "install", "--no-compile", *MODELS_NEED)


def _pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


class TritonServer:
    """One server process in a process group of its own, with its ports kept over restarts.

    `folder` takes its log and its backend directory; `arguments` go to the server. `shared_memory` lists what the
    server's models hold in /dev/shm.
    """

    def __init__(self, repository: Path, folder: Path, *arguments: str) -> None:
        self.repository, self.folder, self.arguments = repository, folder, arguments
        self.installation = Installation.here()
        self.http, self.grpc, self.metrics = free_ports(3)
        self.prefix = f"saccade_{secrets.token_hex(4)}_"
        self.popen: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"{LOOPBACK}:{self.grpc}"

    @property
    def log(self) -> Path:
        return self.folder / "triton.log"

    def start(self, patience_s: float = PATIENCE_S) -> None:
        """Raises AssertionError with the log's end if the server is not ready in time.

        A server that dies while it starts is started again, as a container would be: on a crowded machine its Python
        backend sometimes fails to start a model's process.
        """
        deadline = time.monotonic() + patience_s
        for _ in range(STARTS):
            self.launch()
            while self._process.poll() is None and time.monotonic() < deadline:
                if self.ready():
                    return
                time.sleep(0.05)
            self.kill()
        raise AssertionError(f"Triton did not become ready; its log ends:\n{self.log.read_text()[-6000:]}")

    def launch(self) -> None:
        """Start the process; not waiting for it."""
        leash = ["setpriv", "--pdeathsig=KILL"] if shutil.which("setpriv") else []  # it must not outlive the tests
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*leash, *self._command], env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def has_died(self) -> bool:
        return self._process.poll() is not None

    def ready(self) -> bool:
        with grpc.insecure_channel(self.url) as channel, contextlib.suppress(grpc.RpcError):
            return bool(GRPCInferenceServiceStub(channel).ServerReady(ServerReadyRequest(), timeout=1).ready)
        return False

    def kill(self) -> None:
        """kill -9 for the server and its models' processes; what they held in shared memory is swept away, as the end
        of their container would."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self.sweep()

    def stop(self) -> int:
        """SIGTERM: drain and end."""
        self.terminate()
        return self.wait()

    def terminate(self) -> None:
        """SIGTERM, not waiting."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """For its end."""
        return self._process.wait(PATIENCE_S)

    def freeze(self) -> None:
        """The server alone: models' processes that slept with it may be taken for dead when it wakes, by a Python
        backend that stands in for one without processes."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self.popen is not None:
            self.kill()

    def stubs(self) -> list[int]:
        """Process ids of the models' processes."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                if b"triton_python_backend_stub" in arguments[0] and self.prefix.encode() in b" ".join(arguments):
                    found.append(int(entry.name))
        return sorted(found)

    def kill_stub(self, model: str) -> None:
        """kill -9 for the model's process."""
        named = f"/{model}/".encode()
        for pid in self.stubs():
            if named in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    def shared_memory(self) -> list[str]:
        return sorted(entry.name for entry in SHARED_MEMORY.iterdir() if entry.name.startswith(self.prefix))

    def sweep(self) -> None:
        for name in self.shared_memory():
            (SHARED_MEMORY / name).unlink(missing_ok=True)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        assert self.popen is not None, "the server has not been started"
        return self.popen

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    @cached_property
    def _backends(self) -> Path:
        """The server's own Python backend beside the stand-ins."""
        path = self.folder / "backends"
        path.mkdir(exist_ok=True)
        for source in (self.installation.server / "backends" / "python", *BACKENDS.iterdir()):
            if source.is_dir() and not (path / source.name).exists() and source.name != "__pycache__":
                (path / source.name).symlink_to(source)
        return path

    @property
    def _command(self) -> list[str]:
        server = self.installation.server
        addresses = [f"--{kind}-address={LOOPBACK}" for kind in ("http", "grpc", "metrics")]
        ports = [f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics}"]
        return [
            *(str(server / "bin" / "tritonserver"), f"--model-repository={self.repository}"),
            *(f"--backend-directory={self._backends}", f"--cache-directory={server / 'caches'}"),
            *("--model-control-mode=explicit", "--load-model=*", "--disable-auto-complete-config"),
            *("--allow-gpu-metrics=false", "--exit-timeout-secs=15"),
            *(f"--backend-config=python,shm-region-prefix-name={self.prefix}", *addresses, *ports),
            *self.arguments,
        ]

    @property
    def _environment(self) -> dict[str, str]:
        torch = importlib.util.find_spec("torch")
        libraries = [self.installation.folder / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
        return {
            **os.environ,
            "PATH": f"{self.installation.environment / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "STAND_IN_TORCH": str(Path(torch.origin).parents[1]) if torch and torch.origin else "",
        }


@contextlib.contextmanager
def running(repository: Path, folder: Path) -> Iterator[TritonServer]:
    """A server that is ready; gone without a trace at the end."""
    server = TritonServer(repository, folder)
    try:
        server.start()
        yield server
    finally:
        server.close()


class Tritons:
    """A server for every repository that is asked for, all of them gone at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: dict[Path, TritonServer] = {}

    def __enter__(self) -> Tritons:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.close()

    def __call__(self, repository: Path) -> TritonServer:
        if repository not in self._servers:
            server = self._servers[repository] = TritonServer(repository, self.folder / str(len(self._servers)))
            server.start()
        return self._servers[repository]

    def stop(self) -> list[str]:
        """Drain and end them all; what they left in shared memory."""
        for server in self._servers.values():
            server.terminate()
        for server in self._servers.values():
            server.wait()
        return [name for server in self._servers.values() for name in server.shared_memory()]


def main() -> None:
    installation = Installation.here()
    obstacle = installation.obstacle()
    if obstacle:
        sys.exit(f"Triton cannot be tested here: {obstacle}")
    installation.prepare()
    sys.stdout.write(f"Triton's server: {installation.folder}\n")


if __name__ == "__main__":
    main()
