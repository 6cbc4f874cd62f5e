"""The programs that the checks need: those of this machine, else fetched into a cache from where it gets its packages.

Debian's packages come through apt, from the mirror that this machine is configured for and checked against its keyring,
and are unpacked, not installed; Python's through pip, Node's through npm. The cache is $SACCADE_TEST_CACHE or
~/.cache/saccade; nothing outside it is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Object = dict[str, Any]
Done = subprocess.CompletedProcess[str]
# One release for the programs, an older one for what builds an old Kubernetes.
PROGRAMS, OLD = "trixie", "bookworm"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ENVIRONMENT = ("kubernetes-validate==1.37.0", "PyYAML>=6,<7")
LEGACY_ENVIRONMENT = ("kubernetes-validate==1.24.1", "setuptools<81")


class Skipped(Exception):
    """This machine cannot do it; the message says why."""


class Failed(Exception):
    """Something is not as it should be; the message says what."""


def cache() -> Path:
    named = os.environ.get("SACCADE_TEST_CACHE")
    folder = (Path(named) if named else Path.home() / ".cache" / "saccade").absolute() / "k8s"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(
    *command: str | Path,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> str:
    """Standard output. Raises Failed with what the program said if it ends otherwise than well."""
    done = attempt(*command, stdin=stdin, cwd=cwd, env=env, timeout_s=timeout_s)
    if done.returncode:
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode}: {said(done)}")
    return done.stdout


def attempt(
    *command: str | Path,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> Done:
    """Run it, whatever comes of it. Raises Failed if it does not end in time."""
    environment = {**os.environ, **(env or {})}
    try:
        return subprocess.run(
            [str(part) for part in command],
            input=stdin, cwd=cwd, env=environment, timeout=timeout_s, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{Path(command[0]).name} did not end within {timeout_s:g} s") from error


def said(done: Done) -> str:
    return (done.stderr.strip() or done.stdout.strip())[-2000:]


@contextlib.contextmanager
def draft(place: Path) -> Iterator[Path]:
    """A folder that becomes `place` when the block has succeeded, and is gone if it has not."""
    made = place.with_name(f"{place.name}.{os.getpid()}.part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def python(packages: Sequence[str], name: str = "venv") -> Path:
    """The interpreter of an environment with `packages`."""
    place = cache() / name
    stamp = place / "packages"
    if not stamp.is_file() or stamp.read_text() != "\n".join(packages):
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)  # its scripts name its path: made where it stays
        made = attempt(place / "bin" / "pip", "--disable-pip-version-check", "install", "--quiet", *packages)
        if made.returncode:
            raise Skipped(f"pip cannot install {', '.join(packages)}: {said(made).splitlines()[-1]}")
        stamp.write_text("\n".join(packages))
    return place / "bin" / "python"


def reenter() -> None:
    """Go on in the environment that has what the checks import."""
    interpreter = python(ENVIRONMENT)
    if Path(sys.prefix).resolve() != interpreter.parents[1].resolve():
        os.execv(interpreter, [str(interpreter), "-m", "k8s.validation", *sys.argv[1:]])


def node(packages: Sequence[str]) -> Path:
    """A folder whose node_modules has `packages`."""
    npm = shutil.which("npm")
    if npm is None:
        raise Skipped("there is no npm here")
    place = cache() / "node"
    stamp = place / "packages"
    if not stamp.is_file() or stamp.read_text() != "\n".join(packages):
        with draft(place) as made:
            (made / "package.json").write_text('{"private": true, "type": "module"}\n')
            done = attempt(npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages, cwd=made)
            if done.returncode:
                raise Skipped(f"npm cannot install {', '.join(packages)}: {said(done).splitlines()[-1]}")
            (made / "packages").write_text("\n".join(packages))
    return place


def program(name: str, package: str) -> Path:
    """The program on this machine's path, else from Debian's `package`. Raises Skipped."""
    found = shutil.which(name)
    return Path(found) if found else unpacked((package,), PROGRAMS) / "usr" / "bin" / name


def unpacked(packages: Sequence[str], release: str) -> Path:
    """The tree of some packages of a Debian release. Raises Skipped where this machine has no way to them."""
    place = cache() / "-".join((release, *packages))
    if not place.is_dir():
        with draft(place) as made:
            debs = made / "debs"
            debs.mkdir()
            _apt("download", *(f"{name}/{release}" for name in packages), cwd=debs)
            for deb in sorted(debs.glob("*.deb")):
                run("dpkg-deb", "--extract", deb, made)
            shutil.rmtree(debs)
    return place


def source(package: str, release: str, into: Path) -> None:
    """Fetch the files of a Debian source package, checked, into a folder. Raises Skipped."""
    _apt("source", "--download-only", f"{package}/{release}", cwd=into)


def _apt(*arguments: str, cwd: Path) -> None:
    """apt-get with lists of its own, so that neither root nor a change of this machine's lists is needed."""
    folder = cache() / "apt"
    private = _apt_options(folder)
    if not (folder / "updated").is_file():
        done = attempt("apt-get", *private, "-qq", "update", timeout_s=600)
        if done.returncode:
            raise Skipped(f"apt-get update: {said(done)}")
        (folder / "updated").touch()
    done = attempt("apt-get", *private, "-qq", *arguments, cwd=cwd, timeout_s=600)
    if done.returncode:
        (folder / "updated").unlink(missing_ok=True)  # the lists may be old: fetched anew next time
        raise Skipped(f"apt-get {' '.join(arguments)}: {said(done)}")


def _apt_options(folder: Path) -> list[str]:
    site = _mirror()
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    signed = f" [signed-by={KEYRING}]" if KEYRING.is_file() else ""  # else what apt trusts anyway
    kinds = ((kind, release) for kind in ("deb", "deb-src") for release in (PROGRAMS, OLD))
    lists = folder / "sources.list"
    lists.write_text("".join(f"{kind}{signed} {site} {release} main\n" for kind, release in kinds))
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::SourceList": lists,
        "Dir::Etc::SourceParts": "-",
        "APT::Sandbox::User": "",
    }
    return [part for key, value in options.items() for part in ("-o", f"{key}={value}")]


def _mirror() -> str:
    """Debian's mirror of this machine's own configuration. Raises Skipped."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Skipped("there is no apt here to get Debian's packages with")
    listed = attempt("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(SITE)", "Created-By: Packages")
    for line in listed.stdout.splitlines():
        if line.startswith("Debian|Debian|"):
            return line.rpartition("|")[2]
    raise Skipped("this machine is configured for no Debian mirror (or `apt-get update` has never run)")
