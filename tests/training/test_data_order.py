"""Orders, mixtures and faults: every sample once an epoch, shares as asked, and a stop that says why."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saccade.errors import InvalidInput
from saccade.tasks import AmodalCoding
from tests.training import datasets
from training.data import (
    Batch,
    Faults,
    Folders,
    ImageClasses,
    Mixture,
    Order,
    Scenes,
    Source,
    TooManyFaults,
    open_reader,
)
from training.data.readers.imagenet import ImageNet


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_an_epoch_sees_everything_once(length: int) -> None:
    order = Order(length, seed=5)
    for epoch in (0, 1, 9):
        assert sorted(order.at(epoch * length, length)) == list(range(length))


def test_any_place_is_told_at_once_and_alike() -> None:
    order = Order(1000, seed=1)
    straight = order.at(0, 3500)
    np.testing.assert_array_equal(np.concatenate([Order(1000, seed=1).at(n, 7) for n in range(0, 3500, 7)]), straight)
    assert Order(10**12, seed=1).at(10**14, 3).max() < 10**12


def test_epochs_and_seeds_differ_and_look_like_chance() -> None:
    length = 997
    epochs = Order(length, seed=0).at(0, 200 * length).reshape(200, length)
    assert len({row.tobytes() for row in epochs}) == 200
    assert not np.array_equal(Order(length, seed=1).at(0, length), epochs[0])
    fixed = (epochs == np.arange(length)).sum(1)
    assert 0.7 < fixed.mean() < 1.3  # a permutation has one fixed point on average
    assert abs(np.corrcoef(epochs[0], epochs[1])[0, 1]) < 0.12
    assert abs(np.corrcoef(epochs[:, 0][:-1], epochs[:, 0][1:])[0, 1]) < 0.25
    assert np.abs(epochs.mean(0) - length / 2).max() < 6 * length / np.sqrt(12 * 200)


def test_without_shuffling_it_counts() -> None:
    np.testing.assert_array_equal(Order(3, shuffle=False).at(2, 5), [2, 0, 1, 2, 0])


@pytest.mark.parametrize("arguments", [(-1, 3), (0, -3)])
def test_places_before_the_first_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput):
        Order(5).at(*arguments)
    with pytest.raises(InvalidInput):
        Order(0)


# Faults


def read_some(broken: set[int]) -> object:
    def read(index: int) -> int:
        if index in broken:
            raise InvalidInput(f"{index}.png: is cut short")
        return index

    return read


def test_the_next_whole_sample_stands_in() -> None:
    faults = Faults("data", 10, share=0.4)
    read = read_some({3, 4, 9})
    assert [faults.read(n, read) for n in (3, 4, 5, 9)] == [5, 5, 5, 0]
    later = Faults("data", 10, share=0.4)
    assert [later.read(n, read) for n in (9, 5, 4, 3)] == [0, 5, 5, 5]
    assert faults.summary() == later.summary()
    assert "3 of 10 samples are missing or broken: 3.png: is cut short" in faults.summary()


def test_past_the_share_it_stops_and_names_the_first() -> None:
    faults = Faults("chairs", 100, share=0.02)
    read = read_some({5, 50, 70})
    faults.read(5, read)
    faults.read(50, read)
    with pytest.raises(TooManyFaults, match=r"chairs: 3 of 100.*5\.png.*50\.png.*70\.png.*At most 2 were allowed"):
        faults.read(70, read)


def test_missing_files_are_faults_and_a_machine_run_short_is_not() -> None:
    def gone(index: int) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x.png")

    def short(index: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(TooManyFaults, match="No such file"):
        Faults("data", 5, share=0).read(0, gone)
    faults = Faults("data", 5, share=1)
    with pytest.raises(InvalidInput, match="ran short: Too many open files"):
        faults.read(0, short)
    assert not faults.reasons
    with pytest.raises(TooManyFaults, match="not one of 5 samples"):
        faults.read(0, gone)


def test_each_fault_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults("data", 100, share=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            faults.read(0, read_some(set(range(40))))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 20
    assert told[0] == "data: skipped 0.png: is cut short"
    assert "40 of 100" in faults.summary()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(InvalidInput):
        Faults("data", 5, share)


# Mixtures


class Marked:
    """A source whose pictures tell which row of which source they are."""

    def __init__(self, mark: int) -> None:
        self.mark = mark

    def batch(self, step: int, task: str, count: int, size: tuple[int, int], first: int | None = None) -> Batch:
        assert first is not None
        image = np.zeros((count, 3, *size), np.float32)
        image[:, 0] = self.mark
        image[:, 1] = np.arange(first, first + count)[:, None, None]
        return Batch(
            image, image, np.zeros((count, 4, *size), np.float32), np.ones((count, size[0] // 8, size[1] // 8))
        )


def drawn(mixture: Mixture, step: int, count: int) -> list[tuple[int, int]]:
    image = mixture.batch(step, "flow", count, (8, 8)).image
    return [(int(row[0, 0, 0]), int(row[1, 0, 0])) for row in image]


def test_shares_are_kept_and_every_source_is_read_in_turn() -> None:
    mixture = Mixture({"flow": [(Marked(0), 3), (Marked(1), 1), (Marked(2), 1e-9)]})
    rows = drawn(mixture, 0, 4096)
    for mark, share in ((0, 0.75), (1, 0.25), (2, 0.0)):
        numbers = [number for which, number in rows if which == mark]
        assert numbers == list(range(len(numbers)))
        assert abs(len(numbers) / 4096 - share) < 0.002
        assert numbers


def test_batches_of_any_size_are_cut_from_the_same_rows() -> None:
    parts = {"flow": [(Marked(0), 2), (Marked(1), 1)]}
    whole = drawn(Mixture(parts), 0, 2400)
    pieces = [row for step in range(48) for row in drawn(Mixture(parts), step, 50)]
    assert pieces == whole


def test_a_mixture_is_a_source_of_several_tasks(shards: Path, tmp_path: Path) -> None:
    datasets.chairs(tmp_path)
    scenes, chairs = Scenes(shards), Folders(open_reader("chairs", tmp_path))
    mixture = Mixture({"depth": [(scenes, 1)], "flow": [(scenes, 1), (chairs, 1)]})
    assert isinstance(mixture, Source)
    assert mixture.tasks == ("depth", "flow")
    for task in mixture.tasks:
        one, other = (mixture.batch(4, task, 6, (32, 32)) for _ in range(2))
        np.testing.assert_array_equal(one.image, other.image)
        assert one.image.shape == (6, 3, 32, 32)
        assert one.weight.shape == (6, 4, 4)


@pytest.mark.parametrize("weights", [[0.0], [-1.0, 2.0], [float("nan")], [float("inf")]])
def test_weights_that_weigh_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(InvalidInput, match="weights"):
        Mixture({"flow": [(Marked(n), weight) for n, weight in enumerate(weights)]})


def test_classes_are_no_task(tmp_path: Path) -> None:
    datasets.imagenet(tmp_path)
    with pytest.raises(InvalidInput, match="none of the tasks"):
        Folders(ImageNet(tmp_path))


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput):
        Mixture({})
    with pytest.raises(InvalidInput, match="no depth"):
        Mixture({"flow": [(Marked(0), 1)]}).batch(0, "depth", 1, (8, 8))


def test_epochs_of_a_folder_see_every_sample_once(tmp_path: Path) -> None:
    datasets.chairs(tmp_path, frames=6)
    seen: list[int] = []

    class Counting:
        task, gap_px = "flow", 0.0
        inner = open_reader("chairs", tmp_path, split="all")
        __len__ = inner.__len__
        name = inner.name

        def read(self, index: int) -> object:
            seen.append(index)
            return self.inner.read(index)

    source = Folders(Counting())
    for step in range(6):
        source.batch(step, "flow", 2, (32, 32))
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_threads_change_nothing_but_the_speed(tmp_path: Path) -> None:
    datasets.chairs(tmp_path / "flow", frames=6)
    datasets.imagenet(tmp_path / "classes")
    (tmp_path / "flow/data/00003_img1.ppm").write_text("broken")
    reader = open_reader("chairs", tmp_path / "flow", split="all")
    one, several = (Folders(reader, broken_share=0.2, threads=n).batch(1, "flow", 9, (32, 32)) for n in (1, 4))
    np.testing.assert_array_equal(one.image, several.image)
    np.testing.assert_array_equal(one.target, several.target)
    alone, many = (ImageClasses(tmp_path / "classes", threads=n).batch(3, 20, 16) for n in (1, 4))
    np.testing.assert_array_equal(alone[0], many[0])
    np.testing.assert_array_equal(alone[1], many[1])
    with pytest.raises(TooManyFaults, match="00003_img1"):
        Folders(reader, broken_share=0, threads=4).batch(1, "flow", 9, (32, 32))
    with pytest.raises(InvalidInput, match="threads"):
        Folders(reader, threads=0)


def test_amodal_samples_may_show_the_whole_picture(tmp_path: Path) -> None:
    """As the paper has it: without a context every picture is seen whole, and padded where its shape differs."""
    datasets.pix2gestalt(tmp_path)
    source = Folders(open_reader("pix2gestalt", tmp_path, split="all"), amodal_coding=AmodalCoding(context=None))
    batch = source.batch(0, "amodal", 4, (64, 64))
    assert (batch.weight[:, :6] == 1).all()
    assert (batch.weight[:, 7:] == 0).all()
    share = (batch.prompt[:, 0] > 0).mean((1, 2)) * 64 / 56
    visible = np.pi * 14**2 / 2 / (datasets.HEIGHT * datasets.WIDTH)
    np.testing.assert_allclose(share, visible, rtol=0.15)


def test_what_is_hardly_known_weighs_hardly_anything(tmp_path: Path) -> None:
    """A picture of which one corner has a depth is taken whole after a few crops, and stays finite."""
    datasets.hypersim_processed(tmp_path)
    for path in (tmp_path / "train" / "ai_001_002").glob("depth*"):
        levels = np.zeros((datasets.HEIGHT, datasets.WIDTH), np.uint16)
        levels[:12, :12] = 2000
        datasets.save16(path, levels)
    batch = Folders(open_reader("hypersim-processed", tmp_path)).batch(0, "depth", 8, (48, 64))
    assert np.isfinite(batch.target).all()
    assert 0 < batch.weight.mean() < 0.2
    assert (batch.weight.reshape(8, -1).sum(1) > 0).all()


def test_the_room_opens_with_numpy_alone() -> None:
    code = (
        "import sys; import training.data; "
        "print([m for m in ('cv2', 'PIL', 'h5py', 'scipy', 'torch', 'pydantic', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
