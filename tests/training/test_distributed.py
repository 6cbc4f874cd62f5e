"""Real processes: killed at random moments, on a disk that is full, fewer or more than before, and under torchrun.

The processes are forked by `tests.training.tiny`. A full disk is made with RLIMIT_FSIZE, by which the kernel refuses
writes as it does there (EFBIG in place of ENOSPC).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.tiny import STEPS
from training.loop import checkpoint

ROOT = Path(__file__).parents[2]
FIGURES = ("step", "samples", "loss", "gradient", "lr", "size")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Scenarios, each played once."""
    out, told = tmp_path_factory.mktemp("processes"), dict[str, str]()

    def play(*scenarios: str) -> Path:
        for name in scenarios:
            if name not in told:
                told[name] = started([sys.executable, "-m", "tests.training.tiny", str(out), name])
        return out / scenarios[-1]

    play.told = told  # type: ignore[attr-defined]
    return play


def started(command: list[str], **environment: str) -> str:
    """What the processes said."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def weights(run: Path) -> dict[str, Tensor]:
    """Those of the last step, and their averages."""
    parts = ((which, *checkpoint.read(run, which)) for which in ("model", "average"))  # type: ignore[arg-type]
    found = {}
    for which, state, facts in parts:
        assert facts["step"] == STEPS
        found |= {f"{which}.{name}": value for name, value in state.items()}
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


@pytest.mark.parametrize("number", ["one", "two"])
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_never_killed(played: Any, number: str) -> None:
    out = played(number)
    assert played.told[number].count("killed") == 3
    assert_same(out / "whole", out / "killed")
    whole, killed = ([[row[name] for name in FIGURES] for row in rows(out / name)] for name in ("whole", "killed"))
    assert killed == whole  # no row twice, none missing
    files = [sorted(p.name for p in checkpoint.find(out / name).rglob("*.safetensors")) for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert len(files[0]) == 3 * {"one": 1, "two": 2}[number]


def test_every_process_keeps_its_own_shard(played: Any) -> None:
    folder = checkpoint.find(played("two") / "whole")
    shards = [
        torch.tensor(list(file.stat().st_size for file in (folder / part).iterdir())) for part in ("model", "average")
    ]
    assert all(float(sizes.min() / sizes.max()) > 0.4 for sizes in shards)


@pytest.mark.parametrize("order", ["one-then-two", "two-then-one"])
def test_other_numbers_of_processes_go_on_from_a_checkpoint(played: Any, order: str) -> None:
    """The parts of a step are the same, whoever computes them; only sums are rounded otherwise."""
    out, whole = played(order), played("two") / "whole"
    state = json.loads((checkpoint.find(out) / "state.json").read_text())
    assert (state["step"], state["world"]) == (STEPS, {"one-then-two": 2, "two-then-one": 1}[order])
    mine, theirs = weights(out), weights(whole)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-3)
    for row, other in zip(rows(out), rows(whole), strict=True):
        assert [row[name] for name in ("step", "samples", "lr")] == [other[name] for name in ("step", "samples", "lr")]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_experts_learn_the_same_in_two_processes(played: Any) -> None:
    """Sums are rounded otherwise, and AdamW's first steps are as long for a small gradient as for a large one."""
    out = played("experts")
    (one, _), (two, _) = (checkpoint.read(out / name, "model") for name in ("1", "2"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        off = (value - two[name]).abs()
        assert float(off.mean()) < 1e-5, name
    for row, other in zip(*(rows(out / name) for name in ("1", "2")), strict=True):
        for name in ("loss", "gradient", "balance"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)


def test_what_two_processes_wrote_is_what_one_reads(played: Any, tmp_path: Path) -> None:
    """Read by one process, written by it, read again."""
    run = played("two") / "whole"
    state, facts = checkpoint.read(run, "model")
    checkpoint.write_weights(tmp_path, state, "tiny", facts["about"])
    again, _ = checkpoint.read(tmp_path, "model")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(("name", "like"), [("full", "one"), ("full-two", "two")])
def test_the_last_checkpoint_survives_a_full_disk_and_so_does_the_run(played: Any, name: str, like: str) -> None:
    out, whole = played(name), played(like) / "whole"
    before, during = (out / "survived").read_text().split()
    assert before == during
    assert "no checkpoint at step" in played.told[name]
    assert_same(out, whole)
    failed = [row for row in rows(out) if row.get("event") == "no checkpoint"]
    assert failed
    assert {row["last"] for row in failed} == {int(before.removeprefix("step-"))}
    figures = [[row[key] for key in FIGURES] for row in rows(out) if "loss" in row]
    assert figures == [[row[key] for key in FIGURES] for row in rows(whole)]
    assert not list((out / "checkpoints").glob("*.part"))


def test_torchrun_starts_a_killed_process_again(played: Any, tmp_path: Path) -> None:
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    told = started(
        [sys.executable, "-m", "torch.distributed.run", *options, "--module", "tests.training.tiny"],
        TINY_OUT=str(tmp_path),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert re.search(r"exitcode: -9|Signal 9|SIGKILL", told)
    assert_same(tmp_path, played("two") / "whole")
