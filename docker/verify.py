"""Run the built images the way they should be run, and say what was seen.

    .venv/bin/python docker/verify.py [IMAGE...]    gateway (with triton behind it), embedded; by default both

Every container runs as user 10001 on a read-only root without capabilities. $CONTAINERS is the program that runs them,
"podman --runtime runc" by default; $PREFIX stands before the images' names, "localhost/saccade-" by default. Prints a
table; ends with 1 at the first thing that is not as it should be.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np

from saccade.client import Client, Retries

PROGRAM = shlex.split(os.environ.get("CONTAINERS", "podman --runtime runc"))
PREFIX = os.environ.get("PREFIX", "localhost/saccade-")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MEGABYTES = {"gateway": 400, "embedded": 700}
FORBIDDEN = ("torch", "pip", "setuptools")
STARTS = 5
PATIENCE_S = 120.0
LARGE_MB = 5.8  # noise does not compress: 1600 x 1200 px as PNG
CONTAINED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp:size=1g,mode=1777")
LIMITS = ("--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")  # podman's own need a privilege to be set


def call(*arguments: str, check: bool = True) -> str:
    """Standard output of the container program. Raises RuntimeError with its last words."""
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{shlex.join(arguments)}: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


class Container:
    """One that runs; its port 8080 is `url` on this machine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.monotonic()

    @property
    def url(self) -> str:
        return "http://" + call("port", self.name, "8080/tcp").splitlines()[0]

    def until_ready(self) -> float:
        """Seconds from the command that started it."""
        url = self.url
        while time.monotonic() < self.began + PATIENCE_S:
            try:
                if httpx.get(f"{url}/readyz", timeout=15).status_code == 200:
                    return time.monotonic() - self.began
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not become ready; its log ends:\n{self.logs()[-3000:]}")

    def python(self, program: str) -> str:
        return call("exec", self.name, "python3", "-c", program)

    def logs(self) -> str:
        done = subprocess.run([*PROGRAM, "logs", self.name], capture_output=True, text=True)
        return done.stdout + done.stderr

    def stop(self) -> tuple[float, int]:
        """SIGTERM; seconds and exit status."""
        began = time.monotonic()
        call("stop", "--time=45", self.name)
        return time.monotonic() - began, int(call("inspect", "--format={{.State.ExitCode}}", self.name))


@contextmanager
def running(image: str, *options: str) -> Iterator[Container]:
    """Gone at the end."""
    name = f"saccade-verify-{secrets.token_hex(4)}"
    container = Container(name)
    try:
        call("run", "--detach", f"--name={name}", *CONTAINED, *LIMITS, *options, PREFIX + image)
        yield container
    finally:
        call("rm", "--force", name, check=False)


@contextmanager
def fronted(image: str) -> Iterator[Container]:
    """A gateway, with Triton behind it where it needs one, on a network that leads nowhere else."""
    with ExitStack() as stack:
        published = "--publish=127.0.0.1::8080"
        if image == "embedded":
            yield stack.enter_context(running(image, published))
            return
        front, behind = (stack.enter_context(network(*kind)) for kind in ((), ("--internal",)))
        stack.enter_context(running("triton", f"--network={behind}:alias=triton", "--shm-size=1g"))
        yield stack.enter_context(running(image, published, f"--network={front}", f"--network={behind}"))


@contextmanager
def network(*options: str) -> Iterator[str]:
    name = f"saccade-verify-{secrets.token_hex(4)}"
    call("network", "create", *options, name)
    try:
        yield name
    finally:
        call("network", "rm", "--force", name, check=False)


def size(image: str) -> str:
    """Uncompressed, as the container program counts it."""
    megabytes = int(call("image", "inspect", "--format={{.Size}}", PREFIX + image)) / 1e6
    ensure(megabytes < MEGABYTES[image], f"{megabytes:.0f} MB")
    return f"{megabytes:.0f} MB"


def contents(container: Container) -> str:
    """No package that does not belong, and a bill of materials that names every package there is."""
    seen = json.loads(
        container.python(
            "import importlib.metadata as m, importlib.util as u, json, sys; print(json.dumps({"
            "'sbom': json.load(open(sys.prefix + '/share/sbom.cdx.json'))['components'],"
            f"'strangers': [name for name in {FORBIDDEN!r} if u.find_spec(name)],"
            "'packages': [d.metadata['Name'] + ' ' + d.version for d in m.distributions()]}))"
        )
    )
    ensure(not seen["strangers"], f"importable: {seen['strangers']}")
    kinds = [str(part.get("purl", part["type"])).partition("/")[0] for part in seen["sbom"]]
    missing = set(seen["packages"]) - {f"{part['name']} {part['version']}" for part in seen["sbom"]}
    ensure(not missing, f"not in the bill of materials: {missing}")
    counts = {kind: kinds.count(kind) for kind in ("pkg:pypi", "pkg:deb", "machine-learning-model")}
    return f"no {', '.join(FORBIDDEN)}; SBOM: {counts['pkg:pypi']} Python packages, {counts['pkg:deb']} of Debian, " + (
        f"{counts['machine-learning-model']} graphs"
    )


def confinement(container: Container) -> str:
    status = container.python("print(open('/proc/1/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    ensure(fields["Uid"].split() == ["10001"] * 4, f"user {fields['Uid']}")
    ensure(int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0, f"capabilities {fields['CapBnd']}")
    ensure(fields["NoNewPrivs"] == "1", "new privileges are possible")
    refused = container.python(
        "import sys\nfor path in ('/x', '/opt/saccade/x', sys.prefix + '/lib/x'):\n"
        "    try: open(path, 'w')\n    except OSError as error: print(error.errno)"
    )
    ensure(refused.split() == ["30"] * 3, "the root can be written")
    return "user 10001, no capabilities, no new privileges, root read-only (EROFS)"


def answers(container: Container) -> str:
    """All three tasks, of the shapes they should have."""
    photo, first, second = (EXAMPLES / name for name in ("photo.jpg", "frame_1.png", "frame_2.png"))
    told = []
    with Client(container.url, retries=Retries(0)) as client:
        for answer in (
            client.depth(photo),
            client.flow(first, second),
            client.amodal(EXAMPLES / "occluded.jpg", EXAMPLES / "occluded_mask.png"),
        ):
            ensure(answer.prediction.ndim == (3 if answer.task == "flow" else 2), f"{answer.prediction.shape}")
            told.append(f"{answer.task} {answer.timings_ms['total']:.0f} ms")
        noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
        told.append(f"a picture of {LARGE_MB:g} MB, spooled to /tmp, {client.depth(noise).timings_ms['total']:.0f} ms")
    return ", ".join(told)


def health(container: Container) -> str:
    """What the image's HEALTHCHECK says, once it has been run."""
    if PROGRAM[0] == "podman":  # without systemd nobody else runs it
        call("healthcheck", "run", container.name)
    said = call("inspect", "--format={{.State.Health.Status}}", container.name)
    ensure(said == "healthy", said)
    return said


def drain(container: Container) -> str:
    """SIGTERM while requests run: each one is answered, then the process ends well."""
    url, count = container.url, 4
    with ThreadPoolExecutor(count) as pool, Client(url, retries=Retries(0)) as client:
        asked = [
            pool.submit(client.depth, EXAMPLES / "photo.jpg", steps=10, ensemble_size=2, seed=seed)
            for seed in range(count)
        ]
        while f"saccade_pending_requests {count}.0" not in httpx.get(f"{url}/metrics").text:
            ensure(not any(one.done() for one in asked), "the requests ended before they could be drained")
            time.sleep(0.01)
        seconds, status = container.stop()
        answered = [one.result() for one in asked]
    ensure(status == 0, f"exit status {status}")
    return f"{len(answered)} of {count} accepted requests answered; ended after {seconds:.1f} s with 0"


def refusal(image: str, setting: str) -> str:
    """The last line of a server that was told nonsense."""
    with running(image, f"--env={setting}") as container:
        status = int(call("wait", container.name))
        last = container.logs().strip().splitlines()[-1]
    ensure(status != 0 and last.startswith("saccade: "), f"status {status}: {last}")
    return f"status {status}: `{last}`"


def alone() -> str:
    """A gateway whose Triton is nowhere: alive, not ready, unhealthy, and it says so."""
    with running("gateway", "--publish=127.0.0.1::8080", "--env=SACCADE_TRITON_URL=127.0.0.1:1") as container:
        url = container.url
        while True:
            try:
                ready = httpx.get(f"{url}/readyz", timeout=15)
                break
            except httpx.TransportError:
                ensure(time.monotonic() < container.began + PATIENCE_S, container.logs()[-2000:])
                time.sleep(0.05)
        alive = httpx.get(f"{url}/livez").status_code
        check = subprocess.run(
            [*PROGRAM, "exec", container.name, "python3", "-IS", "/usr/local/bin/healthcheck.py"], capture_output=True
        ).returncode
    ensure((ready.status_code, alive, check) == (503, 200, 1), f"{ready.status_code}, {alive}, {check}")
    return f"/livez {alive}, /readyz {ready.status_code} `{ready.json()['detail']}`, health check {check}"


def ensure(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def tell(image: str, check: str, seen: str) -> None:
    sys.stdout.write(f"| {image} | {check} | {seen} |\n")
    sys.stdout.flush()


def verify(image: str) -> None:
    tell(image, "size", size(image))
    starts = []
    for _ in range(STARTS):
        with fronted(image) as container:
            starts.append(container.until_ready())
    tell(image, "start to ready", f"median {statistics.median(starts):.1f} s of {STARTS}, worst {max(starts):.1f} s")
    with fronted(image) as container:
        container.until_ready()
        tell(image, "contents", contents(container))
        tell(image, "confinement", confinement(container))
        tell(image, "answers", answers(container))
        tell(image, "HEALTHCHECK", health(container))
        tell(image, "SIGTERM", drain(container))
    for setting in ("SACCADE_PORT=http", "SACCADE_BATCH_SIZE=0", "SACCADE_MODEL_REPOSITORY=/nowhere"):
        if image == "embedded" or "REPOSITORY" not in setting:
            tell(image, f"refuses `{setting}`", refusal(image, setting))
    if image == "gateway":
        tell(image, "no Triton", alone())


def main() -> None:
    images = sys.argv[1:] or ["gateway", "embedded"]
    if set(images) - MEGABYTES.keys():
        sys.exit(__doc__)
    sys.stdout.write("| image | check | seen |\n|---|---|---|\n")
    try:
        for image in images:
            verify(image)
    except RuntimeError as error:
        sys.exit(f"verify.py: {error}")


if __name__ == "__main__":
    main()
