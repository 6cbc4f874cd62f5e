"""Shards of latents, read back at any place, by another library, and when damaged; and pictures of classes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from saccade.errors import InvalidInput
from tests.training import datasets
from training.data import ImageClasses, Latents, LatentWriter, TooManyFaults
from training.data.images import middle

SHAPE = (4, 3, 5)


def latent(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)


def fill(folder: Path, count: int = 23, per_shard: int = 10, dtype: str = "float16", start: int = 0) -> None:
    with LatentWriter(folder, {"codec": "dct"}, per_shard=per_shard, dtype=dtype) as writer:
        for number in range(start, count):
            writer.add(latent(number), number % 7)


def test_latents_come_back_in_epochs(tmp_path: Path) -> None:
    fill(tmp_path, dtype="float32")
    latents = Latents(tmp_path, seed=3)
    assert len(latents) == 23
    assert latents.shape == SHAPE
    assert latents.about["codec"] == "dct"
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [f"shard-00000{n}.tar" for n in range(3)]
    for epoch in range(2):
        values, labels = latents.at(23 * epoch, 23)
        numbers = [next(n for n in range(23) if np.array_equal(row, latent(n))) for row in values]
        assert sorted(numbers) == list(range(23))
        np.testing.assert_array_equal(labels, np.array(numbers) % 7)
    assert values.dtype == np.float32
    assert labels.dtype == np.int64


def test_parts_of_a_step_are_disjoint_and_make_up_the_step(tmp_path: Path) -> None:
    fill(tmp_path)
    latents = Latents(tmp_path, seed=3)
    whole, _ = latents.batch(1, 0, 6)
    parts = [latents.batch(1, part, 2, parts=3)[0] for part in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    with pytest.raises(InvalidInput, match="no part 1 of 1"):
        latents.batch(1, 1, 6)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_the_same(tmp_path: Path) -> None:
    fill(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "npy", "cls")
    rows = list(dataset)
    assert [key for key, _, _ in rows] == [f"{n:09d}" for n in range(23)]
    ours = Latents(tmp_path, shuffle=False)
    for number, (_, values, label) in enumerate(rows):
        np.testing.assert_array_equal(values, ours.read(number)[0])
        np.testing.assert_array_equal(values, latent(number).astype(np.float16))
        assert label == ours.read(number)[1] == number % 7


def test_shards_of_the_webdataset_library_are_read(tmp_path: Path) -> None:
    """Its writer puts times with fractions into headers of their own, and JSON may hold the label."""
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=True) as sink:
        for number in range(4):
            sink.write({"__key__": f"train/sample{number}", "npy": latent(number), "json": {"label": number}})
    with wds.TarWriter(str(tmp_path / "b.tar"), encoder=True) as sink:
        for number in range(4, 6):
            sink.write({"__key__": f"sample{number}", "npy": latent(number), "cls": number})
    latents = Latents(tmp_path, shuffle=False)
    values, labels = latents.at(0, 6)
    np.testing.assert_array_equal(values, np.stack([latent(n) for n in range(6)]))
    np.testing.assert_array_equal(labels, np.arange(6))


def test_writing_goes_on_after_the_last_whole_shard(tmp_path: Path) -> None:
    def killed() -> None:
        with LatentWriter(tmp_path, {"codec": "dct"}, per_shard=5) as writer:
            for number in range(13):
                writer.add(latent(number), number % 7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert not list(tmp_path.glob("*.part"))
    assert LatentWriter(tmp_path, {"codec": "dct"}, per_shard=5).done == 10
    fill(tmp_path, per_shard=5, start=10)
    fill(tmp_path / "at once", per_shard=5)
    for one, other in zip(sorted(tmp_path.glob("*.tar")), sorted((tmp_path / "at once").glob("*.tar")), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "about.json").read_text() == (tmp_path / "at once" / "about.json").read_text()


@pytest.mark.parametrize("other", [{"per_shard": 6}, {"dtype": "float32"}, {"about": {"codec": "sd"}}])
def test_other_latents_are_not_mixed_in(tmp_path: Path, other: dict[str, object]) -> None:
    fill(tmp_path, 10, 5)
    options = {"about": {"codec": "dct"}, "per_shard": 5, "dtype": "float16", **other}
    with pytest.raises(InvalidInput, match="another kind"):
        LatentWriter(tmp_path, **options)


@pytest.mark.parametrize(
    ("values", "label"),
    [(np.zeros((2, 2)), 0), (np.full(SHAPE, np.nan), 0), (np.full(SHAPE, 1e6), 0), (np.zeros(SHAPE), -1)],
)
def test_what_is_no_latent_is_not_written(tmp_path: Path, values: np.ndarray, label: int) -> None:
    with LatentWriter(tmp_path, {}) as writer:
        with pytest.raises(InvalidInput):
            writer.add(values, label)
        writer.add(np.zeros((1, 2, 2)), 0)
        with pytest.raises(InvalidInput, match=r"this latent is \[1, 2, 3\]"):
            writer.add(np.zeros((1, 2, 3)), 0)
    assert len(Latents(tmp_path)) == 1


def shard(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


HEADER = npy(latent(0))[:128]
FAULTS: dict[str, tuple[tuple[str, bytes], ...]] = {
    "no label": (("b.npy", npy(latent(1))),),
    "no latent": (("b.cls", b"1"),),
    "a pickle": (("b.npy", npy(np.array([{"a": 1}], object))), ("b.cls", b"1")),
    "doubles": (("b.npy", npy(latent(1).astype(np.float64))), ("b.cls", b"1")),
    "other shape": (("b.npy", npy(latent(1)[:2])), ("b.cls", b"1")),
    "not a number": (("b.npy", npy(latent(1) * np.nan)), ("b.cls", b"1")),
    "cut": (("b.npy", npy(latent(1))[:-4]), ("b.cls", b"1")),
    "vast": (("b.npy", HEADER.replace(b"(4, 3, 5)", b"(4, 9999999, 5)")), ("b.cls", b"1")),
    "damaged header": (("b.npy", HEADER.replace(b"(4, 3, 5)", b"(4, 3, 5\xc1") + bytes(240)), ("b.cls", b"1")),
    "no header": (("b.npy", b"hello"), ("b.cls", b"1")),
    "a word": (("b.npy", npy(latent(1))), ("b.cls", b"cat")),
    "a fraction": (("b.npy", npy(latent(1))), ("b.cls", b"1.5")),
    "deep JSON": (("b.npy", npy(latent(1))), ("b.json", b"[" * 4000)),
    "negative": (("b.npy", npy(latent(1))), ("b.json", b'{"label": -1}')),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_samples_are_skipped_up_to_a_share(tmp_path: Path, fault: str) -> None:
    good = [(f"{name}.{end}", data) for name in "acd" for end, data in (("npy", npy(latent(0))), ("cls", b"5"))]
    shard(tmp_path / "0.tar", *good[:2], *FAULTS[fault], *good[2:], ("notes.txt", b"for people"))
    latents = Latents(tmp_path, broken_share=0.25)
    assert len(latents) == 4
    values, labels = latents.at(0, 8)
    np.testing.assert_array_equal(values, np.stack([latent(0)] * 8))
    assert (labels == 5).all()
    assert "1 of 4 samples" in latents.faults.summary()
    assert "0.tar sample 1" in latents.faults.summary()
    with pytest.raises(TooManyFaults, match=r"0\.tar sample 1"):
        Latents(tmp_path).at(0, 4)


@pytest.mark.parametrize("fault", ["cut", "noise", "empty", "header", "size"])
def test_damaged_shards_are_named(tmp_path: Path, fault: str) -> None:
    fill(tmp_path, 20, 10)
    path = tmp_path / "shard-000001.tar"
    whole = bytearray(path.read_bytes())
    if fault == "cut":
        path.write_bytes(whole[:3000])
    elif fault == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(4096))
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "header":
        whole[10] ^= 255
        path.write_bytes(whole)
    else:
        whole[124] = 0x80
        whole[148:156] = b"%06o\0 " % (sum(whole[:148]) + 256 + sum(whole[156:512]))
        path.write_bytes(whole)
    with pytest.raises(TooManyFaults, match=r"shard-000001\.tar"):
        Latents(tmp_path).at(0, 20)
    values, _ = Latents(tmp_path, broken_share=0.5).at(0, 20)
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    "about",
    ["{", "[]", "{}", '{"format": "saccade latents 1", "counts": [-3, 5]}', '{"format": "other", "counts": []}'],
)
def test_a_broken_about_is_a_plain_error(tmp_path: Path, about: str) -> None:
    fill(tmp_path, 20, 10)
    (tmp_path / "about.json").write_text(about)
    with pytest.raises(InvalidInput, match=r"about\.json"):
        Latents(tmp_path)


def test_shards_that_are_not_there_are_missed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no folder"):
        Latents(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="no shard"):
        Latents(tmp_path)
    fill(tmp_path, 20, 10)
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(InvalidInput, match="tells of 2 shards, there are 1"):
        Latents(tmp_path)


def test_without_about_the_shards_are_counted(tmp_path: Path) -> None:
    fill(tmp_path)
    told = Latents(tmp_path).at(0, 23)
    (tmp_path / "about.json").unlink()
    for one, other in zip(told, Latents(tmp_path).at(0, 23), strict=True):
        np.testing.assert_array_equal(one, other)


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    fill(tmp_path, 150, 2)
    latents = Latents(tmp_path)
    latents.at(0, 300)
    assert len(latents._files) <= 64
    assert json.loads((tmp_path / "about.json").read_text())["counts"] == [2] * 75


# Pictures of classes


def test_pictures_of_classes_are_cut_from_the_middle(tmp_path: Path) -> None:
    datasets.imagenet(tmp_path)
    images = ImageClasses(tmp_path, mirror=False, shuffle=False)
    pictures, labels = images.batch(0, 12, 32)
    assert (len(images), images.classes) == (12, 3)
    assert pictures.shape == (12, 3, 32, 32)
    assert pictures.dtype == np.float32
    assert np.abs(pictures).max() <= 1
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 4))


@pytest.mark.parametrize("size", [(32, 32), (40, 20), (16, 48)])
def test_the_middle_is_not_stretched(size: tuple[int, int]) -> None:
    y, x = np.mgrid[:120, :200]
    picture = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    out = middle(picture, size)[4:-4, 4:-4].astype(float)
    assert out.shape[:2] == (size[0] - 8, size[1] - 8)
    across, down = np.diff(out[..., 0], axis=1).mean(), np.diff(out[..., 1], axis=0).mean()
    assert across == pytest.approx(down, rel=0.03)
    assert abs(int(middle(picture, size)[size[0] // 2, size[1] // 2, 0]) - 100) <= 4


def test_mirrors_and_orders_come_of_the_sample_number(tmp_path: Path) -> None:
    datasets.imagenet(tmp_path)
    images = ImageClasses(tmp_path, seed=1)
    whole, labels = images.batch(0, 24, 16)
    pieces = [ImageClasses(tmp_path, seed=1).batch(n, 5, 16) for n in (5, 10)]
    np.testing.assert_array_equal(whole[5:15], np.concatenate([p for p, _ in pieces]))
    np.testing.assert_array_equal(labels[5:15], np.concatenate([n for _, n in pieces]))
    red_on_the_left = whole[:, 0, :, :3].mean((1, 2)) > whole[:, 0, :, -3:].mean((1, 2))
    assert 4 < red_on_the_left.sum() < 20


def test_broken_pictures_are_skipped(tmp_path: Path) -> None:
    datasets.imagenet(tmp_path)
    broken = tmp_path / "n00000001" / "n00000001_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    images = ImageClasses(tmp_path, broken_share=0.05)
    assert np.isfinite(images.batch(0, 12, 16)[0]).all()
    assert "n00000001/n00000001_0.JPEG: cannot" in images.faults.summary().replace("The file cannot", "cannot")
    with pytest.raises(TooManyFaults):
        ImageClasses(tmp_path, broken_share=0).batch(0, 12, 16)


def test_folders_without_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no class folders"):
        ImageClasses(tmp_path)
    (tmp_path / "n01").mkdir()
    with pytest.raises(InvalidInput, match="no picture"):
        ImageClasses(tmp_path)
    datasets.imagenet(tmp_path)
    with pytest.raises(InvalidInput, match="cannot be had"):
        ImageClasses(tmp_path).batch(0, 0, 16)
