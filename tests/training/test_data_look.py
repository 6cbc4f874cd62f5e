"""The sheet that a person looks at before training: a row for every sample, four cells, and what was skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training import datasets
from training.data import Batch, look


def sheet(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_sheet_shows_picture_prompt_target_and_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.pix2gestalt(tmp_path / "data")
    out = tmp_path / "sheet.png"
    arguments = [str(tmp_path / "data"), "--kind", "pix2gestalt", "--count", "3", "--size", "64", "--out", str(out)]
    assert look.main([*arguments, "split=all"]) == 0
    page = sheet(out)
    head = look.TITLE_PX + look.GAP_PX
    assert page.shape == (head + 3 * 64 + 2 * 6, 4 * 64 + 3 * 6, 3)
    for column in range(4):
        assert page[: look.TITLE_PX, column * 70 : column * 70 + 64].min() < 100  # its title
    page = page[head:]
    prompt, target = page[:64, 70:134], page[:64, 140:204]
    assert set(np.unique(prompt)) >= {0, 255}
    assert (target[0, 0] >= 254).all()
    assert "4 samples of amodal" in capsys.readouterr().out


def test_depth_is_red_when_near_and_dark_where_unknown() -> None:
    image = np.ones((1, 3, 16, 16), np.float32)
    target = np.zeros((1, 4, 16, 16), np.float32)
    target[0, 0] = np.linspace(-1, 1, 16)
    weight = np.array([[[1, 0], [1, 1]]], np.float32)
    (row,) = look.rows(Batch(image, image * 0, target, weight), "depth")
    near, far = row[8, 44].astype(int), row[8, 59].astype(int)
    assert near[0] > near[2] + 80
    assert far[2] > far[0] + 60
    known = row[:, 66:]
    assert (known[:8, 8:] == 63).all()
    assert (known[8:] == 255).all()


@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_generated_scenes_can_be_looked_at(shards: Path, tmp_path: Path, task: str) -> None:
    out = tmp_path / "sheet.png"
    assert (
        look.main([str(shards), "--kind", "scenes", "--task", task, "--count", "2", "--size", "48", "--out", str(out)])
        == 0
    )
    assert sheet(out).std() > 10


def test_classes_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.imagenet(tmp_path / "data")
    out = tmp_path / "sheet.png"
    assert look.main([str(tmp_path / "data"), "--kind", "imagenet", "--size", "32", "--out", str(out)]) == 0
    assert "12 pictures of 3 classes" in capsys.readouterr().out
    assert sheet(out).shape == (6 * 32 + 5 * 6, 32, 3)


def test_what_was_skipped_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.chairs(tmp_path)
    (tmp_path / "data" / "00002_flow.flo").write_text("no flow")
    arguments = ["--count", "3", "--size", "32", "--out", str(tmp_path / "sheet.png")]
    assert look.main([str(tmp_path), "--kind", "chairs", *arguments]) == 0
    assert "1 of 3 samples are missing or broken: 00002_flow.flo" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kind", "chairs"],
        ["--kind", "scenes"],
        ["--kind", "chairs", "--size", "30"],
        ["--kind", "chairs", "--count", "0"],
        ["--kind", "chairs", "--count", "9999999"],
        ["--kind", "chairs", "split"],
        ["--kind", "chairs", "colour=red"],
    ],
)
def test_what_cannot_be_shown_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert look.main([str(tmp_path), *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
