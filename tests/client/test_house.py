"""The rooms and the arrows between them, and what a server's process holds."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from saccade import calls, errands, render, tasks
from saccade.pipeline import Options

ROOT = Path(__file__).parents[2]
PORCH = (Path("saccade/cli.py"), Path("saccade/researching.py"))  # the command, and those of its commands that train
# OpenCV is heavy: it is in a process of its own, or in the one module that is imported when it is asked for.
ALLOWED = {"saccade/formats/ffmpeg.py": {"cv2"}, "server/cutout.py": {"cv2"}}


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def modules(room: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / room).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("room", "closed"),
    [
        ("saccade", {"server", "training", "torch", "diffusers", "fastapi", "starlette", "cv2"}),
        ("server", {"training", "torch", "diffusers", "cv2"}),
        ("training", {"server"}),
    ],
)
def test_arrows_point_one_way(room: str, closed: set[str]) -> None:
    found = list(modules(room))
    assert found
    inner = [(path, tree) for path, tree in found if path not in PORCH]
    wrong = {str(path): (set(imports(tree)) & closed) - ALLOWED.get(str(path), set()) for path, tree in inner}
    assert not {path: names for path, names in wrong.items() if names}


@pytest.mark.parametrize("porch", PORCH, ids=str)
def test_the_porch_opens_the_wings_only_when_asked(porch: Path) -> None:
    tree = ast.parse((ROOT / porch).read_text("utf-8"))
    outside = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not {"server", "training"} & {name for node in outside for name in imports(node)}


@pytest.mark.parametrize("module", ["saccade", "saccade.pipeline", "saccade.local", "saccade.client", "server.app"])
def test_serving_never_loads_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'diffusers', 'training', 'cv2'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_the_command_starts_without_what_it_may_not_need() -> None:
    heavy = {"numpy", "PIL", "httpx", "fastapi", "onnxruntime", "openvino", "rich", "pydantic_settings"}
    code = f"import sys, saccade.cli; print(*sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_what_the_command_knows_by_heart_is_still_true() -> None:
    assert set(errands.FORMATS) == set(get_args(render.Format))
    assert set(get_args(errands.Task)) == set(get_args(tasks.TaskName))
    assert calls.Choices.__annotations__.keys() == {field.name for field in dataclasses.fields(Options)}
