"""The command `saccade`: most of it in this process, ends and signals in processes of their own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from saccade import formats
from saccade.card import Card
from saccade.cli import main
from saccade.client import Client
from saccade.errors import ServerError
from saccade.local import Local
from server.settings import PREFIX, Settings
from tests.client.conftest import Scene

EXAMPLES = Path(__file__).parents[2] / "examples"


class Said(NamedTuple):
    code: int
    out: str
    err: str


Saccade = Callable[..., Said]


@pytest.fixture
def saccade(
    tmp_path: Path, toy_repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Saccade:
    """Run the command in an empty folder, the toy model at hand."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SACCADE_MODEL_REPOSITORY", str(toy_repository))
    monkeypatch.delenv("SACCADE_URL", raising=False)

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, *capfd.readouterr())

    return run


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def refused(said: Said, *words: str) -> None:
    """Exit code 2 and one clear line."""
    assert said.code == 2
    assert said.err.startswith("saccade: ")
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err


def test_depth_to_look_at(saccade: Saccade, scene: Scene, local: Local) -> None:
    said = saccade("depth", scene.image, "-o", "out.png", "--seed", "4")
    assert said == (0, "out.png\n", "")
    expected = formats.colorize_depth(local.depth(scene.image, seed=4).prediction)
    assert np.array_equal(pixels("out.png"), expected)


def test_without_a_name_the_answer_lands_here(saccade: Saccade, scene: Scene) -> None:
    assert saccade("depth", scene.image).out == "a_depth.png\n"
    assert saccade("flow", scene.image, scene.next_image, "--format", "flo").out == "a_flow.flo\n"
    assert saccade("amodal", scene.image, "--mask", scene.mask).out == "a_amodal.png\n"
    assert sorted(path.name for path in Path().iterdir()) == ["a_amodal.png", "a_depth.png", "a_flow.flo"]


def test_amodal_cuts_the_object_out(saccade: Saccade, scene: Scene, local: Local) -> None:
    assert saccade("amodal", scene.image, "--mask", scene.mask, "-o", "object.png").code == 0
    assert np.array_equal(pixels("object.png"), local.amodal(scene.image, scene.mask).completed)


@pytest.mark.parametrize("render", ["data", "color"])
def test_amodal_rendered_otherwise(render: str, saccade: Saccade, scene: Scene, local: Local) -> None:
    assert saccade("amodal", scene.image, "--mask", scene.mask, "-o", "out.png", "--render", render).code == 0
    mask = local.amodal(scene.image, scene.mask).prediction
    painted = formats.colorize_mask(pixels(scene.image), mask)
    expected = mask.astype(np.uint8) * 255 if render == "data" else painted
    assert np.array_equal(pixels("out.png"), expected)


def test_data_of_every_format(saccade: Saccade, scene: Scene, local: Local) -> None:
    flow = local.flow(scene.image, scene.next_image).prediction
    for ending in ("npy", "npz", "flo", "pfm", "exr", "json", "png"):
        assert saccade("flow", scene.image, scene.next_image, "-o", f"out.{ending}", "--render", "data").code == 0
    read = {path.suffix: path.read_bytes() for path in Path().iterdir()}
    exr = formats.read_exr(read[".exr"])
    found = [
        formats.read_npy(read[".npy"]),
        formats.read_npz(read[".npz"])["prediction"],
        formats.read_flo(read[".flo"]),
        formats.read_pfm(read[".pfm"])[..., :2],
        np.stack([exr["U"], exr["V"]], axis=-1),
    ]
    assert all(np.array_equal(one, flow) for one in found)
    assert np.abs(formats.read_kitti_flow(read[".png"])[0] - flow).max() <= 1 / 128
    assert json.loads(read[".json"])["options"]["seed"] == 0


def test_every_option_is_passed_on(saccade: Saccade, scene: Scene) -> None:
    turned = {
        "steps": 3,
        "ensemble_size": 2,
        "reduction": "mean",
        "seed": 9,
        "spacing": "linspace",
        "processing_resolution": 32,
    }
    flags = [text for name, value in turned.items() for text in ("--" + name.replace("_", "-"), value)]
    said = saccade(
        "depth", scene.image, "-o", "out.json", *flags, "--no-match-input-resolution", "--output-uncertainty"
    )
    assert said.code == 0
    written = json.loads(Path("out.json").read_text())
    assert written["options"] == turned | {"match_input_resolution": False, "output_uncertainty": True}
    assert written["shape"] == [24, 32]


@pytest.mark.parametrize("url", ["embedded"], indirect=True, scope="session")
def test_a_server_answers_as_this_process_does(saccade: Saccade, scene: Scene, url: str) -> None:
    assert saccade("depth", scene.image, "-o", "here.npy", "--threads", "1", "--batch-size", "2").code == 0
    assert saccade("depth", scene.image, "-o", "there.npy", "--url", url).code == 0
    assert Path("here.npy").read_bytes() == Path("there.npy").read_bytes()


def test_every_server_answers_nearly_as_this_process_does(saccade: Saccade, scene: Scene, url: str) -> None:
    assert saccade("depth", scene.image, "-o", "here.npy", "--threads", "1", "--batch-size", "2").code == 0
    assert saccade("depth", scene.image, "-o", "there.npy", "--url", url).code == 0
    np.testing.assert_allclose(np.load("there.npy"), np.load("here.npy"), atol=0.01)


def test_a_server_may_be_named_by_the_environment(
    saccade: Saccade, scene: Scene, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACCADE_MODEL_REPOSITORY", "nowhere")
    monkeypatch.setenv("SACCADE_URL", url)
    assert saccade("depth", scene.image, "-o", "there.npy").code == 0


def test_a_folder_goes_on_past_a_bad_picture(saccade: Saccade, scene: Scene) -> None:
    photos = Path("photos")
    photos.mkdir()
    for name in ("one.png", "three.PNG", ".hidden.png"):
        shutil.copy(scene.image, photos / name)
    (photos / "two.jpg").write_bytes(b"\xff\xd8\xff broken")
    (photos / "notes.txt").write_text("not a picture")
    said = saccade("depth", photos, "-o", "depths")
    assert said.code == 1
    assert "2 of 3 written to depths" in said.out
    assert [line for line in said.err.splitlines() if line.startswith("saccade: photos/two.jpg: ")]
    assert sorted(path.name for path in Path("depths").iterdir()) == ["one.png", "three.png"]


def test_a_folder_against_a_server(saccade: Saccade, scene: Scene, url: str) -> None:
    Path("photos").mkdir()
    shutil.copy(scene.image, "photos/one.png")
    Path("photos/two.png").write_bytes(b"no picture")
    said = saccade("depth", "photos", "--format", "npy", "--url", url)
    assert said.code == 1
    assert "photos/two.png: 415" in said.err
    assert [path.name for path in Path("photos_depth").iterdir()] == ["one.npy"]


def test_several_files_and_names_that_collide(saccade: Saccade, scene: Scene) -> None:
    Image.fromarray(pixels(scene.image)).save("a.bmp")
    said = saccade("depth", scene.image, "a.bmp", scene.next_image, "-o", "out")
    assert said.code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.bmp.png", "a.png.png", "b.png"]


def test_a_folder_that_is_there_may_be_named_for_one_picture(saccade: Saccade, scene: Scene) -> None:
    Path("out").mkdir()
    assert saccade("depth", scene.image, "-o", "out", "--format", "npy").out == "out/a.npy\n"
    assert np.load("out/a.npy").shape == (48, 64)


def test_answers_never_replace_one_another(saccade: Saccade, scene: Scene) -> None:
    for folder in ("one", "two"):
        Path(folder).mkdir()
        shutil.copy(scene.image, Path(folder) / "same.png")
    refused(saccade("depth", "one", "two", "-o", "out"), "same")
    assert not Path("out").exists()


def test_flow_over_a_folder_takes_neighbours_in_the_order_of_counting(
    saccade: Saccade, scene: Scene, local: Local
) -> None:
    Path("frames").mkdir()
    for name, source in (("f9.png", scene.image), ("f10.png", scene.next_image), ("f100.png", scene.image)):
        shutil.copy(source, Path("frames") / name)
    assert saccade("flow", "frames", "-o", "out", "--format", "npy").code == 0
    expected = {
        "f9.npy": local.flow(scene.image, scene.next_image).prediction,
        "f10.npy": local.flow(scene.next_image, scene.image).prediction,
    }
    assert {path.name for path in Path("out").iterdir()} == set(expected)
    assert all(np.array_equal(np.load(Path("out") / name), flow) for name, flow in expected.items())


def test_masks_of_a_folder_are_found_by_name(saccade: Saccade, scene: Scene) -> None:
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    for name in ("x", "y"):
        shutil.copy(scene.image, f"photos/{name}.png")
        Image.fromarray(pixels(scene.mask)).save(f"masks/{name}.bmp")
    assert saccade("amodal", "photos", "--mask", "masks", "-o", "out").code == 0
    assert len(list(Path("out").iterdir())) == 2
    Path("masks/y.bmp").unlink()
    refused(saccade("amodal", "photos", "--mask", "masks", "-o", "out"), "y.png", "masks")


def test_what_cannot_be_is_refused_in_one_line(saccade: Saccade, scene: Scene, url: str) -> None:
    Path("broken.png").write_bytes(scene.image.read_bytes()[:300])
    Path("empty").mkdir()
    depth = ("depth", scene.image)
    refused(saccade("depth", "nowhere.png"), "nowhere.png")
    refused(saccade("depth", "broken.png"), "decoded")
    refused(saccade("depth", "empty"), "empty")
    refused(saccade(*depth, "-o", "out.gif"), ".png", ".npy")
    refused(saccade(*depth, "-o", "out.flo"), "flo", "pfm")
    refused(saccade(*depth, "--render", "object"), "object", "color")
    refused(saccade(*depth, "-o", "out.npy", "--render", "color"), "png")
    refused(saccade(*depth, "--output-uncertainty", "--ensemble-size", "2"), "npz")
    refused(saccade(*depth, "-o", "out.npz", "--output-uncertainty"), "ensemble_size")
    refused(saccade(*depth, "--steps", "0"), "steps")
    refused(saccade(*depth, "--steps", "0", "--url", url), "422", "steps")
    refused(saccade(*depth, "--url", url, "--model", "toy"), "--model")
    refused(saccade(*depth, "--url", "photo.jpg"), "URL")
    refused(saccade("flow", scene.image), "two frames")
    refused(saccade("flow", scene.image, EXAMPLES / "photo.jpg"), "next_image")
    refused(saccade("depth", scene.image, scene.next_image), "-o")
    refused(saccade("depth", scene.image, scene.next_image, "-o", "out.png"), "folder")
    assert not list(Path().glob("out*"))


def test_an_answer_never_replaces_its_picture(saccade: Saccade, scene: Scene) -> None:
    Path("photos").mkdir()
    shutil.copy(scene.image, "photos/one.png")
    before = Path("photos/one.png").read_bytes()
    refused(saccade("depth", "photos/one.png", "-o", "photos/one.png"), "overwritten")
    refused(saccade("depth", "photos", "-o", "photos"), "overwritten")
    assert Path("photos/one.png").read_bytes() == before


def test_faults_that_are_not_the_callers(saccade: Saccade, scene: Scene) -> None:
    nobody = saccade("depth", scene.image, "--url", "http://127.0.0.1:9")
    assert (nobody.code, nobody.err.count("\n")) == (1, 1)
    assert "cannot reach http://127.0.0.1:9" in nobody.err
    models = saccade("depth", scene.image, "--model-repository", "nowhere")
    assert (models.code, models.err) == (1, "saccade: the model repository is not a directory: nowhere\n")
    Path("file").touch()
    unwritable = saccade("depth", scene.image, "-o", "file/out.png")
    assert (unwritable.code, unwritable.err.count("\n")) == (1, 1)


def test_a_refused_key_names_the_option(saccade: Saccade, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(client: Client) -> list[Card]:
        raise ServerError(401, {"title": "Unauthorized", "detail": "No key came."})

    monkeypatch.setattr(Client, "models", refuse)
    refused(saccade("models", "--url", "http://saccade"), "401", "--api-key", "SACCADE_API_KEY")


def test_models(saccade: Saccade, url: str, local: Local) -> None:
    said = saccade("models")
    assert said.code == 0
    facts = ("toy", "depth", "flow", "amodal", "Apache-2.0", local.models()[0].digest[:12])
    assert all(fact in said.out for fact in facts)
    here, there = saccade("models", "--json"), saccade("models", "--json", "--url", url)
    assert json.loads(here.out) == json.loads(there.out) == [card.model_dump(mode="json") for card in local.models()]


def test_version(saccade: Saccade) -> None:
    from saccade import __version__

    assert saccade("--version") == (0, f"saccade {__version__}\n", "")


def test_every_setting_of_the_server_is_a_flag(saccade: Saccade) -> None:
    said = saccade("serve", "--help")
    assert said.code == 0
    for name in Settings.model_fields:
        assert "--" + name.replace("_", "-") in said.out
        assert f"[{PREFIX}{name.upper()}]" in " ".join(said.out.split())


def test_serve_refuses_bad_settings(saccade: Saccade) -> None:
    refused(saccade("serve", "--max-steps", "0"), "max_steps")
    refused(saccade("serve", "--config", "nowhere.toml"), "nowhere.toml")
    assert saccade("serve", "--prot", "80").code == 2


def test_evaluate_says_what_the_folder_lacks(saccade: Saccade) -> None:
    refused(saccade("evaluate", "nowhere"), "nowhere")
    Path("empty").mkdir()
    said = saccade("evaluate", "empty")
    assert (said.code, said.out) == (2, "")
    assert "depth/" in said.err


@pytest.mark.parametrize("option", [("--run", "run"), ("--device", "cuda"), ("--batch-size", "4")])
def test_graphs_are_not_evaluated_in_a_runs_place(saccade: Saccade, option: tuple[str, str]) -> None:
    refused(saccade("evaluate", ".", *option), "--backend torch")


def test_train_wants_a_recipe(saccade: Saccade) -> None:
    refused(saccade("train", "nowhere.toml", "-o", "run"), "nowhere.toml")


def test_train_hands_on_where_it_runs(saccade: Saccade, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("training.train.main", given.append)
    Path("recipe.toml").touch()
    assert saccade("train", "recipe.toml", "-o", "run", "--device", "cuda:1", "--threads", "3").code == 0
    assert given == [["recipe.toml", "--out", "run", "--threads", "3", "--device", "cuda:1"]]


STAGES = ("pretrain", "encode", "finetune", "upcycle", "adapt")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_explains_its_fields_and_refuses_others(saccade: Saccade, stage: str) -> None:
    said = saccade(stage, "--help")
    assert said.code == 0
    assert "codec.kind (dct|autoencoder)" in said.out
    assert "[default: " in said.out
    refused(saccade(stage, "-o", "run", "codecc.kind=dct"), "codecc", "codec")
    refused(saccade(stage, "nowhere.toml", "-o", "run"), "nowhere.toml")
    assert saccade(stage).code == 2
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("export", "nowhere", "repository"),
        ("scaling", "nowhere", "-o", "out"),
        ("evaluate", ".", "--backend", "torch", "--run", "nowhere"),
        ("evaluate", ".", "--backend", "torch", "--run", ".", "--model", "nowhere"),
    ],
)
def test_what_is_not_there_is_named(saccade: Saccade, words: tuple[str, ...]) -> None:
    refused(saccade(*words), "a run is no model" if "--model" in words else "nowhere")


@pytest.mark.parametrize("command", ["evaluate", "train", "export", "scaling", "import", *STAGES])
def test_without_the_extra_the_wing_says_what_to_install(
    command: str, saccade: Saccade, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "training"]:
        monkeypatch.delitem(sys.modules, name)
    Path("there").mkdir() if command == "evaluate" else Path("there").touch()
    more = ["there", "out"] if command in ("export", "import") else ["there", "-o", "out"]
    said = saccade(command, *more)
    assert said.code == 1
    assert said.err.count("\n") == 1
    assert "pip install 'saccade[train]'" in said.err


def test_the_examples_of_the_project(saccade: Saccade) -> None:
    assert saccade("depth", EXAMPLES / "photo.jpg", "-o", "depth.png").code == 0
    assert saccade("flow", EXAMPLES / "frame_1.png", EXAMPLES / "frame_2.png", "-o", "motion.flo").code == 0
    mask = EXAMPLES / "occluded_mask.png"
    assert saccade("amodal", EXAMPLES / "occluded.jpg", "--mask", mask, "-o", "object.png").code == 0
    assert pixels("depth.png").shape == pixels(EXAMPLES / "photo.jpg").shape
    assert formats.read_flo(Path("motion.flo").read_bytes()).shape[:2] == pixels(EXAMPLES / "frame_1.png").shape[:2]
    assert pixels("object.png").shape == (*pixels(mask).shape[:2], 4)


def test_a_real_process_ends_without_a_traceback(tmp_path: Path, quiet: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "saccade", "depth", "nowhere.jpg"],
        cwd=tmp_path,
        env=quiet,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "saccade: no such file or folder: nowhere.jpg\n")


def test_ctrl_c_ends_a_folder_cleanly(
    tmp_path: Path, toy_repository: Path, quiet: dict[str, str], scene: Scene
) -> None:
    """The first picture is done in a moment, the second would take minutes."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (16, 16), "red").save(photos / "1.png")
    Image.fromarray(pixels(scene.image)).resize((1024, 1024)).save(photos / "2.png")
    command = [sys.executable, "-m", "saccade", "depth", "photos", "-o", "out", "--steps", "1000"]
    command += ["--processing-resolution", "0", "--model-repository", str(toy_repository)]
    # Whoever runs the tests in the background may ignore SIGINT, and children inherit that.
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=quiet,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        while not (tmp_path / "out" / "1.png").exists():
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 130
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "2.png").exists()
