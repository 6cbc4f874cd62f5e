"""Runs the blocks of a page, one after the other, in a folder that looks like the checkout and is thrown away."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Self

import yaml

from tests.docs.blocks import Block, blocks
from tests.triton.server import free_ports

ROOT = Path(__file__).parents[2]
PATIENCE_S, BLOCK_S = 120.0, 600.0
SHOWN = 8080
ADDRESS = re.compile(r"(127\.0\.0\.1|localhost):(\d+)")
PORT = re.compile(r"(--port[ =]|SACCADE_PORT=)(\d+)")
CURL = '#!/bin/sh\nexec {curl} --silent --show-error --fail-with-body --max-time 60 "$@"\n'
# Not followed from the scratch folder: environments, and what a block might write into.
COPIED = ("model_repository",)
LEASH = ["setpriv", "--pdeathsig=TERM"] if shutil.which("setpriv") else []  # a server must not outlive the tests
SERVE = re.compile(r"^((?:[A-Z_]+=\S* +)*)(?:saccade serve|make serve\b.*$)", re.MULTILINE)
UNTOLD = ("", "text", "console", "http", "nginx", "promql", "mermaid", "html")


class Failed(AssertionError):
    def __init__(self, block: Block, told: str) -> None:
        super().__init__(f"{block}:\n{block.text}\n{told}")


class Folder:
    """The checkout as a page's commands see it: links to what is there, a copy of the models, room for more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir()
        for entry in ROOT.iterdir():
            if entry.name.startswith(".") or entry.name == "runs":
                continue
            if entry.name in COPIED:
                shutil.copytree(entry, path / entry.name)
            else:
                (path / entry.name).symlink_to(entry)
        (path / ".venv").symlink_to(sys.prefix)
        self._programs()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path)

    def _programs(self) -> None:
        programs = self.path / ".programs"
        programs.mkdir()
        curl = programs / "curl"
        curl.write_text(CURL.format(curl=shutil.which("curl") or "curl"))
        curl.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SACCADE_")}
        path = f"{self.path / '.programs'}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
        quiet = {"PATH": path, "HOME": str(self.path), "XDG_STATE_HOME": str(self.path / ".state"), "COLUMNS": "100"}
        return kept | quiet | {"SACCADE_THREADS": "1", "SACCADE_BATCH_SIZE": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, script: str, port: int, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                [*LEASH, "bash", "-euo", "pipefail", "-c", script],
                cwd=self.path,
                env=self.environment | {"SACCADE_PORT": str(port)},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def run(self, block: Block, arguments: list[str]) -> None:
        ran = subprocess.run(
            arguments, cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=BLOCK_S
        )
        if (ran.returncode != 0) != block.fails:
            raise Failed(block, f"ended with {ran.returncode}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}")


@contextmanager
def server(folder: Folder, script: str = "exec saccade serve", shown: int = SHOWN) -> Iterator[dict[int, int]]:
    """A real server; the port that the documents show -> the port that it has."""
    [port] = free_ports(1)
    log = folder.path / f"server-{port}.log"
    started = folder.start(PORT.sub(rf"\g<1>{port}", script), port, log)
    try:
        _await(started, port, log)
        yield {shown: port, SHOWN: port}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def _await(started: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """It accepts connections once its model is open."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and started.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


class Page:
    """One page's blocks. `ports` are those of the server that a page finds; a block that serves puts its own there."""

    def __init__(self, page: Path, folder: Folder, ports: dict[int, int]) -> None:
        shown = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
        self.blocks = blocks(shown, page.read_text("utf-8"))
        self.folder, self.ports = folder, ports

    def run(self) -> None:
        """Raises Failed for the first block that does not do what it says."""
        left = list(self.blocks)
        while left:
            block = left.pop(0)
            check(block)
            if block.not_run:
                continue
            if block.serves:
                self._serve(block, left)
                return
            self._run(block)

    def _serve(self, block: Block, rest: list[Block]) -> None:
        """The rest of the page, against the block's own server; another that serves takes its place."""
        named = PORT.search(block.text)
        script = SERVE.sub(r"\1exec saccade serve", block.text)
        with server(self.folder, script, int(named[2]) if named else SHOWN) as ports:
            while rest and not (rest[0].serves and not rest[0].not_run):
                following = rest.pop(0)
                check(following)
                if not following.not_run:
                    self._run(following, ports)
        if rest:
            check(rest[0])
            self._serve(rest[0], rest[1:])

    def _run(self, block: Block, ports: dict[int, int] | None = None) -> None:
        text = ADDRESS.sub(lambda found: self._address(found, ports or self.ports), block.text)
        if block.language == "sh":
            self.folder.run(block, ["bash", "-euo", "pipefail", "-c", text])
        elif block.language == "python":
            file = self.folder.path / ".block.py"
            file.write_text(text)
            self.folder.run(block, [sys.executable, str(file)])

    def _address(self, found: re.Match[str], ports: dict[int, int]) -> str:
        return f"{found[1]}:{ports.get(int(found[2]), found[2])}"


def check(block: Block) -> None:
    """Every block at least parses; commands of our own that are not run are there."""
    try:
        match block.language:
            case "python":
                compile(block.text, str(block), "exec")
            case "sh":
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, capture_output=True)
                _check_commands(block)
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case "yaml":
                list(yaml.safe_load_all(block.text))
            case other if other not in UNTOLD:
                raise Failed(block, f"what is {other!r}? Use sh, python, json, toml, yaml, or one of {UNTOLD}")
    except subprocess.CalledProcessError as error:
        raise Failed(block, error.stderr) from error
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        raise Failed(block, str(error)) from error


def _check_commands(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["saccade"] and words[1:] and words[1].isalpha() and words[1] not in commands():
            raise Failed(block, f"there is no command saccade {words[1]}")
        for first, second in pairwise(words):
            ours = first == "-m" and second.startswith(("saccade", "server", "training", "bench", "tests"))
            if ours and importlib.util.find_spec(second) is None:
                raise Failed(block, f"there is no module {second}")


def commands() -> set[str]:
    """What `saccade` knows."""
    import typer.main

    from saccade.cli import app

    return set(getattr(typer.main.get_command(app), "commands", {}))
