"""Run the checks and say which ran, which were skipped and why, and what failed. Exits with 1 if one failed.

k8s/validate             everything that needs no more than a few downloads, and the control plane if it is built
k8s/validate --build     build the control plane first, if it is not: about 10 minutes of two cores, once
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from k8s.validation import tools
from k8s.validation.tools import Failed, Skipped

WIDTH = 24


def main() -> None:
    parser = argparse.ArgumentParser(prog="k8s/validate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--build", action="store_true", help="build the control plane, if it is not built yet")
    build = parser.parse_args().build
    try:
        tools.reenter()
    except Skipped as reason:
        _say("FAILED", "environment", str(reason))
        sys.exit(1)
    outcomes = list(_checks(build))
    counts = {outcome: outcomes.count(outcome) for outcome in ("ran", "skipped", "FAILED")}
    sys.stdout.write(", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + "\n")
    sys.exit(1 if counts["FAILED"] else 0)


def _checks(build: bool) -> Iterator[str]:
    from k8s.validation import live, offline, plane

    yield _one("rendering", offline.rendering)
    yield _one("schemas", offline.schemas)
    yield _one("custom resources", offline.custom_resources)
    yield _one("alert rules", offline.alerts)
    if not build and plane.built() is None:
        for name in live.CHECKS:
            yield _say("skipped", name, "there is no control plane here; `k8s/validate --build` builds one")
        return
    try:
        with plane.running() as running:
            for name, check in live.CHECKS.items():
                yield _one(name, partial(check, running))
    except (Skipped, Failed) as reason:
        yield _say("FAILED" if isinstance(reason, Failed) else "skipped", "control plane", str(reason))


def _one(name: str, check: Callable[[], str]) -> str:
    began = time.monotonic()
    try:
        told = check()
    except Skipped as reason:
        return _say("skipped", name, str(reason))
    except Failed as reason:
        return _say("FAILED", name, str(reason))
    return _say("ran", name, f"{told} ({time.monotonic() - began:.1f} s)")


def _say(outcome: str, name: str, told: str) -> str:
    first, *rest = told.splitlines()
    lines = [f"{outcome:8} {name:{WIDTH}} {first}", *(f"{'':{WIDTH + 10}}{line}" for line in rest)]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return outcome


if __name__ == "__main__":
    main()
