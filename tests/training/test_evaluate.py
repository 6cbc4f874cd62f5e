"""The evaluation over a tiny folder in the true form, written here pixel by pixel."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from saccade.errors import InvalidInput, ModelError
from saccade.pipeline import Answer, Options, Resolved
from training import baselines, evalset
from training.evaluate import evaluate, main, sweep
from training.report import WARNING, Report

HEIGHT, WIDTH = 80, 96
DEPTH = np.repeat(np.linspace(4, 1, HEIGHT, dtype=np.float32)[:, None], WIDTH, axis=1)
DISPARITY = np.where(np.arange(WIDTH) < WIDTH // 2, 10, 20).astype(np.float32) * np.ones((HEIGHT, 1), np.float32)
SHIFT = (3, -4)


def _png(path: Path, levels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)


def _texture(shift: tuple[int, int] = (0, 0)) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (10, 12, 3), np.uint8))
    picture = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    return np.roll(picture, shift[::-1], axis=(0, 1))


def _box(top: int, left: int, bottom: int, right: int) -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


WHOLE = _box(10, 10, 30, 30)
VISIBLE = WHOLE & ~_box(20, 20, 30, 30)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two depths (a sparse ramp in metres; dense disparities), two flows, one object whole and one a quarter hidden."""
    root = tmp_path / "pictures"
    for name in ("depth/ramp", "depth/sides", "flow/chairs_1_1", "flow/mb_still_1", "flow/mb_still_2", "amodal/cat"):
        _png(root / f"{name}.png", _texture())
    _png(root / "flow/chairs_1_2.png", _texture(SHIFT))
    _png(root / "amodal/own1.png", _texture())
    every = np.ones((HEIGHT, WIDTH), bool)
    sparse = (np.indices((HEIGHT, WIDTH)).sum(0) % 3) == 0
    np.savez(root / "depth/ramp.npz", gt=np.where(sparse, DEPTH, 0), valid=sparse, kind="metric_depth_m")
    np.savez(root / "depth/sides.npz", gt=DISPARITY, valid=every, kind="disparity_px")
    moved = np.broadcast_to(np.array(SHIFT, np.float32), (HEIGHT, WIDTH, 2))
    np.savez(root / "flow/chairs_1.npz", flow=moved, valid=every)
    np.savez(root / "flow/mb_still.npz", flow=np.zeros((HEIGHT, WIDTH, 2), np.float32), valid=every)
    for item, visible in (("cat_00", WHOLE), ("own1", VISIBLE)):
        _png(root / f"amodal/{item}_visible.png", visible.astype(np.uint8) * 255)
        _png(root / f"amodal/{item}_whole.png", WHOLE.astype(np.uint8) * 255)
    return root


@dataclass
class FakeSeer:
    """Says the truth (depth to scale and shift), worse by what `blur` adds; remembers what it was asked."""

    error: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)

    def depth(self, image: Path, **options: Any) -> Answer:
        truth = DEPTH if image.stem == "ramp" else 1 / DISPARITY
        return self._answer("depth", 0.3 * truth - 2 + self._noise((HEIGHT, WIDTH)), options)

    def flow(self, image: Path, next_image: Path, **options: Any) -> Answer:
        assert next_image.name == image.name.replace("_1.png", "_2.png")
        motion = np.array(SHIFT if image.stem.startswith("chairs") else (0, 0), np.float32)
        shift = np.array([self.error, 0], np.float32)
        return self._answer("flow", np.broadcast_to(motion + shift, (HEIGHT, WIDTH, 2)), options)

    def amodal(self, image: Path, mask: Path, **options: Any) -> Answer:
        assert image.name == ("cat.png" if mask.name.startswith("cat") else "own1.png")
        return self._answer("amodal", WHOLE if not self.error else evalset.read_mask(mask), options)

    def _noise(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        return self.error * np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def _answer(self, task: Any, prediction: NDArray[Any], options: dict[str, Any]) -> Answer:
        self.asked.append({"task": task, **options})
        used: dict[str, Any] = {
            "steps": 4, "ensemble_size": 1, "reduction": "mean", "spacing": "trailing", "processing_resolution": 256
        } | options  # fmt: skip
        return Answer(task, prediction, None, None, Resolved(**used), "fake", "d" * 64)


def _means(report: Report) -> dict[tuple[str, str, str], float]:
    return {(m.task, m.group, m.metric): m.value for m in report.means()}


def _baseline(report: Report, task: str, name: str, method: str) -> dict[str, float]:
    (score,) = [p for p in report.pictures if (p.task, p.name) == (task, name)]
    return score.baselines[method]


def test_who_says_the_truth_scores_perfectly(data: Path) -> None:
    means = _means(evaluate(data, FakeSeer()))
    assert means == pytest.approx({
        ("depth", "all", "abs_rel"): 0, ("depth", "all", "delta1"): 1,
        ("depth", "dense", "abs_rel"): 0, ("depth", "dense", "delta1"): 1,
        ("flow", "all", "epe_px"): 0, ("flow", "chairs", "epe_px"): 0, ("flow", "middlebury", "epe_px"): 0,
        ("amodal", "all", "iou"): 1, ("amodal", "hidden > 5%", "iou"): 1,
    }, abs=1e-5)  # fmt: skip


def test_errors_show_in_every_metric(data: Path) -> None:
    means = _means(evaluate(data, FakeSeer(error=2.0)))
    assert means["depth", "all", "abs_rel"] > 0.05
    assert means["flow", "chairs", "epe_px"] == pytest.approx(2.0, abs=1e-5)
    assert means["amodal", "all", "iou"] == pytest.approx((1 + 0.75) / 2)
    assert means["amodal", "hidden > 5%", "iou"] == pytest.approx(0.75)


def test_depth_baselines(data: Path) -> None:
    """1/disparity is 0.1 on one half and 0.05 on the other: its mean 0.075 errs by 25% and by 50%."""
    report = evaluate(data, FakeSeer(), tasks=["depth"])
    sides = _baseline(report, "depth", "sides", "constant (mean)")
    assert sides == pytest.approx({"abs_rel": 0.375, "delta1": 0.0}, abs=1e-5)
    assert _baseline(report, "depth", "ramp", "vertical ramp") == pytest.approx({"abs_rel": 0, "delta1": 1}, abs=1e-5)
    assert _baseline(report, "depth", "sides", "vertical ramp") == pytest.approx(sides, abs=1e-4)


def test_median_depth_is_not_fitted() -> None:
    """Over 1, 1 and 4 the median is 1 where the mean, 2, would be further off in AbsRel."""
    truth = np.array([[1, 1, 4, 9]], np.float32)
    np.testing.assert_array_equal(baselines.median_depth(truth, truth < 9), np.full((1, 4), 1, np.float32))


def test_flow_baselines(data: Path) -> None:
    """The frame moves by (3, -4) px as a whole: zero errs by 5, the median by nothing, the classical ones by little."""
    report = evaluate(data, FakeSeer(), tasks=["flow"])
    epe = {method: _baseline(report, "flow", "chairs_1", method)["epe_px"] for method in report.pictures[0].baselines}
    assert epe["zero"] == pytest.approx(5)
    assert epe["median"] == pytest.approx(0, abs=1e-6)
    assert max(epe["Farneback"], epe["DIS (fast)"], epe["DIS (medium)"]) < 2


def test_the_median_motion_is_taken_over_valid_pixels() -> None:
    flow = np.array([[[1, 0], [2, 5], [9, 6], [99, 99]]], np.float32)
    expected = np.broadcast_to(np.array([2, 5], np.float32), (1, 4, 2))
    np.testing.assert_array_equal(baselines.median_flow(flow, np.array([[True, True, True, False]])), expected)


def test_amodal_baselines(data: Path) -> None:
    """A 20 px square without its lower right quarter is 75% of it; its hull lacks about half of that quarter."""
    report = evaluate(data, FakeSeer(), tasks=["amodal"])
    assert _baseline(report, "amodal", "own1", "visible mask") == {"iou": pytest.approx(0.75)}
    assert _baseline(report, "amodal", "own1", "convex hull")["iou"] == pytest.approx(0.875, abs=0.02)
    assert _baseline(report, "amodal", "cat_00", "convex hull") == {"iou": 1.0}


def test_sets_count_only_the_pictures_that_belong(data: Path) -> None:
    pictures = {(m.task, m.group): m.pictures for m in evaluate(data, FakeSeer()).means()}
    assert pictures == {
        ("depth", "all"): 2, ("depth", "dense"): 1, ("flow", "all"): 2, ("flow", "chairs"): 1,
        ("flow", "middlebury"): 1, ("amodal", "all"): 2, ("amodal", "hidden > 5%"): 1,
    }  # fmt: skip


def test_options_reach_the_seer_and_the_report(data: Path) -> None:
    seer = FakeSeer()
    report = evaluate(data, seer, tasks=["depth"], options=Options(steps=7, seed=3))
    assert [(call["steps"], call["seed"]) for call in seer.asked] == [(7, 3)] * 2
    assert "ensemble_size" not in seer.asked[0]
    assert (report.options["depth"]["steps"], report.options["depth"]["ensemble_size"]) == (7, 1)


def test_progress_runs_from_none_to_all(data: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate(data, FakeSeer(), tasks=["amodal"], progress=lambda *at: seen.append(at))
    assert seen == [(0, 2, "amodal/cat_00"), (1, 2, "amodal/own1"), (2, 2, "")]


def test_every_missing_and_broken_file_is_named_before_any_question(data: Path) -> None:
    (data / "depth/ramp.png").write_bytes(b"not a picture")
    (data / "flow/mb_still_2.png").unlink()
    (data / "flow/chairs_1.npz").write_bytes(b"PK\3\4 cut short")
    np.savez(data / "depth/sides.npz", gt=DISPARITY[:5], valid=np.ones((HEIGHT, WIDTH), bool), kind="disparity_px")
    _png(data / "amodal/own1_whole.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    (data / "amodal/cat.png").unlink()
    seer = FakeSeer()
    with pytest.raises(InvalidInput, match="6 of the evaluation files cannot be used") as caught:
        evaluate(data, seer)
    for name in ("depth/ramp.png", "depth/sides.npz", "flow/mb_still_2.png: missing", "flow/chairs_1.npz",
                 "amodal/own1_whole.png: the mask is empty", "amodal/cat.png: missing"):  # fmt: skip
        assert name in str(caught.value)
    assert str(data) not in str(caught.value)
    assert seer.asked == []


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"gt": DEPTH, "valid": DEPTH > 0}, "has no array kind"),
        ({"gt": DEPTH, "valid": DEPTH > 0, "kind": "feet"}, "kind is 'feet'"),
        ({"gt": DEPTH - 2, "valid": DEPTH > 0, "kind": "metric_depth_m"}, "must be above 0"),
        ({"gt": DEPTH * np.nan, "valid": DEPTH > 0, "kind": "metric_depth_m"}, "not finite"),
        ({"gt": DEPTH, "valid": DEPTH < 0, "kind": "metric_depth_m"}, "no pixel is valid"),
    ],
)
def test_truth_that_cannot_be_is_refused(data: Path, arrays: dict[str, Any], complaint: str) -> None:
    np.savez(data / "depth/ramp.npz", **arrays)
    with pytest.raises(InvalidInput, match=f"depth/ramp.npz: .*{complaint}"):
        evalset.find(data, ["depth"])


def test_a_folder_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="3 of the evaluation files") as caught:
        evalset.find(tmp_path)
    assert "depth/: no items" in str(caught.value)


def test_an_answer_of_the_wrong_size_is_an_error_that_names_the_picture(data: Path) -> None:
    seer = FakeSeer()
    seer.depth = lambda image, **options: seer._answer("depth", DEPTH[::2, ::2], options)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="the picture wants") as caught:
        evaluate(data, seer, tasks=["depth"])
    assert caught.value.__notes__ == ["while evaluating depth/ramp"]


def test_the_report_sets_the_model_beside_every_baseline_and_says_where_it_loses(data: Path) -> None:
    text = evaluate(data, FakeSeer(error=2.0)).markdown()
    assert WARNING in text
    for name in ("constant (mean)", "vertical ramp", "zero", "Farneback", "DIS (medium)", "convex hull"):
        assert f"| {name} |" in text
    for name in ("ramp", "sides", "chairs_1", "mb_still", "cat_00", "own1"):
        assert f"\n| {name} |" in text
    assert "Does not beat: visible mask (IoU all, IoU hidden > 5%); convex hull" in text
    assert "Does not beat: zero (EPE middlebury); median" in text


def test_tables_are_whole(data: Path) -> None:
    lines = [line for line in evaluate(data, FakeSeer()).markdown().splitlines() if line.startswith("|")]
    tables = "\n".join(lines).split("| --- |")
    assert len(tables) > 6
    columns = [line.count("|") for line in lines]
    heads = [at for at, line in enumerate(lines) if "---" in line]
    for at, following in zip(heads, [*heads[1:], len(lines) + 1], strict=True):
        assert len(set(columns[at - 1 : following - 1])) == 1


def test_saved_files_hold_the_same_values_and_nothing_of_this_machine(data: Path, tmp_path: Path) -> None:
    report = evaluate(data, FakeSeer(error=0.5))
    written = report.save(tmp_path / "out")
    assert {path.name for path in written} == {"report.md", "report.json", "depth.png", "flow.png", "amodal.png"}
    document = json.loads((tmp_path / "out/report.json").read_text())
    assert document["warning"] == WARNING
    values = {(m["task"], m["group"], m["metric"]): m["value"] for m in document["means"]}
    assert values == _means(report)
    assert str(tmp_path) not in json.dumps(document) + report.markdown()


def test_contact_sheets_show_prediction_beside_truth(data: Path) -> None:
    """The truth is a ramp from far to near; the perfect prediction's cell is the same colours, save where unknown."""
    strip = evaluate(data, FakeSeer(), tasks=["depth"]).pictures[1].strip
    assert strip is not None
    cell = (strip.shape[1] - 8) // 3
    predicted, truth = strip[:, cell + 4 : 2 * cell + 4].astype(int), strip[:, 2 * cell + 8 :].astype(int)
    assert np.abs(predicted - truth).mean() < 2
    assert np.abs(predicted[:, 10] - predicted[:, -10]).mean() > 50


def test_the_sweep_asks_at_every_place_of_the_dial(data: Path, tmp_path: Path) -> None:
    class Improving(FakeSeer):
        def flow(self, image: Path, next_image: Path, **options: Any) -> Answer:
            self.error = 1 / options["steps"] / options["ensemble_size"]
            return super().flow(image, next_image, **options)

    swept = sweep(data, Improving(), tasks=["flow"], steps=[1, 2, 4], ensemble_sizes=[1, 2])
    values = {(p.steps, p.ensemble_size): p.mean.value for p in swept.points if p.mean.group == "chairs"}
    assert values == pytest.approx({(n, m): 1 / n / m for n in (1, 2, 4) for m in (1, 2)}, rel=1e-4)
    assert f"| chairs (1) | {'EPE, px ↓'} | 2 | 0.500 | 0.250 | **0.125** |" in swept.markdown()
    assert WARNING in swept.markdown()
    quality = {(q.steps, q.ensemble_size): q.value for q in swept.quality() if q.set == "pictures: chairs"}
    assert quality[4, 2] == 0.125
    assert {path.name for path in swept.save(tmp_path / "out")} == {"sweep.md", "sweep.json", "sweep.png"}
    with Image.open(tmp_path / "out/sweep.png") as plot:
        assert min(plot.size) > 200
    assert len(json.loads((tmp_path / "out/sweep.json").read_text())["points"]) == 3 * 2 * 3


def test_a_model_cannot_be_chosen_on_a_server(data: Path) -> None:
    with pytest.raises(InvalidInput, match="server chooses its own model"):
        main(data, url="http://127.0.0.1:1", model="other")


def test_a_model_of_a_repository_is_evaluated_in_this_process(
    data: Path, toy_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = main(data, repository=toy_repository, steps=1, out=tmp_path / "out", tasks=["depth", "amodal"])
    printed = capsys.readouterr()
    assert f"# Evaluation of {report.model} on pictures" in printed.out
    assert WARNING in printed.err
    assert report.options["depth"]["steps"] == 1
    assert len(report.pictures) == 4
    assert (tmp_path / "out/report.md").read_text() == report.markdown()


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    """Nothing listens on the port; the empty folder is named first."""
    command = [sys.executable, "-m", "training.evaluate", str(tmp_path), "--url", "http://127.0.0.1:1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "flow/: no items" in ran.stderr
    assert "Traceback" not in ran.stderr
