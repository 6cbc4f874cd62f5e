"""What a figure's reader must know of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe(*packages: str) -> str:
    """One line: processor, cores this process may use, Python and the packages' versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
        cpu = next(named, cpu)
    cores = f"{len(os.sched_getaffinity(0))} cores"
    return ", ".join([cpu, cores, f"Python {platform.python_version()}", *map(_version, packages)])


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"
