"""Foreign files: every key accounted for, every fault told in a line, no pickle executed."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saccade.errors import InvalidInput, ModelError
from training.importers import keys
from training.importers.load import load
from training.importers.reading import locate, read_state

GOLDEN = Path(__file__).parents[1] / "golden"
State = dict[str, torch.Tensor]


def weights(name: str = "dit") -> State:
    """Under their own keys."""
    found = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix("weights/"): value for key, value in found.items() if key.startswith("weights/")}


class Bomb:
    """What a pickle can do to whoever loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, write in (("zip.pt", torch.save), ("bare.pth", lambda o, f: f.write_bytes(pickle.dumps(o)))):
        file = tmp_path / name
        write({"x_embedder.proj.weight": Bomb(mark)}, file)
        with pytest.raises(ModelError, match=name):
            read_state(file)
    assert not mark.exists()


@pytest.mark.parametrize("wrapper", ["ema", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_what_training_scripts_wrap_around_weights_is_taken_off(tmp_path: Path, wrapper: str, prefix: str) -> None:
    state = {prefix + key: value for key, value in weights().items()}
    file = tmp_path / "0400000.pt"
    torch.save({wrapper: state, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model="DiT-S/2")}, file)
    assert read_state(file).keys() == weights().keys()


def test_the_averaged_weights_are_preferred(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}, file)
    assert read_state(file)["a"].item() == 1


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    save_file({"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2, dtype=torch.bfloat16)}, file)
    assert {value.dtype for value in read_state(file).values()} == {torch.float32}


def write_cut(file: Path) -> None:
    save_file(weights(), file)
    file.write_bytes(file.read_bytes()[:-100])


def write_lying_header(file: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def write_empty_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w"):
        pass


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": ("a.safetensors", lambda f: f.write_bytes(b"")),
    "noise": ("a.safetensors", lambda f: f.write_bytes(os.urandom(500))),
    "cut": ("a.safetensors", write_cut),
    "a header that lies": ("a.safetensors", write_lying_header),
    "no weights": ("a.safetensors", lambda f: save_file({}, f)),
    "empty pickle": ("a.pt", lambda f: f.write_bytes(b"")),
    "noise in a pickle": ("a.pt", lambda f: f.write_bytes(b"\x80\x02" + os.urandom(300))),
    "an empty zip": ("a.pt", write_empty_zip),
    "a list": ("a.pt", lambda f: torch.save([torch.zeros(2)], f)),
    "no tensors": ("a.pt", lambda f: torch.save({"a": 3}, f)),
    "numbered": ("a.pt", lambda f: torch.save({1: torch.zeros(2)}, f)),
    "sparse": ("a.pt", lambda f: torch.save({"a": torch.eye(3).to_sparse()}, f)),
    "not finite": ("a.safetensors", lambda f: save_file({"a": torch.tensor([1.0, float("nan")])}, f)),
    "another ending": ("a.txt", lambda f: f.write_text("weights")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_in_a_line(tmp_path: Path, case: str) -> None:
    name, write = BROKEN[case]
    write(tmp_path / name)
    with pytest.raises(ModelError) as told:
        load(tmp_path / name)
    assert "\n" not in str(told.value)
    assert name in str(told.value)


def test_shards_are_read_by_their_index_and_only_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.full((1,), float(number))}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}}))
    assert {key: value.item() for key, value in read_state(folder).items()} == {"w0": 0, "w1": 1}

    save_file({"w0": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"w0": "../outside.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        read_state(folder)
    index.write_text(json.dumps({"weight_map": {"w0": names[0], "w2": names[1]}}))
    with pytest.raises(ModelError, match="disagree on w1, w2"):
        read_state(folder)
    index.write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read"):
        read_state(folder)


def saved(tmp_path: Path, state: State) -> Path:
    file = tmp_path / "w.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return file


def test_keys_that_no_rule_knows_are_listed(tmp_path: Path) -> None:
    state = weights() | {"blocks.0.attn.q_norm.weight": torch.ones(16), "lora.up": torch.ones(1)}
    with pytest.raises(ModelError, match=r"no such keys: blocks\.0\.attn\.q_norm\.weight, lora\.up"):
        load(saved(tmp_path, state), heads=4)


def test_keys_that_are_missing_are_listed(tmp_path: Path) -> None:
    state = weights()
    del state["blocks.1.attn.proj.bias"], state["t_embedder.mlp.2.weight"]
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.proj\.bias, t_embedder|t_embedder.*blocks\.1\.attn"):
        load(saved(tmp_path, state), heads=4)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    state = weights() | {"blocks.1.mlp.fc1.weight": torch.ones(255, 64)}
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        load(saved(tmp_path, state), heads=4)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    state = {key: value for key, value in weights("dit_moe").items() if "blocks.1.moe.experts.2.up" not in key}
    with pytest.raises(ModelError, match=r"blocks\.1\.moe\.experts\.up_proj\.weight the parts 2 are missing"):
        load(saved(tmp_path, state), heads=4)


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    state = weights()
    state["pos_embed"] = state["pos_embed"] + 1e-3
    with pytest.raises(ModelError, match="learned positions"):
        load(saved(tmp_path, state), heads=4)


def test_heads_must_be_told_where_weights_do_not() -> None:
    from training.importers.shapes import heads_of

    assert heads_of(1152, 28, None) == 16
    assert heads_of(384, 12, None) == 6
    assert heads_of(1152, 28, 8) == 8
    with pytest.raises(InvalidInput, match="heads"):
        heads_of(64, 2, None)


def test_a_kind_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, weights())
    assert keys.detect(weights()) == "meta-dit"
    for kind in ("dit-moe", "generalist"):
        with pytest.raises(ModelError):
            load(file, kind, heads=4)
    with pytest.raises(InvalidInput, match="kind must be one of"):
        load(file, "sdxl")
    with pytest.raises(InvalidInput, match="takes no head"):
        load(file, head=4)
    with pytest.raises(ModelError, match="of no kind that is known"):
        load(saved(tmp_path, {"lm_head.weight": torch.ones(2)}))


@pytest.mark.parametrize("place", ["nowhere", "/nowhere/at/all", "../../etc/passwd/x", "a/b/c"])
def test_a_place_that_is_not_there(place: str) -> None:
    with pytest.raises(ModelError, match="no file or folder"):
        locate(place)


def test_a_schedule_told_by_hand_is_checked(tmp_path: Path) -> None:
    file = saved(tmp_path, weights())
    about = load(file, heads=4, schedule="cosine", prediction="v_prediction", zero_terminal_snr=True).about
    assert about is not None
    assert about["classes"]["diffusion"]["schedule"] == "cosine"
    for told in ({"schedule": "sigmoid"}, {"zero_terminal_snr": True}, {"schedule": "cosine", "beta_start": 0.1}):
        with pytest.raises(InvalidInput):
            load(file, heads=4, **told)
