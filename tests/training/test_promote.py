"""Whether a candidate is promoted, and that nothing but the one key of the one ConfigMap is touched."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from saccade.errors import InvalidInput, ModelError, SaccadeError
from saccade.pipeline import Options
from saccade.repository import Repository
from saccade.tasks import TaskName
from training import promote, refresh
from training.promote import ConfigMap, Evaluation, compare
from training.report import PictureScore, Report
from training.train import Recipe, Run

MEANS = {("depth", "all", "abs_rel"): 0.2, ("depth", "all", "delta1"): 0.7, ("flow", "all", "epe_px"): 4.0}


def write(folder: Path, model: str, means: dict[tuple[str, str, str], Any] = MEANS, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"task": t, "group": g, "metric": m, "pictures": 1, "value": value} for (t, g, m), value in means.items()]
    report = {"data": "pictures", "model": model, "means": listed, "pictures": [{"task": "depth", "name": "a"}], **more}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., promote.Verdict]:
    """The verdict on a candidate whose means are those of the current model with some changed."""

    def judge(tolerance: float = 0.0, **changed: float) -> promote.Verdict:
        means = {place: changed.get(place[2], value) for place, value in MEANS.items()}
        current = Evaluation.read(write(tmp_path / "current", "old"))
        return compare(current, Evaluation.read(write(tmp_path / "candidate", "new", means)), tolerance)

    return judge


def test_as_good_is_good_enough(both: Callable[..., promote.Verdict]) -> None:
    assert both().promote


@pytest.mark.parametrize("better", [{"abs_rel": 0.1}, {"delta1": 0.8}, {"epe_px": 3.0}])
def test_better_is_promoted(both: Callable[..., promote.Verdict], better: dict[str, float]) -> None:
    assert both(**better).promote


@pytest.mark.parametrize("worse", [{"abs_rel": 0.2001}, {"delta1": 0.6999}, {"epe_px": 4.001}])
def test_worse_in_one_mean_is_kept_out_whatever_the_others_gain(
    both: Callable[..., promote.Verdict], worse: dict[str, float]
) -> None:
    gains = {"abs_rel": 0.01, "delta1": 0.99, "epe_px": 0.1}
    verdict = both(**gains | worse)
    assert not verdict.promote
    assert [row.place[2] for row in verdict.worse] == list(worse)
    assert "new is worse in 1 of 3 means than old" in str(verdict)


@pytest.mark.parametrize(
    ("changed", "promoted"), [({"abs_rel": 0.2019}, True), ({"abs_rel": 0.21}, False), ({"delta1": 0.694}, True)]
)
def test_the_tolerance_is_a_share_of_the_current_value(
    both: Callable[..., promote.Verdict], changed: dict[str, float], promoted: bool
) -> None:
    assert both(tolerance=0.01, **changed).promote is promoted


def test_a_current_value_of_zero_can_only_be_equalled(tmp_path: Path) -> None:
    perfect = {("flow", "all", "epe_px"): 0.0}
    current = Evaluation.read(write(tmp_path / "current", "old", perfect))
    same = Evaluation.read(write(tmp_path / "same", "new", perfect))
    worse = Evaluation.read(write(tmp_path / "worse", "new", {("flow", "all", "epe_px"): 1e-6}))
    assert compare(current, same).promote
    assert not compare(current, worse, tolerance=0.5).promote


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        ({"pictures": [{"task": "depth", "name": "b"}]}, "different pictures"),
        ({"pictures": []}, "different pictures"),
        ({"means": {("depth", "all", "abs_rel"): 0.1}}, "different pictures, tasks or metrics"),
        ({"model": "old"}, "both reports are of old"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, candidate: dict[str, Any], said: str) -> None:
    current = Evaluation.read(write(tmp_path / "current", "old"))
    other = Evaluation.read(write(tmp_path / "candidate", **{"model": "new", **candidate}))
    with pytest.raises(InvalidInput, match=said):
        compare(current, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "good", None])
def test_a_mean_that_is_no_number_is_refused(tmp_path: Path, value: object) -> None:
    write(tmp_path, "new", {("depth", "all", "abs_rel"): value})
    with pytest.raises(InvalidInput, match=r"report\.json: means\.0\.value"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"model": "m"}'])
def test_a_report_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"report\.json"):
        Evaluation.read(tmp_path)


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "new", {("depth", "all", "rmse"): 1.0})
    with pytest.raises(InvalidInput, match="not known whether more is better of rmse"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize("name", ["", "../other", "a b", "x" * 200])
def test_what_is_no_model_name_never_reaches_the_config_map(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="not a model name"):
        Evaluation.read(write(tmp_path, name))


def test_it_reads_what_saccade_evaluate_writes(tmp_path: Path) -> None:
    tasks: dict[TaskName, dict[str, Any]] = {"depth": vars(Options())}
    score = PictureScore(
        "depth", "a", ("all",), 1.0, {"abs_rel": 0.2, "delta1": 0.7}, {}, 0.1, np.zeros((2, 2, 3), "u1")
    )
    (tmp_path / "report.json").write_text(Report("pictures", "m", "", tasks, (score,)).json())
    assert Evaluation.read(tmp_path).values == {("depth", "all", "abs_rel"): 0.2, ("depth", "all", "delta1"): 0.7}


@pytest.fixture
def api() -> tuple[ConfigMap, list[httpx.Request], list[httpx.Response]]:
    """A ConfigMap, what it was asked, and what it answers."""
    asked: list[httpx.Request] = []
    answers: list[httpx.Response] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answers.pop()

    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="https://api")
    return ConfigMap("saccade-model", client, "space"), asked, answers


def test_a_move_tests_the_old_name_and_keeps_it(
    api: tuple[ConfigMap, list[httpx.Request], list[httpx.Response]],
) -> None:
    config_map, asked, answers = api
    answers.append(httpx.Response(200, json={}))
    config_map.move("old", "new")
    (request,) = asked
    assert (request.method, request.url.path) == ("PATCH", "/api/v1/namespaces/space/configmaps/saccade-model")
    assert request.headers["content-type"] == "application/json-patch+json"
    assert json.loads(request.content) == [
        {"op": "test", "path": "/data/model", "value": "old"},
        {"op": "add", "path": "/data/previous", "value": "old"},
        {"op": "replace", "path": "/data/model", "value": "new"},
    ]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (422, "the server rejected our request", "does not name old any more"),
        (403, json.dumps({"kind": "Status", "message": "forbidden: cannot patch"}), "forbidden: cannot patch"),
        (404, json.dumps({"message": 'configmaps "saccade-model" not found'}), "not found"),
        (500, "<html>", "status 500"),
    ],
)
def test_what_the_api_refuses_is_said(
    api: tuple[ConfigMap, list[httpx.Request], list[httpx.Response]], status: int, body: str, said: str
) -> None:
    config_map, _, answers = api
    answers.append(httpx.Response(status, text=body))
    with pytest.raises(SaccadeError, match=said):
        config_map.move("old", "new")


def test_an_api_that_is_away_is_said() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client = httpx.Client(transport=httpx.MockTransport(away), base_url="https://api")
    with pytest.raises(SaccadeError, match="does not answer"):
        ConfigMap("saccade-model", client, "space").move("old", "new")


def test_outside_a_pod_there_is_no_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SaccadeError, match="no access to the Kubernetes API"):
        ConfigMap.here("saccade-model", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(SaccadeError, match="no access to the Kubernetes API"):  # no token was mounted
        ConfigMap.here("saccade-model", tmp_path)


@pytest.mark.parametrize(("host", "url"), [("10.0.0.1", "https://10.0.0.1:443"), ("fd00::1", "https://[fd00::1]:443")])
def test_inside_a_pod_the_token_goes_to_the_api_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(ssl, "create_default_context", lambda cafile: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    for name, content in (("namespace", "space\n"), ("token", "secret\n"), ("ca.crt", "")):
        (tmp_path / name).write_text(content)
    config_map = ConfigMap.here("saccade-model", tmp_path)
    assert config_map.client.base_url == url
    assert config_map.namespace == "space"
    assert config_map.client.headers["authorization"] == "Bearer secret"


def test_the_command_says_the_verdict_and_leaves_a_worse_candidate_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current, worse = write(tmp_path / "a", "old"), write(tmp_path / "b", "new", {p: v * 1.1 for p, v in MEANS.items()})
    promote.main([str(current), str(worse), "--config-map", "saccade-model"])  # outside a pod: it would raise
    assert capsys.readouterr().out.endswith("new is worse in 2 of 3 means than old\n")


@pytest.mark.parametrize("tolerance", ["-0.1", "1", "nan", "some"])
def test_a_tolerance_that_is_no_share_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tolerance: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        promote.main([str(tmp_path), str(tmp_path), f"--tolerance={tolerance}"])
    assert "--tolerance" in capsys.readouterr().err


def test_the_exit_status_tells_whose_fault_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    current, same = write(tmp_path / "a", "old"), write(tmp_path / "b", "new")
    for arguments, status in (
        ([str(tmp_path), str(tmp_path)], 2),
        ([str(current), str(same), "--config-map=saccade-model"], 1),
    ):
        monkeypatch.setattr("sys.argv", ["promote", *arguments])
        with pytest.raises(SystemExit) as ended:
            promote.run()
        assert ended.value.code == status
        assert capsys.readouterr().err.startswith("promote: ")


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Training and exporting, told apart and not done."""
    done: list[Any] = []
    monkeypatch.setattr(Run, "__init__", lambda self, recipe, out: setattr(self, "out", out))
    monkeypatch.setattr(Run, "train", lambda self: done.append(self.out))
    monkeypatch.setattr(refresh, "open_run", lambda run: (run, {"training": {"samples": 4, "wall_clock_s": 1.0}}))
    monkeypatch.setattr(refresh, "export", lambda *arguments: done.append(arguments))
    return done


def test_a_refresh_has_a_name_of_its_own_and_the_facts_of_the_model_it_is_like(
    toy_repository: Path, tmp_path: Path, recipe: Recipe, stubbed: list[Any]
) -> None:
    repository = Repository(toy_repository)
    (like,) = repository.denoisers()
    refresh.refresh("candidate", like, recipe, tmp_path, toy_repository)
    trained, (exported, facts, into) = stubbed
    assert (trained, exported, into) == (tmp_path / "candidate", tmp_path / "candidate", toy_repository)
    card = repository.card(like)
    assert facts["name"] == "candidate"
    assert facts["licence"] == card.licence
    assert facts["tasks"].keys() == card.tasks.keys()
    assert "quality" not in facts  # nobody has measured it yet
    assert facts["training"]["data"] == card.training.data
    assert facts["training"]["samples"] == 4
    assert str(len(os.sched_getaffinity(0))) in facts["training"]["device"]


@pytest.mark.parametrize(("name", "error"), [("same", InvalidInput), ("../x", ModelError), ("new", ModelError)])
def test_a_refresh_never_touches_the_model_that_serves(
    tmp_path: Path, recipe: Recipe, stubbed: list[Any], name: str, error: type[SaccadeError]
) -> None:
    with pytest.raises(error):
        refresh.refresh(name, "same", recipe, tmp_path / "runs", tmp_path)
    assert stubbed == []
