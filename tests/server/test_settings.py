"""Where settings come from, which wins, and that their table is the truth."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade.errors import InvalidInput
from server import settings
from server.settings import Settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "saccade.toml"
    path.write_text('port = 1000\nmax_steps = 10\nlog_level = "error"\n')
    return path


def test_flags_win_over_environment_over_file_over_defaults(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_PORT", "2000")
    monkeypatch.setenv("SACCADE_MAX_STEPS", "20")
    monkeypatch.setenv("SACCADE_HOST", "")
    loaded = Settings.load(config, port=3000, max_steps=None)
    assert (loaded.port, loaded.max_steps, loaded.log_level, loaded.max_ensemble_size) == (3000, 20, "error", 20)
    assert loaded.host == Settings.model_fields["host"].default


def test_the_file_may_be_named_by_the_environment(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_CONFIG", str(config))
    assert Settings.load().port == 1000


@pytest.mark.parametrize(
    ("text", "param", "hint"),
    [
        ("prot = 1", "prot", "port"),
        ("port = 70000", "port", "65535"),
        ('engine = "magic"', "engine", "openvino"),
        ("port = ", "config", "cannot be read"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, param: str, hint: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=hint) as refused:
        Settings.load(path)
    assert refused.value.param == param


def test_bad_flags_variables_and_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="setting max_steps"):
        Settings.load(max_steps=0)
    with pytest.raises(InvalidInput, match="unknown setting queue; did you mean queue_limit"):
        Settings.load(queue=1)
    with pytest.raises(InvalidInput, match="does not exist"):
        Settings.load(tmp_path / "nowhere.toml")
    monkeypatch.setenv("SACCADE_PORT", "eighty")
    with pytest.raises(InvalidInput, match="setting port"):
        Settings.load()


def test_the_documented_table_is_made_from_the_settings() -> None:
    documented = Path(settings.__file__).parents[1] / "docs" / "settings.md"
    assert documented.read_text() == settings.table(), "run: python -m server.settings > docs/settings.md"


def test_tritons_endpoints_are_a_list_without_repetition() -> None:
    chosen = Settings(backend="triton", triton_url="a:1, [::1]:2,a:1", triton_concurrency=3)
    assert chosen.endpoints == ("a:1", "[::1]:2")
    assert chosen.triton_batches == 6


@pytest.mark.parametrize("url", ["", "host", "http://host:1", "host:1,", "host:port", "host:1;other:2"])
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="triton_url"):
        Settings.load(triton_url=url)
