"""What there is to check: every kustomization, and every component in an overlay that it is made for."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from k8s.validation import tools
from k8s.validation.tools import Object

FOLDER = Path(__file__).resolve().parents[1]
# The oldest and newest Kubernetes that the overlays are for; `legacy` is for what is older.
OLDEST, NEWEST = "1.29", "1.37"
LEGACY = ("1.20", "1.24")
IMAGE_VOLUMES_FROM = "1.33"


@dataclass(frozen=True)
class Variant:
    """A kustomization: `folder` of k8s/, with `components` in place of those that it lists, if there are any.

    `versions` of Kubernetes are those that it is checked for.
    """

    folder: str
    components: tuple[str, ...] = ()
    versions: tuple[str, ...] = (OLDEST, NEWEST)

    def __str__(self) -> str:
        return " + ".join((self.folder, *self.components))

    def text(self, root: Path = FOLDER) -> str:
        """The rendered YAML. Raises Failed."""
        if not self.components:
            return render(root / self.folder)
        with tempfile.TemporaryDirectory() as folder:
            copied = copy(root, Path(folder))
            file = copied / self.folder / "kustomization.yaml"
            kustomization = yaml.safe_load(file.read_text())
            kustomization["components"] = [f"../../components/{name}" for name in self.components]
            file.write_text(yaml.safe_dump(kustomization))
            return render(copied / self.folder)

    @cached_property
    def objects(self) -> list[Object]:
        return [found for found in yaml.safe_load_all(self.text()) if found]


VARIANTS = (
    Variant("once"),
    Variant("training"),
    Variant("overlays/cpu"),
    Variant("overlays/gpu"),
    Variant("overlays/dev"),
    Variant("overlays/cpu", ("keda", "ingress")),
    Variant("overlays/gpu", ("triton", "image-volume"), (IMAGE_VOLUMES_FROM, NEWEST)),
    Variant("overlays/legacy", versions=LEGACY),
)


def renderer() -> tuple[str, ...]:
    """The command that renders a kustomization: this machine's kubectl or kustomize, else Debian's. Raises Skipped."""
    kubectl = shutil.which("kubectl")
    if kubectl and "Kustomize Version: v5" in tools.attempt(kubectl, "version", "--client").stdout:
        return (kubectl, "kustomize")
    return (str(tools.program("kustomize", "kustomize")), "build")


def copy(root: Path, into: Path) -> Path:
    """The manifests once more, to change something in them."""
    return Path(shutil.copytree(root, into / root.name, ignore=shutil.ignore_patterns("__pycache__")))


def render(folder: Path) -> str:
    return tools.run(*renderer(), folder)


def named(found: Object) -> str:
    return f"{found['kind']} {found['metadata']['name']}"
