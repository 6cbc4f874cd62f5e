"""The same short run with one change each: runs are judged alike, done once, and what no recipe has is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from saccade.errors import InvalidInput
from tests.training.test_train import toml
from training import ablate, validation
from training.train import Recipe

FACTS = {
    "name": "tiny",
    "summary": "for tests",
    "licence": "Apache-2.0",
    "tasks": {
        task: {
            "label": label,
            "coding": {},
            "defaults": {"steps": 1, "ensemble_size": 1, "reduction": "mean", "processing_resolution": 32},
        }
        for label, task in enumerate(("depth", "flow", "amodal"))
    },
    "training": {"data": [], "device": "cpu"},
}


@pytest.fixture
def config(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "ablations.toml"
    short = replace(recipe, stages=recipe.stages[1:])
    changes = '[changes.knee]\nabout = "depth coded with a knee"\ndepth_knee = 0.3\n\n'
    changes += '[changes.shallow]\nabout = "no tracker"\nmodel = { track = false }\n'
    path.write_text(toml(short) + "\n" + changes)
    return path


def test_every_change_is_trained_judged_and_told_once(config: Path, shards: Path, tmp_path: Path) -> None:
    judged_on, facts, out = tmp_path / "val", tmp_path / "facts.json", tmp_path / "out"
    validation.main([str(judged_on), "--scenes", str(shards), "--count", "2"])
    facts.write_text(json.dumps(FACTS))
    command = [str(config), str(judged_on), "--facts", str(facts), "--out", str(out)]
    ablate.main(command)
    lines = (out / "ablations.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| as it is", "| depth coded with a knee", "| no tracker"]
    assert all(line.count("%)") == 3 for line in lines[3:])
    results = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    assert set(results) == {"as-it-is", "knee", "shallow"}
    ablate.main(command)
    assert {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/result.json")} == results


def test_a_change_that_no_recipe_has_is_refused(config: Path) -> None:
    config.write_text(config.read_text().replace("depth_knee = 0.3\n\n", "depth_nee = 0.3\n\n"))
    with pytest.raises(InvalidInput, match="depth_nee"):
        list(ablate.read(config))
