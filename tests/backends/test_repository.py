from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from saccade.card import PARAMETER
from saccade.errors import ModelError
from saccade.repository import (
    Repository,
    Tensor,
    find_repository,
    read_config,
    readable,
    replace_card,
    write_config,
)
from tests import toy


@pytest.fixture
def path(toy_repository: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(toy_repository, tmp_path / "models"))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_a_repository_knows_its_models(path: Path) -> None:
    repository = Repository(path)
    assert repository.models() == ["toy", "toy-decoder", "toy-encoder"]
    assert repository.denoisers() == ["toy"]
    assert repository.default() == "toy"
    assert repository.card("toy").tasks["depth"].label == toy.LABELS["depth"]
    repository.verify(repository.card("toy"))


def test_a_written_configuration_says_everything_triton_must_know(path: Path) -> None:
    config = Repository(path).config("toy")
    assert (config.name, config.backend, config.max_batch_size) == ("toy", "onnxruntime", 16)
    assert config.dynamic_batching.max_queue_delay_microseconds <= 1000
    assert not config.dynamic_batching.priority_levels
    assert not config.dynamic_batching.preferred_batch_size
    assert config.instance_group[0].count == 1
    shapes = {tensor.name: (list(tensor.dims), tensor.HasField("reshape")) for tensor in config.input}
    assert shapes["latent"] == ([toy.LATENT, -1, -1], False)
    assert shapes["timestep"] == shapes["task"] == ([1], True)
    assert [tensor.name for tensor in config.output] == ["prediction"]


def test_a_card_survives_the_way_through_protobuf_text(path: Path) -> None:
    repository = Repository(path)
    awkward = repository.card("toy").model_copy(update={"summary": 'it\'s "quoted" \\ é\n\tdone'})
    toy.write(path, "toy", awkward)
    assert repository.card("toy") == awkward
    assert max(map(len, (path / "toy/config.pbtxt").read_text().splitlines())) < 160


def test_readable_json_is_the_same_json() -> None:
    value = {
        "list": [{"a": 1.5, "b": "x" * 70}] * 3,
        "empty": {},
        "nothing": [],
        "deep": [[list(range(60))]],
        "n": None,
    }
    lines = readable(value)
    assert json.loads("\n".join(lines)) == value
    assert '  "empty": {},' in lines


def test_the_highest_version_is_served(path: Path) -> None:
    for version in ("2", "10"):
        shutil.copytree(path / "toy/1", path / "toy" / version)
    for stranger in ("03", "x", "-5", "99.bak"):
        (path / "toy" / stranger).mkdir()
    assert Repository(path).graph("toy") == (path / "toy/10/model.onnx").resolve()


def test_two_models_must_be_named(path: Path, tmp_path: Path) -> None:
    other = toy.build(tmp_path / "other", name="second")
    for model in other.iterdir():
        model.rename(path / model.name)
    with pytest.raises(ModelError, match="name one of second, toy"):
        Repository(path).default()


def test_a_repository_without_a_card_says_where_cards_live(tmp_path: Path) -> None:
    write_config(tmp_path, "plain", [Tensor("x", (3,))], [Tensor("y", (3,))], 4)
    assert Repository(tmp_path).models() == ["plain"]
    with pytest.raises(ModelError, match=PARAMETER):
        Repository(tmp_path).default()
    with pytest.raises(ModelError, match=PARAMETER):
        Repository(tmp_path).card("plain")


@pytest.mark.parametrize("name", ["../toy", "..", ".", "", "toy/1", "/etc", "toy\x00", "toy\n", "a" * 200, ".hidden"])
def test_a_name_cannot_lead_anywhere_else(path: Path, name: str) -> None:
    repository = Repository(path)
    for ask in (repository.config, repository.card, repository.graph):
        with pytest.raises(ModelError, match="not a model name"):
            ask(name)


@pytest.mark.parametrize("which", ["toy", "toy/config.pbtxt", "toy/1", "toy/1/model.onnx"])
def test_links_do_not_lead_out_of_the_repository(path: Path, tmp_path: Path, which: str) -> None:
    (path / which).rename(tmp_path / "outside")
    (path / which).symlink_to(tmp_path / "outside")
    repository = Repository(path)
    with pytest.raises(ModelError, match="leads out of the repository"):
        (repository.config("toy"), repository.graph("toy"))


def test_links_within_the_repository_are_followed(path: Path) -> None:
    (path / "toy/1").rename(path / "toy/..data")
    (path / "toy/1").symlink_to("..data")
    assert Repository(path).graph("toy").is_file()


@pytest.mark.parametrize(
    "text",
    [
        'name: "toy',
        "max_batch_size: many",
        "max_batch_size: 99999999999999999999",
        "unheard_of: 1",
        "input {",
        "parameters { key: \"saccade_card\" value { string_value: '\\xff' } }",
        "{" * 5000,
    ],
)
def test_a_malformed_configuration_is_named(path: Path, text: str) -> None:
    (path / "toy/config.pbtxt").write_text(text)
    with pytest.raises(ModelError, match=r"toy/config\.pbtxt"):
        Repository(path).denoisers()


def test_a_configuration_that_is_no_text_is_refused(path: Path) -> None:
    (path / "toy/config.pbtxt").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ModelError, match="cannot be read"):
        Repository(path).config("toy")


def test_an_endless_configuration_is_refused_unread(path: Path) -> None:
    with (path / "toy/config.pbtxt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="bytes"):
        Repository(path).config("toy")


@pytest.mark.parametrize("which", ["config.pbtxt", "1/model.onnx"])
def test_what_is_not_a_file_is_not_opened(path: Path, which: str) -> None:
    """Opening a pipe waits for ever."""
    (path / "toy" / which).unlink()
    os.mkfifo(path / "toy" / which)
    repository = Repository(path)
    with pytest.raises(ModelError, match="is not a file"):
        repository.config("toy") if which == "config.pbtxt" else repository.graph("toy")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"licence": "Apache-2.0"', '"licence": 7', "licence"),
        ('"version": 1', '"version": 9', "version"),
        ('"name": "toy"', '"name": "other"', "other"),
        ('"version": 1,', '"surprise": 1,', "surprise"),
        ('"timesteps": 1000', '"timesteps": -1', "timesteps"),
        ('"context": 0.5', '"contest": 0.5', "contest"),
        ('"scale": 0.5', '"scale": 0', "scale"),
        ("'{'", "'{{'", "card is malformed"),
    ],
)
def test_a_malformed_card_says_what_is_wrong(path: Path, old: str, new: str, told: str) -> None:
    edit(path / "toy/config.pbtxt", old, new)
    with pytest.raises(ModelError, match=told):
        Repository(path).card("toy")


def test_a_configuration_of_another_model_is_refused(path: Path) -> None:
    edit(path / "toy/config.pbtxt", 'name: "toy"', 'name: "tow"')
    with pytest.raises(ModelError, match="'tow'"):
        Repository(path).config("toy")


@pytest.mark.parametrize("which", ["toy", "toy-encoder", "toy-decoder"])
def test_changed_weights_are_found_out(path: Path, which: str) -> None:
    file = path / which / "1/model.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    repository = Repository(path)
    with pytest.raises(ModelError, match=rf"{which}: .*sha256"):
        repository.verify(repository.card("toy"))


def test_weights_beside_the_graph_need_a_digest_of_their_own(path: Path) -> None:
    (path / "toy/1/model.onnx.data").write_bytes(b"weights")
    repository = Repository(path)
    card = repository.card("toy")
    with pytest.raises(ModelError, match=r"no digest of model\.onnx\.data"):
        repository.verify(card)
    digests = card.digests | {"toy/model.onnx.data": hashlib.sha256(b"weights").hexdigest()}
    repository.verify(card.model_copy(update={"digests": digests}))
    (path / "toy/1/model.onnx.data").write_bytes(b"other weights")
    with pytest.raises(ModelError, match=r"toy/model\.onnx\.data: .*sha256"):
        repository.verify(card.model_copy(update={"digests": digests}))


@pytest.mark.parametrize("key", ["toy/../../../secret", "../toy", "toy/1/model.onnx", "nobody"])
def test_a_digest_cannot_point_elsewhere(path: Path, key: str) -> None:
    (path.parent / "secret").write_text("x")
    repository = Repository(path)
    card = repository.card("toy")
    with pytest.raises(ModelError, match=r"not a model name|leads out|has no"):
        repository.verify(card.model_copy(update={"digests": {key: "0" * 64}}))


@pytest.mark.parametrize("missing", ["toy/1/model.onnx", "toy/1", "toy"])
def test_what_is_missing_is_named(path: Path, missing: str) -> None:
    gone = path / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(ModelError, match=missing.removesuffix("/1")):
        Repository(path).graph("toy")


def test_a_missing_repository_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        Repository(tmp_path / "nowhere")


def test_where_a_repository_is_looked_for(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "model_repository").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.delenv("SACCADE_MODEL_REPOSITORY", raising=False)
    assert find_repository() == Path("model_repository")
    monkeypatch.setenv("SACCADE_MODEL_REPOSITORY", str(path))
    assert find_repository() == path
    assert find_repository(here) == here
    with pytest.raises(ModelError, match="not a directory"):
        find_repository(tmp_path / "nowhere")
    monkeypatch.setenv("SACCADE_MODEL_REPOSITORY", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="not a directory"):
        find_repository()


def test_a_configuration_that_triton_could_not_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bad"):
        write_config(tmp_path, "bad", [Tensor('x" } boom', (3,))], [Tensor("y", (3,))], 4)
    with pytest.raises(ModelError, match="not a model name"):
        write_config(tmp_path, "../bad", [Tensor("x", (3,))], [Tensor("y", (3,))], 4)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_may_leave_the_name_to_its_directory() -> None:
    assert read_config("max_batch_size: 3", "any").max_batch_size == 3


def test_a_models_digest_changes_with_any_of_its_files(tmp_path: Path) -> None:
    card = Repository(toy.build(tmp_path / "repository")).card("toy")
    others = [card.model_copy(update={"digests": card.digests | {name: "0" * 64}}) for name in card.digests]
    assert len({card.digest, *(other.digest for other in others)}) == 4
    assert card.model_copy(update={"digests": {}}).digest == ""


def test_a_card_is_replaced_and_nothing_else(path: Path) -> None:
    before = Repository(path).config("toy")
    card = Repository(path).card("toy").model_copy(update={"summary": 'it\'s \\ "quoted"'})
    replace_card(path, "toy", card)
    after = Repository(path).config("toy")
    assert Repository(path).card("toy") == card
    for config in (before, after):
        del config.parameters[PARAMETER]
    assert before == after
    assert before.model_warmup[0].inputs["latent"].dims == [8, 8, 8]


@pytest.mark.parametrize("added", ['parameters { key: "other" value { string_value: "x" } }\n', None])
def test_a_card_that_is_not_at_the_end_is_not_replaced(path: Path, added: str | None) -> None:
    file = path / "toy/config.pbtxt"
    card = Repository(path).card("toy")
    text = file.read_text()
    file.write_text(text + added if added else text.replace("parameters {\n  key", "parameters { key"))
    with pytest.raises(ModelError, match="does not end with its card"):
        replace_card(path, "toy", card)


def test_a_warm_up_has_the_sizes_of_a_picture(tmp_path: Path) -> None:
    inputs = [Tensor("image", (3, -1, -1)), Tensor("detail", (5, -1, -1), cell=8), Tensor("task", (), "INT64")]
    write_config(tmp_path, "x", inputs, [], 4, warm_up_px=64)
    [sample] = Repository(tmp_path).config("x").model_warmup
    assert {name: list(given.dims) for name, given in sample.inputs.items()} == {
        "image": [3, 64, 64],
        "detail": [5, 8, 8],
        "task": [1],
    }
    assert sample.inputs["image"].random_data
    assert sample.inputs["task"].zero_data
