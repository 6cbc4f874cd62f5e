"""Every reader against tiny files of the true format, written by other libraries; and against broken ones."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

from saccade.errors import InvalidInput
from saccade.tasks import FlowCoding
from tests.training import datasets
from tests.training.datasets import HEIGHT, WIDTH, Truth
from training.data import READERS, Folders, TooManyFaults, open_reader
from training.data.raw import RawAmodal, RawDepth, RawFlow
from training.data.readers.hypersim import planar_share
from training.data.readers.imagenet import ImageNet

MAKERS: dict[str, tuple[Callable[[Path], Truth], dict[str, object]]] = {
    "hypersim": (datasets.hypersim, {}),
    "hypersim-processed": (datasets.hypersim_processed, {}),
    "nyu": (datasets.nyu_mat, {}),
    "kitti-depth": (datasets.kitti_depth, {}),
    "kitti-flow": (datasets.kitti_flow, {}),
    "chairs": (datasets.chairs, {}),
    "things": (datasets.things, {}),
    "sintel": (datasets.sintel, {}),
    "sintel-depth": (datasets.sintel, {}),
    "pix2gestalt": (datasets.pix2gestalt, {"split": "all"}),
}
DEPTH_STEP = 1 / 250  # of a 16-bit float at 4 metres, or of KITTI's 1/256


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(kind: str, folder: Path, **more: object) -> tuple[object, Truth]:
    make, options = MAKERS[kind]
    truth = make(folder)
    return open_reader(kind, folder, **{**options, **more}), truth


def test_every_dataset_is_tried() -> None:
    assert set(MAKERS) == set(READERS)


@pytest.mark.parametrize("kind", [k for k in MAKERS if READERS[k][2] == "depth" and k != "sintel-depth"])
def test_depth_is_planar_metres(kind: str, tmp_path: Path) -> None:
    reader, truth = opened(kind, tmp_path)
    raw = reader.read(0)
    assert isinstance(raw, RawDepth)
    assert raw.depth.dtype == np.float32
    np.testing.assert_array_equal(raw.known, truth.known)
    np.testing.assert_allclose(raw.depth, truth.values, atol=DEPTH_STEP)
    assert np.abs(raw.image.astype(int) - truth.image).mean() < 3  # JPEG


@pytest.mark.parametrize("kind", [k for k in MAKERS if READERS[k][2] == "flow"])
def test_flow_is_pixels_to_the_next_frame(kind: str, tmp_path: Path) -> None:
    reader, truth = opened(kind, tmp_path)
    raw = reader.read(0)
    assert isinstance(raw, RawFlow)
    np.testing.assert_array_equal(raw.known, truth.known)
    np.testing.assert_allclose(raw.flow, truth.values, atol=1 / 128)
    np.testing.assert_array_equal(raw.image, truth.image)
    np.testing.assert_array_equal(raw.next_image, truth.other)


@pytest.mark.parametrize("suffixes", [True, False])
@pytest.mark.parametrize("mask_folder", [True, False])
def test_amodal_samples_have_the_whole_and_what_is_seen(tmp_path: Path, suffixes: bool, mask_folder: bool) -> None:
    truth = datasets.pix2gestalt(tmp_path, suffixes=suffixes)
    if not mask_folder:
        (tmp_path / "whole_mask").rename(tmp_path / "elsewhere")
    raw = open_reader("pix2gestalt", tmp_path, split="all").read(0)
    assert isinstance(raw, RawAmodal)
    np.testing.assert_array_equal(raw.image, truth.image)
    np.testing.assert_array_equal(raw.visible, truth.other)
    np.testing.assert_array_equal(raw.whole, truth.values)
    assert (raw.object_rgb[truth.values == 0] == 255).all()


def test_the_sky_of_a_film_is_beyond_everything(tmp_path: Path) -> None:
    reader, _ = opened("sintel-depth", tmp_path)
    raw = reader.read(0)
    assert raw.known.all()
    np.testing.assert_array_equal(raw.solid, np.arange(HEIGHT)[:, None] * np.ones(WIDTH) >= 10)
    np.testing.assert_array_equal(raw.depth[10:], datasets.depth_map(1)[10:])


def test_batches_are_finite_in_range_and_pure(kind: str, tmp_path: Path) -> None:
    reader, _ = opened(kind, tmp_path)
    task = READERS[kind][2]
    source, again = Folders(reader, seed=1), Folders(reader, seed=1)
    again.batch(5, task, 2, (32, 40))
    batch = source.batch(3, task, 4, (32, 40))
    same = again.batch(3, task, 4, (32, 40))
    for field in ("image", "prompt", "target", "weight"):
        values = getattr(batch, field)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values, getattr(same, field))
    assert batch.image.shape == (4, 3, 32, 40)
    assert np.abs(batch.image).max() <= 1.001
    assert np.abs(batch.target).max() <= 1.5
    assert batch.weight.any()
    assert source.report() == []


def test_points_become_cells_that_count(tmp_path: Path) -> None:
    """A laser's truth is sparse; spread over its gaps it fills cells of 8 x 8, and only where there was some."""
    for kind in ("kitti-flow", "kitti-depth"):
        reader, _ = opened(kind, tmp_path / kind)
        task = READERS[kind][2]
        spread = Folders(reader).batch(0, task, 6, (48, 64)).weight.mean()
        reader.gap_px = 0.0
        assert spread > 0.5
        assert Folders(reader).batch(0, task, 6, (48, 64)).weight.mean() < 0.1


def test_flow_of_a_dataset_brings_its_frames_together(tmp_path: Path) -> None:
    """The coded target, decoded, fetches the image from its prompt, whatever the crop and the mirror."""
    flow = np.broadcast_to(np.float32([4, -3]), (96, 128, 2))
    big = datasets.photo(0, 120, 160)
    first, second = big[12:108, 16:144], big[15:111, 12:140]
    datasets.save(tmp_path / "data" / "00001_img1.ppm", first)
    datasets.save(tmp_path / "data" / "00001_img2.ppm", second)
    datasets.write_flo(tmp_path / "data" / "00001_flow.flo", flow)
    batch = Folders(open_reader("chairs", tmp_path, split="all")).batch(0, "flow", 8, (64, 80))
    x, y = np.meshgrid(np.arange(80, dtype=np.float32), np.arange(64, dtype=np.float32))
    for image, prompt, target in zip(batch.image, batch.prompt, batch.target, strict=True):
        u, v = FlowCoding().decode(target[:2], 80)
        fetched = cv2.remap(np.moveaxis(prompt, 0, -1), x + u, y + v, cv2.INTER_LINEAR)
        inner = np.s_[12:-12, 12:-12]
        error = np.median(np.abs(fetched - np.moveaxis(image, 0, -1))[inner])
        still = np.median(np.abs(np.moveaxis(prompt - image, 0, -1))[inner])
        assert error < 0.5 * still


# Hypersim


def test_rays_become_depth_as_the_published_snippet_has_it() -> None:
    """1024 x 768 and a focal length of 886.81 pixels; the share is 1 in the middle and smallest in the corners."""
    share = planar_share(768, 1024)
    x, y = np.meshgrid(np.linspace(-511.5, 511.5, 1024), np.linspace(-383.5, 383.5, 768))
    np.testing.assert_allclose(share, 886.81 / np.sqrt(x**2 + y**2 + 886.81**2), atol=1e-6)


def test_a_tilted_camera_has_rays_of_its_own(tmp_path: Path) -> None:
    datasets.hypersim(tmp_path)
    matrix = np.array([[0.6, 0, 0.05], [0, 0.4, 0.1], [0, 0.2, -1]])
    columns = [f"M_cam_from_uv_{r}{c}" for r in range(3) for c in range(3)]
    lines = [",".join(["scene_name", *columns]), ",".join(["ai_001_002", *map(str, matrix.ravel())])]
    plain = open_reader("hypersim", tmp_path).read(0)
    (tmp_path / "metadata_camera_parameters.csv").write_text("\n".join(lines))
    tilted = open_reader("hypersim", tmp_path).read(0)
    row, column = 30, 50
    ray = matrix @ [(column + 0.5) / WIDTH * 2 - 1, 1 - (row + 0.5) / HEIGHT * 2, 1]
    distance = plain.depth[row, column] / planar_share(HEIGHT, WIDTH)[row, column]
    np.testing.assert_allclose(tilted.depth[row, column], distance * abs(ray[2]) / np.linalg.norm(ray), rtol=1e-5)


def test_radiance_is_tone_mapped_as_published(tmp_path: Path) -> None:
    datasets.hypersim(tmp_path, hdr=True)
    image = open_reader("hypersim", tmp_path).read(0).image
    color = datasets.photo(0).astype(np.float16).astype(np.float64)
    there = np.ones((HEIGHT, WIDTH), bool)
    there[:8, :8] = False
    brightness = (color @ [0.3, 0.59, 0.11])[there]
    expected = np.clip((color * 0.8**2.2 / np.percentile(brightness, 90)) ** (1 / 2.2), 0, 1) * 255
    assert np.abs(image - expected).max() <= 1.01


def test_only_the_released_frames_of_the_split_are_listed(tmp_path: Path) -> None:
    datasets.hypersim(tmp_path)
    assert len(open_reader("hypersim", tmp_path)) == 3
    assert open_reader("hypersim", tmp_path, split="val").name(0) == "ai_009_001/cam_01/frame.0003"
    assert len(open_reader("hypersim", tmp_path, split="all")) == 3
    with pytest.raises(InvalidInput, match="no frame"):
        open_reader("hypersim", tmp_path, split="tset")


def test_marigolds_list_may_choose_the_frames(tmp_path: Path) -> None:
    datasets.hypersim(tmp_path)
    path = tmp_path / "filename_list_train_filtered.txt"
    path.write_text("ai_001_002/rgb_cam_00_fr0002.png ai_001_002/depth_plane_cam_00_fr0002.png\n")
    reader = open_reader("hypersim", tmp_path, names=path)
    assert [reader.name(n) for n in range(len(reader))] == ["ai_001_002/cam_00/frame.0002"]
    path.write_text("../../etc/passwd x\n")
    with pytest.raises(InvalidInput, match="names no frame"):
        open_reader("hypersim", tmp_path, names=path)


def test_without_its_split_file_hypersim_says_where_to_get_it(tmp_path: Path) -> None:
    datasets.hypersim(tmp_path)
    (tmp_path / "metadata_images_split_scene_v1.csv").unlink()
    with pytest.raises(InvalidInput, match="metadata_images_split_scene_v1"):
        open_reader("hypersim", tmp_path)


def depth_file(folder: Path) -> Path:
    return next(folder.glob("ai_*/images/*geometry*/frame.0000.depth_meters.hdf5"))


def rewrite(path: Path, **datasets_: object) -> None:
    path.unlink()
    with h5py.File(path, "w") as file:
        for name, values in datasets_.items():
            file[name] = values


@pytest.mark.parametrize(
    "fault",
    ["empty", "cut", "text", "other name", "strings", "huge", "link out", "external", "group", "three axes", "nothing"],
)
def test_broken_hdf5_is_named_and_refused(tmp_path: Path, fault: str) -> None:
    datasets.hypersim(tmp_path)
    path = depth_file(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(4 * HEIGHT * WIDTH))
    whole = path.read_bytes()
    if fault == "empty":
        path.write_bytes(b"")
    elif fault == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "text":
        path.write_text("not a file of that kind" * 100)
    elif fault == "other name":
        rewrite(path, data=np.ones((HEIGHT, WIDTH)))
    elif fault == "strings":
        rewrite(path, dataset=[["a", "b"]])
    elif fault == "huge":
        path.unlink()
        with h5py.File(path, "w") as file:
            file.create_dataset("dataset", (10**6, 10**6), np.float64, chunks=(1000, 1000))
    elif fault == "link out":
        path.unlink()
        with h5py.File(path, "w") as file:
            file["dataset"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "dataset")
    elif fault == "external":
        path.unlink()
        with h5py.File(path, "w") as file:
            outside = [(str(tmp_path / "secret.bin"), 0, 4 * HEIGHT * WIDTH)]
            file.create_dataset("dataset", (HEIGHT, WIDTH), np.float32, external=outside)
    elif fault == "group":
        path.unlink()
        with h5py.File(path, "w") as file:
            file.create_group("dataset")
    elif fault == "three axes":
        rewrite(path, dataset=np.ones((HEIGHT, WIDTH, 2)))
    else:
        rewrite(path, dataset=np.full((HEIGHT, WIDTH), np.nan))
    reader = open_reader("hypersim", tmp_path)
    if fault != "nothing":
        with pytest.raises(InvalidInput, match="depth_meters"):
            reader.read(0)
    source = Folders(reader, broken_share=0.34)
    assert np.isfinite(source.batch(0, "depth", 3, (32, 32)).target).all()
    assert "1 of 3" in source.report()[0]
    assert "frame.0000" in source.report()[0]


# NYUv2


def test_nyu_splits_count_from_one(tmp_path: Path) -> None:
    datasets.nyu_mat(tmp_path)
    for split, expected in {"train": [1, 3], "test": [0, 2], "all": [0, 1, 2, 3]}.items():
        reader = open_reader("nyu", tmp_path, split=split)
        for index, number in enumerate(expected):
            np.testing.assert_array_equal(reader.read(index).image, datasets.photo(number))


def test_nyu_measured_depth_has_holes(tmp_path: Path) -> None:
    datasets.nyu_mat(tmp_path)
    assert not open_reader("nyu", tmp_path, measured=True).read(0).known[:5].any()
    datasets.nyu_folders(tmp_path / "folders")
    assert not open_reader("nyu", tmp_path / "folders", measured=True).read(0).known[:, :10].any()
    raw = open_reader("nyu", tmp_path / "folders").read(0)
    np.testing.assert_allclose(raw.depth, datasets.depth_map(0), atol=1e-3)


def test_nyus_white_edge_is_cut_away(tmp_path: Path) -> None:
    picture = np.full((480, 640, 3), 255, np.uint8)
    picture[45:471, 41:601] = 9
    datasets.save(tmp_path / "train/room_0001/rgb_0001.png", picture)
    datasets.save16(tmp_path / "train/room_0001/filled_0001.png", np.full((480, 640), 2000, np.uint16))
    raw = open_reader("nyu", tmp_path).read(0)
    assert raw.image.shape == (426, 560, 3)
    assert (raw.image == 9).all()


@pytest.mark.parametrize("numbers", [[0], [9], []])
def test_nyu_splits_that_name_no_frame_are_refused(tmp_path: Path, numbers: list[int]) -> None:
    from scipy.io import savemat

    datasets.nyu_mat(tmp_path)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array(numbers, np.int32)})
    with pytest.raises(InvalidInput, match=r"splits\.mat"):
        open_reader("nyu", tmp_path)


# KITTI


def test_kittis_eigen_lists_are_read(tmp_path: Path) -> None:
    datasets.kitti_depth(tmp_path)
    drive = "2011_09_26_drive_0001_sync"
    path = tmp_path / "eigen.txt"
    pictures, depths = f"2011_09_26/{drive}/image_02/data", f"{drive}/proj_depth/groundtruth/image_02"
    path.write_text(f"{pictures}/0000000002.png {depths}/0000000002.png 721.5\n{pictures}/0000000003.png None 721.5\n")
    reader = open_reader("kitti-depth", tmp_path, names=path)
    assert len(reader) == 1
    np.testing.assert_array_equal(reader.read(0).image, datasets.photo(2))


def test_kittis_recordings_may_be_jpeg(tmp_path: Path) -> None:
    datasets.kitti_depth(tmp_path)
    for path in tmp_path.glob("2011*/*/image_02/data/*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    assert np.abs(open_reader("kitti-depth", tmp_path).read(0).image.astype(int) - datasets.photo(0)).mean() < 6


def test_kitti_flow_of_8_bits_is_refused(tmp_path: Path) -> None:
    reader, _ = opened("kitti-flow", tmp_path)
    datasets.save(tmp_path / "training/flow_occ/000000_10.png", datasets.photo(0))
    with pytest.raises(InvalidInput, match=r"000000_10\.png.*16-bit"):
        reader.read(0)


# Chairs, Things, Sintel, pix2gestalt


def test_chairs_split_by_their_list(tmp_path: Path) -> None:
    datasets.chairs(tmp_path)
    names = {split: len(open_reader("chairs", tmp_path, split=split)) for split in ("train", "val", "all")}
    assert names == {"train": 3, "val": 1, "all": 4}
    assert open_reader("chairs", tmp_path, split="val").name(0) == "00001_flow.flo"
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n3\n")
    with pytest.raises(InvalidInput, match="1 or 2, not '3'"):
        open_reader("chairs", tmp_path)


def test_things_last_frame_leads_nowhere(tmp_path: Path) -> None:
    datasets.things(tmp_path)
    assert len(open_reader("things", tmp_path)) == 3
    datasets.things(tmp_path / "subset", subset=True)
    subset = open_reader("things", tmp_path / "subset")
    assert len(subset) == 3
    np.testing.assert_allclose(subset.read(1).flow, datasets.flow_field(1))


def test_sintels_masks_say_what_is_known(tmp_path: Path) -> None:
    datasets.sintel(tmp_path)
    assert len(open_reader("sintel", tmp_path)) == 2
    with_hidden = open_reader("sintel", tmp_path).read(0).known
    without = open_reader("sintel", tmp_path, occluded=False).read(0).known
    assert not with_hidden[:6].any()
    assert with_hidden[6:].all()
    assert not without[-6:].any()
    assert without[6:-6].all()
    with pytest.raises(InvalidInput, match="no scene ally_2"):
        open_reader("sintel", tmp_path, scenes=["alley_1", "ally_2"])


def test_pix2gestalts_last_hundredth_is_for_validation(tmp_path: Path) -> None:
    for number in range(200):
        for part in ("occlusion", "visible_object_mask", "whole", "whole_mask"):
            path = tmp_path / part / f"{number:06d}.png"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    sizes = [len(open_reader("pix2gestalt", tmp_path, split=split)) for split in ("train", "val", "all")]
    assert sizes == [198, 2, 200]


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    reader, _ = opened("pix2gestalt", tmp_path)
    (tmp_path / "whole" / "000001_whole.png").unlink()
    reader = open_reader("pix2gestalt", tmp_path, split="all")
    source = Folders(reader, broken_share=0.25)
    source.batch(0, "amodal", 4, (32, 32))
    assert "there is no whole of 000001" in source.report()[0]


# ImageNet


def test_classes_are_numbered_as_sorted(tmp_path: Path) -> None:
    datasets.imagenet(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "n00000001" / "notes.txt").write_text("no picture")
    reader = ImageNet(tmp_path)
    assert len(reader) == 12
    assert len(reader.classes) == 3
    assert [reader.read(n).label for n in range(12)] == [0] * 4 + [1] * 4 + [2] * 4


def test_imagenets_own_folders_are_found(tmp_path: Path) -> None:
    datasets.imagenet(tmp_path / "ILSVRC/Data/CLS-LOC/train")
    assert len(ImageNet(tmp_path).classes) == 3


def test_imagenets_odd_files_are_pictures_too(tmp_path: Path) -> None:
    """One PNG is called JPEG in it, some are CMYK, some grey."""
    datasets.imagenet(tmp_path, classes=1)
    folder = tmp_path / "n00000000"
    Image.fromarray(datasets.photo(1)).save(folder / "a.JPEG", format="PNG")
    Image.fromarray(datasets.photo(1)).convert("CMYK").save(folder / "b.JPEG", format="JPEG")
    Image.fromarray(datasets.photo(1)).convert("L").save(folder / "c.JPEG", format="JPEG")
    reader = ImageNet(tmp_path)
    shapes = {reader.read(index).image.shape[2] for index in range(len(reader))}
    assert shapes == {3}


# What is broken anywhere


def first_truth(kind: str, folder: Path) -> Path:
    patterns = {
        "hypersim": "**/frame.0000.tonemap.jpg",
        "hypersim-processed": "**/depth_plane_*_fr0000.png",
        "kitti-depth": "train/**/0000000000.png",
        "kitti-flow": "**/flow_occ/000000_10.png",
        "chairs": "**/00002_flow.flo",
        "things": "**/OpticalFlowIntoFuture_0006_L.pfm",
        "sintel": "**/flow/*/frame_0001.flo",
        "sintel-depth": "**/frame_0001.dpt",
        "pix2gestalt": "whole/000000_whole.png",
    }
    return next(folder.glob(patterns[kind]))


@pytest.mark.parametrize("kind", [k for k in MAKERS if k != "nyu"])
@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "noise", "a folder", "a pipe", "unreadable size"])
def test_broken_files_are_skipped_and_told_of(tmp_path: Path, kind: str, fault: str) -> None:
    reader, _ = opened(kind, tmp_path)
    path = first_truth(kind, tmp_path)
    whole = path.read_bytes()
    if fault == "unreadable size":
        path.write_bytes(lying_about_its_size(path, whole))
    else:
        path.unlink()
    if fault == "empty":
        path.touch()
    elif fault == "cut":
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif fault == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif fault == "a folder":
        path.mkdir()
    elif fault == "a pipe":
        os.mkfifo(path)
    task, length = READERS[kind][2], len(reader)
    source = Folders(reader, seed=2, broken_share=1 / length)
    batch = source.batch(0, task, length, (32, 32))
    assert np.isfinite(batch.target).all()
    assert f"1 of {length} samples" in source.report()[0]
    strict = Folders(reader, seed=2, broken_share=0)
    with pytest.raises(TooManyFaults, match=f"1 of {length}.*At most 0"):
        strict.batch(0, task, length, (32, 32))


def lying_about_its_size(path: Path, whole: bytes) -> bytes:
    """The same file with a header of billions of pixels."""
    vast = struct.pack("<ii", 2_000_000_000, 2_000_000_000)
    if path.suffix == ".flo":
        return whole[:4] + vast + whole[12:]
    if path.suffix == ".dpt":
        return whole[:4] + vast + whole[12:]
    if path.suffix == ".pfm":
        return whole.replace(b"64 48", b"999999999 999999999", 1)
    if path.suffix == ".png":
        return whole[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + whole[24:]
    at = whole.index(b"\xff\xc0")
    return whole[: at + 5] + struct.pack(">HH", 65500, 65500) + whole[at + 9 :]


def test_a_folder_that_is_not_there_is_a_plain_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        open_reader(kind, tmp_path / "nowhere")


def test_what_is_asked_wrongly_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="did you mean hypersim"):
        open_reader("hypersym", tmp_path)
    with pytest.raises(InvalidInput, match="colour"):
        open_reader("chairs", tmp_path, colour="red")
    source = Folders(opened("chairs", tmp_path)[0])
    for arguments in ((0, "depth", 1, (32, 32)), (0, "stereo", 1, (32, 32)), (0, "flow", 0, (32, 32))):
        with pytest.raises(InvalidInput):
            source.batch(*arguments)
    with pytest.raises(InvalidInput, match="multiples of 8"):
        source.batch(0, "flow", 1, (30, 32))


def test_pictures_of_another_size_than_their_truth_are_refused(tmp_path: Path) -> None:
    reader, _ = opened("chairs", tmp_path)
    datasets.save(tmp_path / "data" / "00002_img2.ppm", datasets.photo(0, 40, 64))
    with pytest.raises(InvalidInput, match=r"00002_flow.flo.*next 64 x 40"):
        reader.read(0)
