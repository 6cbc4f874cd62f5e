"""A study is planned from TOML, run once, judged alike and told in tables, laws and plots."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saccade.errors import InvalidInput
from training import recorded
from training.data import Batch
from training.recorded import Recorded, record
from training.study import classes, command, laws, plan, plots, report

TOML = """
about = "A small study"
data = "DATA"
[judge]
batches = 2
[judge.held.finetune]
data = [{ kind = "recorded", path = "{data}/held" }]
[base.finetune]
data = [{ kind = "recorded", path = "{data}/seen" }]
sizes = [[16, 16]]
model = { width = 8, heads = 2, depth = 1, patch = 1, grid = 2 }
loop = { steps = 2, batch = 6, lr = 1e-3, ema = 0.5 }
[axes.compute]
about = "Two models."
stage = "finetune"
law = "budget"
again = { one-5e5 = [1] }
[axes.compute.grid.model]
one = {}
two = { "model.depth" = 2 }
[axes.compute.grid.budget]
5e5 = { macs = 5e5 }
1e6 = { macs = 1e6 }
2e6 = { macs = 2e6 }
[axes.again]
about = "The same run under another name."
stage = "finetune"
[axes.again.grid.how]
"as before, but" = { macs = 5e5 }
[axes.upcycle]
stage = "upcycle"
beside = ["compute/two-1e6"]
[axes.upcycle.values]
start = "run:compute/two-1e6"
data = [{ kind = "recorded", path = "{data}/seen" }]
sizes = [[16, 16]]
loop = { steps = 1, batch = 6 }
"held.loop.batch" = 3
[axes.upcycle.grid.experts]
2 = { experts = { count = 2, active = 1, renormalise = true, shared = false, gated = false } }
"""


class Noise:
    """A source of noise, which tells how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def batch(self, step: int, task: str, count: int, size: tuple[int, int], first: int | None = None) -> Batch:
        self.asked += 1
        rng = np.random.default_rng([step, len(task)])
        image, prompt = (rng.uniform(-1, 1, (count, 3, *size)).astype(np.float32) for _ in range(2))
        target = rng.uniform(-1, 1, (count, 4, *size)).astype(np.float32)
        weight = (rng.random((count, size[0] // 8, size[1] // 8)) < 0.8).astype(np.float32)
        return Batch(image, prompt, target, weight)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("seen", 24), ("held", 6)):
        record(Noise(), folder / name, count, (16, 16))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def config(data: Path) -> Path:
    path = data / "study.toml"
    path.write_text(TOML.replace("DATA", str(data)))
    return path


@pytest.fixture(scope="module")
def out(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    command.main(config, folder)
    return folder


@pytest.fixture(scope="module")
def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in json.loads((out / "results.json").read_text())["runs"]}


# ---- recorded batches


def test_recorded_samples_are_those_that_were_drawn(data: Path) -> None:
    seen, drawn = Recorded(data / "seen"), Noise().batch(0, "flow", 24, (16, 16))
    found = seen.at("flow", np.arange(24))
    np.testing.assert_allclose(found.image, drawn.image, atol=0.5 / 127.5 + 1e-6)
    np.testing.assert_allclose(found.target, drawn.target, atol=1e-3)
    np.testing.assert_array_equal(found.weight, drawn.weight)
    assert found.image.dtype == found.target.dtype == found.weight.dtype == np.float32


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(data: Path) -> None:
    seen = Recorded(data / "seen", seed=3)
    epochs = [seen.batch(step, "depth", 24, (16, 16)).image for step in range(2)]
    assert not np.array_equal(*epochs)
    for epoch in epochs:
        assert len({sample.tobytes() for sample in epoch}) == 24
    again = Recorded(data / "seen", seed=3).batch(0, "depth", 8, (16, 16), first=24)
    np.testing.assert_array_equal(again.image, epochs[1][:8])


def test_a_limit_leaves_so_many_samples(data: Path) -> None:
    few = Recorded(data / "seen", limit=5).batch(0, "amodal", 20, (16, 16))
    assert len({sample.tobytes() for sample in few.image}) == 5


def test_recording_is_done_once(data: Path) -> None:
    source = Noise()
    record(source, data / "seen", 24, (16, 16))  # type: ignore[arg-type]
    assert source.asked == 0


def test_what_was_not_recorded_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="recorded at 16x16, not at 32x16"):
        Recorded(data / "seen").batch(0, "depth", 1, (32, 16))
    with pytest.raises(InvalidInput, match=r"holds no recorded samples: python -m training.recorded SCENES .* --size"):
        Recorded(tmp_path)


@pytest.mark.parametrize(
    ("there", "options", "told"),
    [
        ("solid", [], "holds no layered shards: python -m training.scenes.make"),
        ("layered", [], "holds no solid shards"),
        ("neither", [], "holds no solid and no layered shards"),
        ("solid", ["--size", "30"], "--size a multiple of 8"),
    ],
)
def test_scenes_that_cannot_be_recorded_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str, options: list[str], told: str
) -> None:
    (tmp_path / f"{there}-00000").mkdir()
    with pytest.raises(SystemExit) as left:
        recorded.main([str(tmp_path), str(tmp_path / "out"), *options])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert told in said
    assert said.count("\n") == 1


# ---- class folders


def test_class_folders_are_the_same_every_time(tmp_path: Path) -> None:
    classes.write(tmp_path / "a", 1, 16)
    classes.write(tmp_path / "b", 1, 16)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert [file.parent.name for file in files] == ["collage", "object", "room", "street", "table", "texture"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        with Image.open(tmp_path / "a" / file) as picture:
            assert picture.size == (16, 16)


# ---- the plan


def test_the_plan_has_every_choice_cheap_ones_first(config: Path) -> None:
    runs = plan.runs_of(plan.read(config))
    assert [run.name for run in runs] == [
        "compute/one-5e5", "compute/two-5e5", "compute/one-5e5-seed1", "compute/one-1e6", "compute/two-1e6",
        "compute/one-2e6", "compute/two-2e6", "again/as_before_but", "upcycle/2",
    ]  # fmt: skip
    assert runs[0].values["model"] == {"width": 8, "heads": 2, "depth": 1, "patch": 1, "grid": 2}
    assert runs[1].values["model"]["depth"] == 2
    assert runs[2].values["loop"]["seed"] == 1
    assert runs[0].key == runs[7].key != runs[1].key
    assert runs[-1].reads == ("compute/two-1e6",)
    assert runs[-1].held == {"loop.batch": 3}


def test_choices_may_be_left_out(config: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.toml"
    some.write_text(config.read_text().replace('law = "budget"', 'law = "budget"\nskip = ["two-2e6", "one-1e6"]'))
    names = [run.name for run in plan.runs_of(plan.read(some)) if run.axis == "compute"]
    assert names == [
        "compute/one-5e5",
        "compute/two-5e5",
        "compute/one-5e5-seed1",
        "compute/two-1e6",
        "compute/one-2e6",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('stage = "upcycle"', 'stag = "upcycle"'), "did you mean stage"),
        (("run:compute/two-1e6", "run:compute/three"), "begins with compute/three, which no run before it"),
        (('"as before, but" =', '"a b" = {}\n"a,b" ='), "two runs have the name again/a_b"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(config: Path, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text(config.read_text().replace(*change))
    with pytest.raises(InvalidInput, match=message):
        plan.runs_of(plan.read(broken))


def test_data_that_is_not_there_is_named_with_what_makes_it(config: Path, data: Path) -> None:
    study = plan.read(config)
    plan.check_folders(study, plan.runs_of(study))
    other = plan.read(config, str(data / "other"))
    with pytest.raises(InvalidInput) as told:
        plan.check_folders(other, plan.runs_of(other))
    for name in ("seen", "held"):
        folder = data / "other" / name
        assert f"{folder} (python -m training.recorded SCENES {folder} --size 16)" in str(told.value)


def test_nothing_is_run_before_all_data_are_there(config: Path, data: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.toml"
    later = config.read_text().replace('"held.loop.batch" = 3', '"held.data" = [{ kind = "recorded", path = "gone" }]')
    some.write_text(later)
    with pytest.raises(InvalidInput, match="is not there: gone"):
        command.main(some, tmp_path / "out")
    assert not (tmp_path / "out" / "runs").exists()


def test_the_folder_of_pictures_is_asked_for_too(config: Path, data: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.toml"
    some.write_text(config.read_text().replace("[judge]", '[judge]\npictures = "{data}/pictures"'))
    study = plan.read(some)
    with pytest.raises(InvalidInput, match=rf"is not there: {data}/pictures \(python -m training.validation"):
        plan.check_folders(study, plan.runs_of(study))


# ---- the runs


def test_budgets_are_kept(rows: dict[str, dict[str, Any]]) -> None:
    for name, budget in {"compute/one-1e6": 1e6, "compute/two-2e6": 2e6}.items():
        step = rows[name]["macs"] / rows[name]["steps"]
        assert abs(rows[name]["macs"] - budget) <= step / 2
        assert rows[name]["samples"] == 6 * rows[name]["steps"]


def test_a_run_of_two_axes_is_run_once(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    assert rows["again/as_before_but"]["loss"] == rows["compute/one-5e5"]["loss"]
    assert not (out / "runs/again").exists()


def test_the_upcycled_run_began_with_the_other(rows: dict[str, dict[str, Any]]) -> None:
    dense, mixture = rows["compute/two-1e6"], rows["upcycle/2"]
    assert mixture["values"]["start"].endswith("compute/two-1e6")
    assert mixture["parameters"]["total"] > dense["parameters"]["total"]
    router = 2 * 8 * 2  # blocks, width, experts
    assert mixture["parameters"]["active"] == dense["parameters"]["active"] + router
    assert mixture["loss"]["mean"] == pytest.approx(dense["loss"]["mean"], rel=0.2)


def test_losses_are_those_of_held_out_data_and_repeatable(
    config: Path, out: Path, rows: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    other = command.main(config, tmp_path, only=["again"])["runs"][0]
    assert other["loss"] == rows["compute/one-5e5"]["loss"]
    mean = np.mean([other["loss"][task] for task in ("depth", "flow", "amodal")])
    assert other["loss"]["mean"] == pytest.approx(mean)
    assert 0.1 < mean < 10


def test_nothing_is_done_twice(config: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((out / "results.json").read_text())
    monkeypatch.setattr(command, "stage_of", lambda name: pytest.fail("it was run again"))
    assert command.main(config, out) == before


def test_another_study_does_not_take_these_runs_for_its_own(config: Path, out: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.toml"
    changed.write_text(config.read_text().replace("lr = 1e-3", "lr = 2e-3"))
    with pytest.raises(InvalidInput, match="the values of compute/one-5e5 have changed"):
        command.main(changed, out)


# ---- the report


def test_the_report_tells_of_every_run(out: Path) -> None:
    text = (out / "report.md").read_text()
    assert "| one | 2e6 | 0 | " in text
    assert "Two models." in text
    assert "| compute/two-1e6 | " in text
    assert "Noise between seeds: " in text
    assert "best of every budget, without a floor" in text
    for name in ("compute", "again", "upcycle"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 400


def run_of(model: str, budget: float, loss: float, parameters: int, seed: int = 0) -> dict[str, Any]:
    name = f"{budget:.0e}"
    return {
        "run": f"{model}-{name}", "point": {"model": model, "budget": name}, "seed": seed, "macs": budget, "samples": 1,
        "parameters": {"total": parameters}, "loss": {"mean": loss},
    }  # fmt: skip


def test_laws_are_found_again() -> None:
    """Models with a floor of their own: the best of each budget lies on 2 C^-0.1, its size on C^0.5."""
    budgets = [10.0**k for k in (8, 10, 12, 14)]
    rows = [
        run_of(f"m{j}", c, 2 * c**-0.1 * (1 + 0.1 * (i - j) ** 2), round(b**0.5))
        for i, c in enumerate(budgets)
        for j, b in enumerate(budgets)
    ]
    rows.append(run_of("m0", budgets[0], 2 * budgets[0] ** -0.1 * np.exp(0.02), 10_000, seed=1))
    law = laws.of(rows, "budget")
    found = law["laws"]["without a floor"]
    assert found["exponent"] == pytest.approx(0.1, abs=1e-4)
    assert found["gain"] == pytest.approx(2, rel=1e-3)
    assert found["relative_residual"] < 1e-4
    assert law["size"]["exponent"] == pytest.approx(0.5, abs=1e-3)
    assert law["noise"] == pytest.approx(0.02 / np.sqrt(2), rel=1e-6)
    low, high = found["exponent_90"]
    assert low < 0.1 < high < 0.11


def test_a_law_over_a_dimension_of_numbers() -> None:
    rows = [{"point": {"samples": str(n)}, "seed": 0, "loss": {"mean": 0.3 + n**-0.5}} for n in (2048, 32, 128, 512)]
    assert laws.along_markdown(rows, "samples").startswith(
        "Through the held-out loss L(samples): 0.3000 +1.0000 n^-0.50"
    )


def test_three_points_are_fitted_without_a_floor() -> None:
    rows = [{"point": {"samples": str(n)}, "seed": 0, "loss": {"mean": 2 * n**-0.5}} for n in (32, 128, 512)]
    text = laws.along_markdown(rows, "samples")
    assert text.startswith("Through the held-out loss L(samples): 2.0000 n^-0.50")
    assert "No floor was fitted: that takes 4 points" in text
    law = laws.of([run_of("m", c, c**-0.1, 10) for c in (1e6, 1e7, 1e8)], "budget")
    assert list(law["laws"]) == ["without a floor"]
    told = laws.markdown(law)
    assert "No floor was fitted: that takes 4 points" in told
    assert "| no repeated seeds |" in told


def test_two_points_are_no_law_and_that_is_said() -> None:
    rows = [{"point": {"samples": n}, "seed": 0, "loss": {"mean": 0.3}} for n in ("32", "128", "compute/two")]
    assert laws.along_markdown(rows, "samples") == (
        "No law through the held-out loss L(samples): there are 2 choices that are numbers, and it takes 3."
    )


def test_columns_have_names_of_their_own(rows: dict[str, dict[str, Any]]) -> None:
    table = report.axis_table([{**rows["compute/one-1e6"], "point": {"samples": "32"}}], ["samples"])
    head = [name.strip() for name in table.splitlines()[0].strip("|").split("|")]
    assert len(set(head)) == len(head)
    assert {"samples", "samples seen"} <= set(head)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[plots.Figure]:
    """Every figure that was saved."""
    saved: list[plots.Figure] = []
    save = plots.Figure.savefig

    def kept(figure: plots.Figure, *given: Any, **how: Any) -> None:
        saved.append(figure)
        save(figure, *given, **how)

    monkeypatch.setattr(plots.Figure, "savefig", kept)
    return saved


def test_one_row_of_a_log_is_seen(rows: dict[str, dict[str, Any]], tmp_path: Path, figures: list[plots.Figure]) -> None:
    logged = [[[2, 0.5]], [[step, 1 / step] for step in range(1, 9)], []]
    shown = [{**rows["compute/one-1e6"], "losses": losses} for losses in logged]
    plots.axis("data", shown, tmp_path / "data.png")
    one, many, _ = figures[0].axes[0].lines
    assert one.get_marker() == "o"
    assert many.get_marker() in ("", "None")


@pytest.mark.parametrize("budgets", [(1e6, 1e7, 1e8), (3e8, 5e8, 9e8), (5.5e8, 6e8, 7e8)])
def test_budgets_are_told_as_spent_and_labels_do_not_collide(
    tmp_path: Path, figures: list[plots.Figure], budgets: tuple[float, ...]
) -> None:
    own = [run_of(model, c, c**-0.1, size) for c in budgets for model, size in (("a", 20_000), ("b", 70_000))]
    for row in own:
        row["point"]["budget"] = f"key {row['macs']:.2e}"
    plots.compute(own, "budget", laws.of(own, "budget"), tmp_path / "compute.png")
    left, right = figures[0].axes
    told = [text.get_text() for text in right.get_legend().get_texts()]
    assert told == [f"{laws.scientific(c)} MACs" for c in budgets]
    for panel in (left, right):
        assert not any(text.get_text() for text in panel.get_xticklabels(minor=True))
        low, high = panel.get_xlim()
        ticks = zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)
        labels = [text for place, text in ticks if low <= place <= high and text.get_text()]
        assert labels
        boxes = [text.get_window_extent() for text in labels]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study"])
    with pytest.raises(SystemExit, match=r"^saccade: .*missing\.toml cannot be read"):
        command.command([str(tmp_path / "missing.toml"), "--out", str(tmp_path)])


def test_few_budgets_are_no_law() -> None:
    rows = [run_of("m", 1e6, 1.0, 10), run_of("m", 2e6, 0.9, 10)]
    assert laws.of(rows, "budget")["laws"] == {}
    assert laws.markdown(laws.of(rows, "budget")).startswith("No law of compute yet: there are 2 budgets")
    assert laws.scientific(3.04e12) == "3.0e12"
    assert (report.millions(331_000), report.millions(70_960)) == ("0.33M", "71.0k")


def test_a_result_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.write(tmp_path / "result.json", {"key": "old"})
    with monkeypatch.context() as killed:
        killed.setattr(command.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command.write(tmp_path / "result.json", {"key": "new"})
    assert json.loads((tmp_path / "result.json").read_text()) == {"key": "old"}


def test_threads_that_are_none_are_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="threads must be at least 1"):
        command.main(config, tmp_path, threads=0)
