"""Runs inside a build. Writes what an image is made of, as CycloneDX 1.6: Python packages, Debian packages, models.

Usage: sbom.py ENVIRONMENT [--models REPOSITORY]    writes ENVIRONMENT/share/sbom.cdx.json; fails if it is not valid
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

DPKG = Path("/var/lib/dpkg")
OS_RELEASE = Path("/etc/os-release")
INSTALLED = "install ok installed"


def python_packages(environment: Path) -> dict[str, Any]:
    """A whole document, with the environment's packages and how they depend on one another."""
    tool, python = Path(sys.executable).parent / "cyclonedx-py", environment / "bin" / "python"
    command = [str(tool), "environment", "--output-reproducible", "--output-file", "-", str(python)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    document: dict[str, Any] = json.loads(made.stdout)
    return document


def debian_packages(dpkg: Path, distribution: str) -> Iterator[dict[str, Any]]:
    """The base image's installed packages: one file, or in images without dpkg itself a file for each package."""
    apart = dpkg / "status.d"
    files = [dpkg / "status", *(sorted(apart.iterdir()) if apart.is_dir() else [])]
    for paragraph in "\n\n".join(file.read_text("utf-8") for file in files if file.is_file()).split("\n\n"):
        field = dict(re.findall(r"^(Package|Version|Architecture|Status): (.+)$", paragraph, re.MULTILINE))
        if "Package" in field and field.get("Status", INSTALLED) == INSTALLED:
            name, version = field["Package"], field["Version"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe=':')}"
            purl += f"?arch={field['Architecture']}&distro={distribution}"
            yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def models(repository: Path) -> Iterator[dict[str, Any]]:
    """The graphs of a model repository."""
    for graph in sorted(repository.glob("*/*/model.*")):
        name, version = graph.parts[-3:-1]
        with graph.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        yield {
            "type": "machine-learning-model",
            "bom-ref": f"model:{name}/{version}/{graph.name}",
            "name": name,
            "version": version,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }


def distribution(os_release: Path) -> str:
    """Such as debian-12."""
    field = dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)"?$', os_release.read_text("utf-8"), re.MULTILINE))
    return "-".join(field[name] for name in ("ID", "VERSION_ID") if name in field)


def check(text: str) -> None:
    """Raises ValueError if it is not a document of CycloneDX."""
    from cyclonedx.schema import SchemaVersion  # in the image build's tools alone
    from cyclonedx.validation.json import JsonStrictValidator

    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if fault is not None:
        raise ValueError(f"not valid CycloneDX: {fault}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("environment", type=Path)
    parser.add_argument("--models", type=Path)
    given = parser.parse_args()
    document = python_packages(given.environment)
    document["components"] += debian_packages(DPKG, distribution(OS_RELEASE))
    document["components"] += models(given.models) if given.models else ()
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    check(text)
    out = given.environment / "share" / "sbom.cdx.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
