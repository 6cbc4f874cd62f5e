from __future__ import annotations

import io
import struct
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import OpenEXR
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from saccade.errors import InvalidInput, PictureTooLarge, UnreadablePicture, UnsupportedPicture
from saccade.formats import (
    read_exr,
    read_flo,
    read_kitti_flow,
    read_npy,
    read_npz,
    read_pfm,
    read_png,
    to_uint8,
    to_uint16,
    write_exr,
    write_flo,
    write_kitti_flow,
    write_npy,
    write_npz,
    write_pfm,
    write_png,
)

Reader = Callable[..., Any]
EXAMPLES = Path(__file__).parents[2] / "examples"
SIDES = st.integers(1, 24)
quick = settings(max_examples=40, deadline=None)


def arrays(dtype: Any, *tails: tuple[int, ...], **elements: Any) -> st.SearchStrategy[NDArray[Any]]:
    shapes = st.builds(lambda h, w, tail: (h, w, *tail), SIDES, SIDES, st.sampled_from(tails))
    return hnp.arrays(dtype, shapes, elements=st.floats(**elements) if elements else None)


def ramp(height: int = 20, width: int = 30) -> NDArray[np.float32]:
    y, x = np.mgrid[:height, :width]
    return (np.sin(x / 7) * 5 + y / 3).astype(np.float32)


def waves() -> NDArray[np.float32]:
    return np.dstack([ramp(), -2 * ramp()])


def npz_with(name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def npy_with(header: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + body


FILES: dict[str, tuple[bytes, Reader]] = {
    "png grey 8": (write_png(to_uint8(ramp() / 12)), read_png),
    "png grey 16": (write_png(to_uint16(ramp() / 12)), read_png),
    "png rgb 16": (write_kitti_flow(waves()), read_png),
    "kitti": (write_kitti_flow(waves()), read_kitti_flow),
    "npy": (write_npy(ramp()), read_npy),
    "npz": (write_npz({"a": ramp(), "b": waves()}), read_npz),
    "flo": (write_flo(waves()), read_flo),
    "pfm": (write_pfm(ramp()), read_pfm),
    "exr": (write_exr({"U": ramp(), "V": ramp()}), read_exr),
}


@quick
@given(arrays(np.uint8, (), (3,)) | arrays(np.uint16, (), (3,)))
def test_png_keeps_every_bit(levels: NDArray[Any]) -> None:
    data = write_png(levels)
    read = read_png(data)
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert read.dtype == levels.dtype
    np.testing.assert_array_equal(read, levels)
    np.testing.assert_array_equal(theirs[..., ::-1] if levels.ndim == 3 else theirs, levels)


def test_a_png_comes_as_small_as_pillows() -> None:
    levels = to_uint16(np.random.default_rng(0).normal(ramp(400, 600) / ramp(400, 600).max(), 1e-4))
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG")
    assert len(write_png(levels)) < 1.05 * len(out.getvalue())


def test_every_thread_writes_the_same_bytes() -> None:
    """Deflate that lets the address of a thread's stack into its hashes gives a few of these other bytes."""
    random = np.random.default_rng(0)
    pictures = [np.tile(random.integers(0, 2**16, (1, 3), np.uint16), (8, 20)) for _ in range(100)]
    wanted, found, done = [write_png(levels) for levels in pictures], [], threading.Event()

    def write() -> None:
        found.append([write_png(levels) for levels in pictures])
        done.wait()  # a stack of its own for each

    threads = [threading.Thread(target=write) for _ in range(200)]
    for thread in threads:
        thread.start()
    done.set()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert [writes for writes in found if writes != wanted] == []


@pytest.mark.parametrize("filters", [8, 16, 32, 64, 128, 248])
def test_sixteen_bit_png_of_every_filter(filters: int) -> None:
    y, x = np.mgrid[:60, :90]
    levels = np.dstack([x * 300 + y * 123, y * 811, x * 7]).astype(np.uint16)
    bgr = np.ascontiguousarray(levels[..., ::-1])
    data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_FILTER, filters])[1].tobytes()
    np.testing.assert_array_equal(read_png(data), levels)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA"])
def test_png_of_other_kinds_is_refused(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (4, 4)).save(out, "PNG")
    with pytest.raises(UnsupportedPicture):
        read_png(out.getvalue())


@pytest.mark.parametrize("levels", [np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2), np.uint8),
                                    np.zeros(4, np.uint8)])  # fmt: skip
def test_png_needs_levels(levels: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="PNG"):
        write_png(levels)


def test_quantizing() -> None:
    unit = np.array([[-1, 0, 0.5, 1, 2, np.nan, np.inf, -np.inf]], np.float32)
    assert to_uint8(unit).tolist() == [[0, 0, 128, 255, 255, 0, 255, 0]]
    assert to_uint16(unit).tolist() == [[0, 0, 32768, 65535, 65535, 0, 65535, 0]]
    steps = np.arange(65536) / 65535
    np.testing.assert_array_equal(to_uint16(steps.astype(np.float32)), np.arange(65536))


NUMBERS = st.sampled_from([np.bool_, np.uint8, np.int16, ">i4", "<f2", np.float32, ">f8", np.complex64])


@quick
@given(NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=6))))
def test_npy_and_npz(array: NDArray[Any]) -> None:
    np.testing.assert_array_equal(np.load(io.BytesIO(write_npy(array)), allow_pickle=False), array)
    theirs = io.BytesIO()
    np.save(theirs, array)
    np.testing.assert_array_equal(read_npy(theirs.getvalue()), array)
    read = read_npz(write_npz({"depth": array, "flow": array.T}))
    assert list(read) == ["depth", "flow"]
    np.testing.assert_array_equal(read["flow"], array.T)


def test_npz_of_numpy_and_back() -> None:
    out = io.BytesIO()
    np.savez_compressed(out, depth=ramp(), flow=np.asfortranarray(waves()))
    read = read_npz(out.getvalue())
    np.testing.assert_array_equal(read["flow"], waves())
    with np.load(io.BytesIO(write_npz(read)), allow_pickle=False) as theirs:
        np.testing.assert_array_equal(theirs["depth"], ramp())
    assert write_npz(read) == write_npz(read)


def test_arrays_read_are_ours_to_change() -> None:
    read_npy(write_npy(ramp()))[0, 0] = 1
    read_flo(write_flo(waves()))[0, 0] = 1
    read_pfm(write_pfm(ramp()))[0, 0] = 1


def test_pickles_are_never_opened() -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("unpickled",))

    out = io.BytesIO()
    np.save(out, np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(UnsupportedPicture):
        read_npy(out.getvalue())
    with pytest.raises(UnsupportedPicture):
        read_npz(npz_with("a.npy", out.getvalue()))
    with pytest.raises(ValueError, match="Object"):
        write_npy(np.array([Trap()], object))


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000), }", PictureTooLarge),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 8), }", PictureTooLarge),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000, 1000), }", UnreadablePicture),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2), }", UnreadablePicture),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2), }", UnreadablePicture),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", UnsupportedPicture),
        ("{'descr': '<U9', 'fortran_order': False, 'shape': (1,), }", UnsupportedPicture),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", UnsupportedPicture),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (0,) * 9, }", UnreadablePicture),
        ("__import__('os').abort()", UnreadablePicture),
        ("(" * 5000, UnreadablePicture),
        ("-" * 9000 + "1", UnreadablePicture),
        ("{}", UnreadablePicture),
        ("", UnreadablePicture),
    ],
)
def test_hostile_npy_headers(header: str, error: type[InvalidInput]) -> None:
    with pytest.raises(error):
        read_npy(npy_with(header, bytes(8)))


def test_hostile_npz() -> None:
    with pytest.raises(PictureTooLarge):
        read_npz(npz_with("a.npy", bytes(3_000_000)), max_bytes=2_000_000)
    with pytest.raises(UnsupportedPicture):
        read_npz(npz_with("a.npy", write_npy(ramp()), zipfile.ZIP_BZIP2))
    with pytest.raises(UnsupportedPicture):
        read_npz(b"MZ")
    with pytest.raises(PictureTooLarge):
        read_npz(write_npz({str(index): np.zeros(1) for index in range(100)}))


def test_npz_entry_longer_than_it_says() -> None:
    data = npz_with("a.npy", bytes(3_000_000))
    lie = data.replace(struct.pack("<I", 3_000_000), struct.pack("<I", 1000))
    assert lie != data
    with pytest.raises(UnreadablePicture):
        read_npz(lie)


def test_flo_by_hand() -> None:
    data = struct.pack("<fii", 202021.25, 2, 1) + struct.pack("<4f", 1.5, -2, 1e10, 1e10)
    assert data[:4] == b"PIEH"
    read = read_flo(data)
    assert read[0, 0].tolist() == [1.5, -2]
    assert np.isnan(read[0, 1]).all()
    assert write_flo(read) == data


@quick
@given(arrays(np.float32, (2,), min_value=-1e6, max_value=1e6, width=32))
def test_flo_round_trip(flow: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(read_flo(write_flo(flow)), flow)


def test_the_example_flow_carries_one_frame_onto_the_other() -> None:
    first, second, flow = ((EXAMPLES / name).read_bytes() for name in ("frame_1.png", "frame_2.png", "frame_flow.flo"))
    motion, before, after = read_flo(flow), read_png(first), read_png(second)
    height, width = before.shape[:2]
    at = np.dstack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32) + motion
    carried = cv2.remap(after, at[..., 0], at[..., 1], cv2.INTER_LINEAR)
    assert np.median(np.abs(carried.astype(int) - before)) <= 2
    assert np.median(np.abs(after.astype(int) - before)) >= 10


def test_flo_agrees_with_opencv(tmp_path: Path) -> None:
    path = tmp_path / "theirs.flo"
    assert cv2.writeOpticalFlow(str(path), waves())
    assert path.read_bytes() == write_flo(waves())


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (-1, -1), (0, 5), (4000, 5000), (3, 1), (1, 1)])
def test_flo_of_another_length_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput):
        read_flo(b"PIEH" + struct.pack("<ii", *size) + bytes(16))


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_by_hand(order: str) -> None:
    scale = b"-1.0" if order == "<" else b"1"
    grey = b"Pf\n2 2\n" + scale + b"\n" + struct.pack(order + "4f", 3, 4, 1, 2)
    assert read_pfm(grey).tolist() == [[1, 2], [3, 4]]
    colour = b"PF 1 2 " + scale + b"\n" + struct.pack(order + "6f", 4, 5, 6, 1, 2, 3)
    assert read_pfm(colour).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]


@quick
@given(arrays(np.float32, (), (3,)))
def test_pfm_round_trip(values: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(read_pfm(write_pfm(values)), values)


@pytest.mark.parametrize("values", [ramp(), np.dstack([ramp(), -ramp(), ramp() * 2])], ids=["grey", "colour"])
def test_pfm_agrees_with_opencv(values: NDArray[np.float32]) -> None:
    bgr = values[..., ::-1] if values.ndim == 3 else values
    theirs = cv2.imencode(".pfm", np.ascontiguousarray(bgr))[1].tobytes()
    np.testing.assert_array_equal(read_pfm(theirs), values)
    read = cv2.imdecode(np.frombuffer(write_pfm(values), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read, bgr)


@pytest.mark.parametrize(
    "data",
    [
        b"Pf",
        b"Pf\n",
        b"Pf 2 2",
        b"Pf -2 2 1\n",
        b"Pf 99999999 99999999 1\n",
        b"PF 1 1 x\n",
        b"Pf 1 1 . \n",
        b"Pf 0 1 1\n",
    ],
)
def test_malformed_pfm(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        read_pfm(data)


def test_kitti_agrees_with_opencv_and_the_devkit() -> None:
    flow = waves()
    valid = ramp() > 0
    bgr = cv2.imdecode(np.frombuffer(write_kitti_flow(flow, valid), np.uint8), cv2.IMREAD_UNCHANGED)
    assert bgr.dtype == np.uint16
    np.testing.assert_array_equal(bgr[..., 0] > 0, valid)
    u, v = ((bgr[..., channel].astype(np.float64) - 2**15) / 64 for channel in (2, 1))
    assert np.abs(u - flow[..., 0])[valid].max() <= 1 / 128
    assert np.abs(v - flow[..., 1])[valid].max() <= 1 / 128
    theirs, seen = read_kitti_flow(cv2.imencode(".png", bgr)[1].tobytes())
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(theirs[valid], np.dstack([u, v])[valid])


@quick
@given(arrays(np.float32, (2,), min_value=-600, max_value=600, width=32))
def test_kitti_round_trip(flow: NDArray[np.float32]) -> None:
    read, valid = read_kitti_flow(write_kitti_flow(flow))
    inside = ((flow >= -512) & (flow <= 511.984375)).all(axis=-1)
    assert (valid >= inside).all()
    assert not valid[(np.abs(flow) > 512.01).any(axis=-1)].any()
    assert np.abs(read - flow)[valid].max(initial=0) <= 1 / 128
    assert not read[~valid].any()


def test_kitti_marks_what_does_not_fit() -> None:
    flow = np.array([[[0, 0], [np.nan, 0], [np.inf, 0], [600, 0], [0, -512], [0, 512]]], np.float32)
    assert read_kitti_flow(write_kitti_flow(flow))[1].tolist() == [[True, False, False, False, True, False]]


def test_kitti_needs_sixteen_bit_rgb() -> None:
    for levels in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16)):
        with pytest.raises(UnsupportedPicture):
            read_kitti_flow(write_png(levels))


@pytest.mark.parametrize("shape", [(1, 1), (16, 5), (17, 31), (40, 8)])
def test_exr_is_read_by_openexr(shape: tuple[int, int], tmp_path: Path) -> None:
    channels = {
        "Z": ramp(*shape),
        "uncertainty": np.random.default_rng(0).random(shape, np.float32),
        "A": ramp(*shape) > 0,
    }
    path = tmp_path / "ours.exr"
    path.write_bytes(write_exr(channels))
    with OpenEXR.File(str(path), separate_channels=True) as file:
        for name, plane in channels.items():
            pixels = file.channels()[name].pixels
            assert pixels.dtype == np.float32
            np.testing.assert_array_equal(pixels, plane)


LOSSLESS = ["NO", "RLE", "ZIPS", "ZIP", "PIZ", "ZSTD", "HTJ2K32"]


@pytest.mark.parametrize("kind", ["scanlineimage", "tiledimage"])
@pytest.mark.parametrize("compression", LOSSLESS)
def test_exr_of_openexr_is_read(compression: str, kind: str) -> None:
    channels = {"U": ramp(37, 41).astype(np.float16), "V": ramp(37, 41), "id": np.arange(37 * 41, dtype=np.uint32)}
    channels["id"] = channels["id"].reshape(37, 41)
    read = read_exr(theirs_exr(dict(channels), kind=kind, compression=compression))
    assert set(read) == set(channels)
    for name, plane in channels.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], plane)


@pytest.mark.parametrize("compression", ["PXR24", "B44", "B44A", "DWAA", "DWAB"])
def test_exr_of_lossy_compressions_is_read(compression: str) -> None:
    plane = (10 + ramp(64, 64)).astype(np.float16)
    read = read_exr(theirs_exr({"Z": plane}, compression=compression))["Z"]
    np.testing.assert_allclose(read, plane, rtol=0.1)


def test_exr_of_another_origin_is_read() -> None:
    data = theirs_exr({"Z": ramp()}, dataWindow=((-7, 5), (22, 24)))
    np.testing.assert_array_equal(read_exr(data)["Z"], ramp())


@pytest.mark.parametrize("kind", ["deep", "multi-part", "subsampled", "many channels", "huge tiles"])
def test_exr_of_other_kinds_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedPicture, match="EXR"):
        read_exr(odd_exr(kind))


def theirs_exr(
    channels: dict[str, Any], kind: str = "scanlineimage", compression: str = "ZIP", **attributes: Any
) -> bytes:
    out = io.BytesIO()
    header = {"type": getattr(OpenEXR, kind), "compression": getattr(OpenEXR, f"{compression}_COMPRESSION")}
    if kind == "tiledimage":
        header["tiles"] = OpenEXR.TileDescription()
    OpenEXR.File(header | {"comments": "hello"} | attributes, channels).write(out)
    return out.getvalue()


def odd_exr(kind: str) -> bytes:
    if kind == "deep":
        samples = np.empty((4, 4), object)
        samples.fill(np.ones(2, np.float32))
        return theirs_exr({"Z": samples}, kind="deepscanline", compression="ZIPS")
    if kind == "multi-part":
        out = io.BytesIO()
        parts = [OpenEXR.Part({"type": OpenEXR.scanlineimage}, {"Z": ramp()}, name) for name in ("left", "right")]
        OpenEXR.File(parts).write(out)
        return out.getvalue()
    if kind == "many channels":
        return theirs_exr({f"c{index}": ramp() for index in range(17)})
    if kind == "huge tiles":
        return patched(theirs_exr({"Z": ramp()}, kind="tiledimage"), struct.pack("<II", 32, 32), 64, 2**24)
    return patched(write_exr({"Z": ramp()}), struct.pack("<II", 1, 1), 2, 2)


def patched(data: bytes, old: bytes, *new: int) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, struct.pack(f"<{len(new)}I", *new))


@pytest.mark.parametrize("kind", ["scanlineimage", "tiledimage"])
@pytest.mark.parametrize("compression", ["NO", "ZIP", "PIZ"])
def test_exr_cut_short_is_refused(compression: str, kind: str) -> None:
    data = theirs_exr({"Z": ramp(40, 40)}, kind=kind, compression=compression)
    np.testing.assert_array_equal(read_exr(data)["Z"], ramp(40, 40))
    for end in range(0, len(data), max(1, len(data) // 200)):
        with pytest.raises(InvalidInput):
            read_exr(data[:end])
    with pytest.raises(UnreadablePicture):
        read_exr(data[:-1])


def test_exr_of_a_writer_that_died_is_refused() -> None:
    chunk, lines = 8 + 20 * 4, 32
    data = theirs_exr({"Z": ramp(lines, 20)}, compression="NO")
    table = len(data) - lines * (8 + chunk)
    without_table = data[:table] + bytes(8 * lines) + data[table + 8 * lines :]
    np.testing.assert_array_equal(read_exr(without_table)["Z"], ramp(lines, 20))
    for missing in (1, chunk, chunk + 1, 5 * chunk, lines * chunk):
        with pytest.raises(UnreadablePicture):
            read_exr(without_table[:-missing])


@quick
@given(arrays(np.float32, ()))
def test_exr_round_trip(plane: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(read_exr(write_exr({"Z": plane}))["Z"], plane)


@pytest.mark.parametrize(
    ("right", "bottom", "error"),
    [
        (2**20, 19, PictureTooLarge),
        (2**31 - 1, 2**31 - 1, InvalidInput),
        (4000, 4000, UnreadablePicture),
        (29, -5, UnreadablePicture),
    ],
)
def test_exr_bomb(right: int, bottom: int, error: type[InvalidInput]) -> None:
    data = write_exr({"Z": ramp()})
    window = struct.pack("<4i", 0, 0, 29, 19)
    assert window in data
    with pytest.raises(error):
        read_exr(data.replace(window, struct.pack("<4i", 0, 0, right, bottom)))


@pytest.mark.parametrize(
    "channels", [{}, {"Z": np.zeros(3)}, {"Z": np.zeros((2, 2)), "A": np.zeros((2, 3))}, {"": ramp()}, {"Z\0": ramp()}]
)
def test_exr_needs_planes(channels: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(ValueError, match="channel"):
        write_exr(channels)


@pytest.mark.parametrize("name", FILES)
def test_truncated_files(name: str) -> None:
    data, reader = FILES[name]
    whole = reader(data)
    for end in range(0, len(data), max(1, len(data) // 150)):
        with suppress(InvalidInput):
            np.testing.assert_equal(reader(data[:end]), whole)


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_raise_only_our_errors(name: str) -> None:
    data, reader = FILES[name]
    random = np.random.default_rng(9)
    for _ in range(80):
        broken = np.frombuffer(data, np.uint8).copy()
        reach = len(broken) if random.random() < 0.4 else min(len(broken), 150)
        broken[random.integers(0, reach, 3)] = random.choice([0, 1, 127, 128, 255], 3)
        with suppress(InvalidInput):
            reader(broken.tobytes())
        with suppress(InvalidInput):
            reader(data[: random.integers(4, 40)] + random.bytes(100))


@pytest.mark.parametrize("name", FILES)
def test_strangers_are_unsupported(name: str) -> None:
    _, reader = FILES[name]
    for data in (b"", b"hello world", bytes(100)):
        with pytest.raises(UnsupportedPicture) as caught:
            reader(data, param="truth")
        assert caught.value.param == "truth"


@pytest.mark.parametrize("name", ["png grey 16", "kitti", "flo", "pfm", "exr"])
def test_the_limit_is_the_callers(name: str) -> None:
    data, reader = FILES[name]
    reader(data, max_pixels=600)
    with pytest.raises(PictureTooLarge):
        reader(data, max_pixels=599)


@pytest.mark.parametrize("write", [write_flo, write_kitti_flow])
def test_flow_writers_need_flow(write: Callable[[NDArray[Any]], bytes]) -> None:
    with pytest.raises(ValueError, match="flow"):
        write(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="PFM"):
        write_pfm(np.zeros((3, 3, 2)))
