"""Training batches: what is drawn, and that the truth still fits the pictures after cropping, scaling and mirroring."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import cv2
import numpy as np
import pytest

from saccade.tasks import DepthCoding, FlowCoding
from tests.training.conftest import SIZE
from training.data import OPEN_FILES, Batch, Crop, Scenes, put_in_front, read_real
from training.train import Stage

TASKS = ("depth", "flow", "amodal")


def same(one: Batch, other: Batch) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(astuple(one), astuple(other), strict=True))


def test_a_batch_is_a_function_of_seed_step_task_and_size(shards: Path) -> None:
    first, second = Scenes(shards, seed=3), Scenes(shards, seed=3)
    ahead = {task: second.batch(8, task, 2, (32, 48)) for task in reversed(TASKS)}
    for task in TASKS:
        batch = first.batch(8, task, 2, (32, 48))
        assert same(batch, ahead[task])
        assert not same(batch, first.batch(9, task, 2, (32, 48)))
        assert not same(batch, Scenes(shards, seed=4).batch(8, task, 2, (32, 48)))
    assert not np.array_equal(ahead["depth"].image, ahead["flow"].image)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(32, 48), (64, 16)])
def test_batches_have_the_shapes_and_ranges_the_networks_expect(shards: Path, task: str, size: tuple[int, int]) -> None:
    batch = Scenes(shards).batch(0, task, 3, size)
    assert batch.image.shape == batch.prompt.shape == (3, 3, *size)
    assert batch.target.shape == (3, 4, *size)
    assert batch.weight.shape == (3, size[0] // 8, size[1] // 8)
    assert all(array.dtype == np.float32 for array in astuple(batch))
    assert all(np.abs(array).max() <= 1.001 for array in (batch.image, batch.prompt))
    assert np.abs(batch.target).max() <= 1.5
    assert (batch.weight == 1).all() or task == "amodal"  # which may be padded, as when serving
    assert (batch.weight[:, 0, 0] == 1).all()
    assert batch.image.std() > 0.05


def test_depth_is_near_in_front_and_its_prompt_is_blank(shards: Path) -> None:
    batch = Scenes(shards).batch(1, "depth", 8, (32, 32))
    assert not batch.prompt.any()
    assert not batch.target[:, 1:].any()
    nearest, farthest = batch.target[:, 0].min((1, 2)), batch.target[:, 0].max((1, 2))
    assert (nearest <= -0.99).all()
    assert (farthest >= 0.99).all()


def test_an_amodal_target_covers_the_visible_part_and_is_white_outside(shards: Path) -> None:
    batch = Scenes(shards).batch(1, "amodal", 8, (48, 48))
    visible, whole = batch.prompt[:, 0] > 0.9, batch.target[:, 0]
    assert (visible.any((1, 2)) & (whole < -0.9).any((1, 2))).all()
    assert (whole[visible] > 0.5).mean() > 0.99
    np.testing.assert_allclose(batch.target[:, 1][whole < -0.9], 1, atol=1e-5)
    np.testing.assert_allclose(batch.target[:, 2:][:, :, 0, 0][whole[:, 0, 0] < -0.9], 0, atol=1e-5)


def blobs(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 12, width // 12, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def fetch(second: np.ndarray, flow: np.ndarray) -> np.ndarray:
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(second, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture, the same zoomed and moved, and the flow between the two, known in closed form."""
    height, width = 120, 160
    first, zoom, shift = blobs(height, width), 1.03, np.array([3.0, -2.0])
    matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    second = cv2.warpAffine(first, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    at = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
    return first, second, (at * (zoom - 1) + shift).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_flow_follows_the_crop_the_resize_and_the_mirror(
    pair: tuple[np.ndarray, np.ndarray, np.ndarray], seed: int
) -> None:
    first, second, flow = pair
    size = [(64, 96), (96, 64), (160, 208)][seed % 3]
    crop = Crop.random(np.random.default_rng(seed), (120, 160), size, least=0.5)
    one, two, motion = crop.picture(first), crop.picture(second), crop.flow(flow)
    inner = slice(14, -14)
    error = np.abs(fetch(two, motion).astype(float) - one)[inner, inner]
    ignored = np.abs(two.astype(float) - one)[inner, inner]
    assert np.median(error) <= 3
    assert np.median(error) < 0.3 * np.median(ignored)


def test_both_mirrors_are_drawn() -> None:
    rng = np.random.default_rng(0)
    assert {Crop.random(rng, (120, 160), (64, 64), 0.5).mirror for _ in range(20)} == {True, False}


@pytest.mark.parametrize("full", [(48, 48), (120, 160), (300, 90)])
def test_random_crops_stay_inside_and_near_the_targets_shape(full: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for size in ((64, 64), (96, 32), (32, 96)):
        for crop in (Crop.random(rng, full, size, 0.6) for _ in range(50)):
            assert 0 <= crop.top <= crop.top + crop.height <= full[0]
            assert 0 <= crop.left <= crop.left + crop.width <= full[1]
            stretch = crop.width / crop.height / (size[1] / size[0])
            assert 0.75 < stretch < 1.35


def test_a_flow_batch_tells_where_its_second_frame_went(shards: Path) -> None:
    """The coded target, decoded as the server decodes it, brings the prompt onto the image."""
    scenes, size = Scenes(shards), (48, 48)
    followed, ignored = [], []
    for step in range(4):
        batch = scenes.batch(step, "flow", 8, size)
        for image, prompt, target in zip(batch.image, batch.prompt, batch.target, strict=True):
            flow = np.moveaxis(FlowCoding().decode(target[:2], max(size)), 0, -1)
            one, two = (np.moveaxis(p, 0, -1) - p.mean() for p in (image, prompt))
            if np.median(np.abs(one - two)) > 0.06:
                ignored.append(np.median(np.abs(one - two)))
                followed.append(np.median(np.abs(one - fetch(two, flow))))
    assert len(followed) >= 4
    assert np.median(followed) < 0.7 * np.median(ignored)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder in the true form: a white ramp, 1 to 3 m, known; and below it the unknown, black."""
    folder = tmp_path / "room"
    folder.mkdir()
    picture = np.zeros((96, 128, 3), np.uint8)
    picture[:64] = 250
    depth = np.zeros((96, 128), np.uint16)
    depth[:64] = np.linspace(1000, 3000, 128).round()
    cv2.imwrite(str(folder / "a_1.jpg"), picture)
    cv2.imwrite(str(folder / "a_1_depth_mm.png"), depth)
    return folder


def test_real_depth_is_read_in_metres(room: Path) -> None:
    picture, depth, known = read_real(room / "a_1_depth_mm.png")
    assert picture.shape == (96, 128, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_allclose(depth[0, [0, -1]], [1, 3], atol=1e-3)
    assert known[:64].all()
    assert not known[64:].any()


def test_colours_are_read_as_rgb(room: Path) -> None:
    cv2.imwrite(str(room / "a_1.jpg"), np.full((96, 128, 3), (0, 0, 255), np.uint8))
    assert read_real(room / "a_1_depth_mm.png")[0][0, 0].argmax() == 0


def test_what_is_unknown_weighs_nothing(shards: Path, room: Path) -> None:
    scenes = Scenes(shards, (room,), real_share=1.0)
    batch = scenes.batch(0, "depth", 16, (64, 64))
    bright = batch.image.mean(1).reshape(16, 8, 8, 8, 8).mean((2, 4))
    middle = (bright.max((1, 2)) + bright.min((1, 2)))[:, None, None] / 2
    assert batch.weight.min() == 0
    assert batch.weight.max() == 1
    edge = np.abs(bright - middle) < 0.6 * np.ptp(bright, (1, 2))[:, None, None] / 2
    mixed = np.ptp(bright, (1, 2))[:, None, None] > 0.8
    clear = mixed & ~edge
    assert clear.sum() > 200
    np.testing.assert_array_equal((batch.weight > 0)[clear], (bright > middle)[clear])


def test_the_unknown_does_not_move_the_known(shards: Path, room: Path) -> None:
    """Zeros for "unknown" are not depths: the known ramp spans the code by itself."""
    batch = Scenes(shards, (room,), real_share=1.0).batch(0, "depth", 16, (64, 64))
    for target, weight in zip(batch.target[:, 0], batch.weight, strict=True):
        known = target[np.kron(weight, np.ones((8, 8))) > 0]
        assert known.min() < -0.9
        assert known.max() > 0.9
        assert abs(known.mean()) < 0.2


@pytest.mark.parametrize("fault", ["no picture", "another size"])
def test_a_depth_without_its_picture_is_refused(room: Path, fault: str) -> None:
    (room / "a_1.jpg").unlink()
    if fault == "another size":
        cv2.imwrite(str(room / "a_1.jpg"), np.zeros((96, 100, 3), np.uint8))
    with pytest.raises(ValueError, match="a_1_depth_mm"):
        read_real(room / "a_1_depth_mm.png")


def test_empty_folders_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.scenes\.make"):
        Scenes(tmp_path)
    with pytest.raises(FileNotFoundError, match="depth_mm"):
        Scenes(shards, (tmp_path,), 0.1)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * OPEN_FILES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_descriptors")
def test_hundreds_of_shards_need_few_open_files(shards: Path, tmp_path: Path) -> None:
    for number in range(60):
        for kind in ("solid", "layered"):
            (tmp_path / f"{kind}-{number:05d}").symlink_to(shards / f"{kind}-00000")
    scenes = Scenes(tmp_path)
    for step in range(5):
        for task in TASKS:
            assert scenes.batch(step, task, 24, (SIZE, SIZE)).image.any()


@pytest.mark.parametrize("seed", range(20))
def test_an_object_put_in_front_hides_only_what_is_farther(seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture, known = np.zeros((48, 64, 3), np.uint8), np.ones((48, 64), bool)
    depth = np.tile(np.linspace(1, 9, 64, dtype=np.float32), (48, 1))
    known[:, :8] = False
    before = depth.copy()
    mask = np.zeros((32, 32), bool)
    mask[4:30, 10:22] = True
    put_in_front(picture, depth, known, np.full((32, 32, 3), 200, np.uint8), mask, rng)
    changed = depth != before
    np.testing.assert_array_equal(changed, picture.any(-1))
    assert (depth[changed] < before[changed]).all()
    assert np.ptp(depth[changed]) == 0 if changed.any() else True
    assert not changed[~known].any()


def test_crops_around_an_object_hold_it_and_are_hardly_stretched() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left = rng.integers(0, 60), rng.integers(0, 80)
        mask = np.zeros((120, 160), bool)
        mask[top : top + rng.integers(8, 40), left : left + rng.integers(8, 40)] = True
        size = [(64, 64), (96, 64), (64, 96)][rng.integers(3)]
        crop = Crop.around(mask, rng, size)
        assert crop.top >= 0
        assert crop.left >= 0
        assert crop.top + crop.height <= 120
        assert crop.left + crop.width <= 160
        inside = mask[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        assert inside.sum() == mask.sum()
        full = crop.height == 120 or crop.width == 160
        assert full or 0.97 < crop.width / crop.height / (size[1] / size[0]) < 1.03


def test_what_does_not_fit_is_padded_and_not_stretched() -> None:
    """A wide object in a picture as wide: square pixels stay square within 15%, below it the last row repeats."""
    mask = np.zeros((60, 200), bool)
    mask[20:40, 5:195] = True
    crop = Crop.around(mask, np.random.default_rng(0), (96, 96))
    height, width = crop.filled
    assert width == 96
    assert 1 / 1.16 < (height / crop.height) / (width / crop.width) < 1.16
    picture = np.repeat(np.random.default_rng(1).integers(0, 255, (60, 200, 1)), 3, -1).astype(np.uint8)
    out = crop.picture(picture)
    assert out.shape == (96, 96, 3)
    np.testing.assert_array_equal(out[height:], np.repeat(out[height - 1 : height], 96 - height, 0))
    np.testing.assert_array_equal(crop.seen(), np.arange(96)[:, None] * np.ones(96) < height)


def test_padding_weighs_nothing(shards: Path) -> None:
    batches = [Scenes(shards).batch(step, "amodal", 8, (16, 64)) for step in range(4)]
    weight = np.concatenate([batch.weight for batch in batches])
    assert 0 < weight.mean() < 1
    assert (np.diff(weight[:, 0], axis=-1) <= 0).all()  # it is on the right


def test_the_sky_leaves_the_range_to_what_stands_on_the_ground(shards: Path, tmp_path: Path) -> None:
    """Where depth was clipped there is no depth: it is coded as beyond everything, and does not squeeze the rest."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    file = next(folder.glob("solid-*")) / "depth.npy"
    depth = np.load(file)
    height = depth.shape[1]
    depth[:] = np.linspace(20, 4, height)[:, None].astype(depth.dtype)
    depth[:, : height // 4] = 120
    np.save(file, depth)
    target = Scenes(folder, coding=DepthCoding()).batch(0, "depth", 4, (48, 48)).target[:, 0]
    sky = target >= 1.25
    assert sky.any(axis=(1, 2)).any()
    ground = [rows[~above] for rows, above in zip(target, sky, strict=True)]
    assert all(np.ptp(values) > 1.8 for values in ground)


def test_tasks_may_have_numbers_of_their_own() -> None:
    stage = Stage(1, ((32, 32),), {"depth": 3, "flow": 2, "amodal": 1}, 1e-3, 1e-3)
    assert [stage.samples(task) for task in ("depth", "flow", "amodal")] == [3, 2, 1]
    assert Stage(1, ((32, 32),), 5, 1e-3, 1e-3).samples("flow") == 5
