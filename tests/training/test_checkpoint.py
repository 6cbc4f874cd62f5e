"""Checkpoints: what is kept, what is read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saccade.errors import ModelError
from tests.training.tiny import CONFIG, Tiny
from training.loop import Loop, checkpoint

OFTEN = replace(CONFIG, steps=6, checkpoint_s=0.0)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a checkpoint of each, of which three stay."""
    out = tmp_path_factory.mktemp("kept")
    Loop(Tiny(), replace(OFTEN, keep=3), out, "tiny", {"width": 16}).run()
    return out


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(kept, tmp_path / "run"))


def test_the_newest_stay(kept: Path) -> None:
    assert [folder.name for folder in checkpoint.all_of(kept)] == [f"step-{step:08d}" for step in (4, 5, 6)]


def test_a_checkpoint_is_safetensors_and_json(kept: Path) -> None:
    assert {file.suffix for file in (kept / "checkpoints").rglob("*") if file.is_file()} == {".json", ".safetensors"}
    folder = checkpoint.find(kept)
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["samples"], state["world"], state["torch"]) == (6, 48, 1, torch.__version__)
    for name, digest in state["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    names = set(load_file(next((folder / "optimizer").iterdir())))
    assert {"gain.step", "gain.exp_avg", "gain.exp_avg_sq"} <= names
    assert not any(name.startswith("base") for name in names)


def test_weights_are_read_of_any_step(kept: Path) -> None:
    weights, facts = checkpoint.read(kept, "model", step=4)
    assert weights["met"] == facts["step"] == 4
    assert facts["samples"] == 32
    assert facts["stage"] == "tiny"
    assert facts["about"] == {"width": 16}
    assert facts["loop"]["lr"] == CONFIG.lr
    assert not torch.equal(weights["out.weight"], checkpoint.read(kept, "model")[0]["out.weight"])
    assert not torch.equal(weights["out.weight"], checkpoint.read(kept, "average", step=4)[0]["out.weight"])


def test_weights_alone_are_read_and_not_resumed(tmp_path: Path) -> None:
    weights = {name: value for name, value in Tiny().model.state_dict().items()}
    checkpoint.write_weights(tmp_path, weights, "import", {"of": "somewhere"})
    for which in ("model", "average"):
        read, facts = checkpoint.read(tmp_path, which)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert (facts["stage"], facts["about"], facts["step"]) == ("import", {"of": "somewhere"}, 0)
    with pytest.raises(ModelError, match="weights alone"):
        Loop(Tiny(), OFTEN, tmp_path, "import", {})


def test_half_a_checkpoint_is_none(run: Path) -> None:
    """What a kill leaves: a folder that has not got its name, and one that is being dropped."""
    shutil.copytree(checkpoint.find(run), run / "checkpoints" / "step-00000009.part")
    being_dropped = Path(shutil.copytree(checkpoint.find(run), run / "checkpoints" / "step-00000008"))
    (being_dropped / "state.json").unlink()
    assert checkpoint.find(run).name == "step-00000006"
    assert checkpoint.read(run)[1]["step"] == 6
    Loop(Tiny(), replace(OFTEN, steps=7), run, "tiny", {}).run()
    assert [folder.name for folder in checkpoint.all_of(run)] == ["step-00000006", "step-00000007"]
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000006", "step-00000007"]


def file_of(run: Path, part: str = "model") -> Path:
    return next((checkpoint.find(run) / part).iterdir())


def flipped(run: Path) -> None:
    file = file_of(run)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def state_with(run: Path, **changes: object) -> None:
    file = checkpoint.find(run) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def resealed(run: Path, file: Path) -> None:
    """The state says that the file is right."""
    folder = checkpoint.find(run)
    files = json.loads((folder / "state.json").read_text())["files"]
    files[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    state_with(run, files=files)


def shifted(run: Path) -> None:
    """A tensor that says of itself that it begins far beyond its beginning."""
    file = file_of(run)
    with safe_open(file, "pt") as stored:
        said = stored.metadata()
    pieces = json.loads(said["DCP_SHARDING_INFO"])
    pieces["out.weight"]["saved_offsets"] = [10**12, 0]
    save_file(load_file(file), file, said | {"DCP_SHARDING_INFO": json.dumps(pieces)})
    resealed(run, file)


def garbage(run: Path) -> None:
    file_of(run).write_bytes(b"\x80\x04\x95 not a tensor")
    resealed(run, file_of(run))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flipped, "not as it was written; delete"),
    "an end": (lambda run: file_of(run).write_bytes(file_of(run).read_bytes()[:-100]), "not as it was written"),
    "a file less": (lambda run: file_of(run).unlink(), "is missing"),
    "a file more": (lambda run: (file_of(run).parent / "more.safetensors").touch(), "not of this checkpoint"),
    "no tensors": (garbage, "cannot be read"),
    "pieces that are no whole": (shifted, "out.weight is not whole"),
    "state that is no JSON": (lambda run: (checkpoint.find(run) / "state.json").write_text("{"), "cannot be read"),
    "state that is a list": (lambda run: (checkpoint.find(run) / "state.json").write_text("[]"), "not a table"),
    "a state without files": (lambda run: state_with(run, files=3), "files is missing or malformed"),
    "a state of another time": (lambda run: state_with(run, format=9), "format 9"),
    "no configuration": (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    "a configuration of nothing": (lambda run: (run / "config.json").write_text("{}"), "needs a stage"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_was_tampered_with_is_refused_in_one_line(run: Path, what: str) -> None:
    spoil, message = SPOILT[what]
    spoil(run)
    with pytest.raises(ModelError, match=message) as refused:
        checkpoint.read(run, "model")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["a bit", "a file less", "no tensors", "pieces that are no whole"])
def test_a_run_does_not_go_on_from_it(run: Path, what: str) -> None:
    SPOILT[what][0](run)
    with pytest.raises(ModelError, match=SPOILT[what][1]):
        Loop(Tiny(), OFTEN, run, "tiny", {})


def test_a_run_does_not_go_on_as_another_model(run: Path) -> None:
    with pytest.raises(ModelError, match=r"another model: .* is \[16, .*, not \[8, "):
        Loop(Tiny(width=8), OFTEN, run, "tiny", {})
    objective = Tiny()
    del objective.model.blocks[1]
    with pytest.raises(ModelError, match=r"another model: blocks\.1"):
        Loop(objective, OFTEN, run, "tiny", {})


def test_a_step_that_is_not_there_is_named(kept: Path) -> None:
    with pytest.raises(ModelError, match="no checkpoint of step 3"):
        checkpoint.read(kept, step=3)
