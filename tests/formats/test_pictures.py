from __future__ import annotations

import io
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFile

from saccade.errors import InvalidInput, PictureTooLarge, UnreadablePicture, UnsupportedPicture
from saccade.formats import read_mask, read_picture, write_png

Pixels = NDArray[np.uint8]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
TIFF_CODECS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")


def scene(height: int = 40, width: int = 56) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4 % 256, y * 5 % 256, (x + y) * 2 % 256], axis=-1).astype(np.uint8)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def tiff(array: NDArray[np.generic], **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, metadata=None, **options)
    return out.getvalue()


def samples() -> dict[str, bytes]:
    picture = Image.fromarray(scene())
    few = picture.quantize(16)
    found = {kind: encode(picture, kind) for kind in FORMATS}
    found |= {f"TIFF {codec}": encode(picture, "TIFF", compression=codec) for codec in TIFF_CODECS}
    return found | {
        "PNG palette": encode(few, "PNG"),
        "PNG 16 bit": write_png(scene().astype(np.uint16) * 257),
        "JPEG progressive": encode(picture, "JPEG", progressive=True),
        "JPEG CMYK": encode(picture.convert("CMYK"), "JPEG"),
        "WebP lossless": encode(picture, "WEBP", lossless=True),
        "WebP alpha": encode(with_alpha(scene()), "WEBP"),
        "BMP palette": encode(few, "BMP"),
        "GIF animated": encode(few, "GIF", save_all=True, append_images=[picture.quantize(8)]),
    }


def with_alpha(rgb: Pixels, alpha: int = 128) -> Image.Image:
    return Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], alpha, np.uint8)]))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(bytes(100)))


def bare_tiff(fields: dict[int, int], pixels: bytes) -> bytes:
    fields = {256: 6, 257: 4, 258: 8, 259: 1, 262: 1, 277: 1, 278: 4, 273: 0, 279: len(pixels)} | fields
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    picture = read_picture(encode(Image.fromarray(scene()), kind))
    assert picture.dtype == np.uint8
    assert picture.flags.writeable
    np.testing.assert_array_equal(picture, scene())


@pytest.mark.parametrize(("kind", "flag"), [("JPEG", ".jpg"), ("WEBP", ".webp"), ("TIFF", ".tiff"), ("PNG", ".png")])
def test_agrees_with_opencv(kind: str, flag: str) -> None:
    data = cv2.imencode(flag, np.ascontiguousarray(scene()[..., ::-1]))[1].tobytes()
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(read_picture(data).astype(int) - theirs).max() <= (3 if kind in ("JPEG", "WEBP") else 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "CMYK"])
def test_opaque_modes(mode: str) -> None:
    picture = Image.fromarray(scene()).convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read_picture(encode(picture, "TIFF")), expected)


def test_a_cmyk_jpeg_as_adobe_writes_it_is_not_a_negative() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(read_picture(encode(ink, "JPEG", quality=100)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_laid_on_white(kind: str) -> None:
    options: dict[str, object] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    black = with_alpha(np.zeros((8, 8, 3), np.uint8), alpha=51)
    assert (read_picture(encode(black, kind, **options)) == 204).all()


def test_grey_with_alpha() -> None:
    levels = np.dstack([np.zeros((4, 4), np.uint8), np.full((4, 4), 51, np.uint8)])
    assert (read_picture(encode(Image.fromarray(levels, "LA"), "PNG")) == 204).all()


def test_palette_with_transparency() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.putpixel((0, 0), 0)
    picture.info["transparency"] = 0
    read = read_picture(encode(picture, "PNG", transparency=0))
    assert tuple(read[0, 0]) == (255, 255, 255)
    assert tuple(read[1, 1]) == (10, 20, 30)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
@pytest.mark.parametrize("step", [1, 257])
def test_png_transparent_key(shape: tuple[int, ...], step: int) -> None:
    levels = np.zeros(shape, np.uint8 if step == 1 else np.uint16)
    levels[1:3] = 7 * step
    data = write_png(levels)
    key = chunk(b"tRNS", struct.pack(">H", 7 * step) * (3 if len(shape) == 3 else 1))
    assert read_picture(data[:33] + key + data[33:])[:, 0, 0].tolist() == [0, 255, 255, 0]


def wide_grey() -> NDArray[np.uint16]:
    return np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("codec", [None, "zlib"])
@pytest.mark.parametrize(
    "stored",
    [
        lambda grey: grey,
        lambda grey: grey.astype(np.int32),
        lambda grey: (grey / 65535).astype(np.float32),
        lambda grey: (grey / 257).astype(np.float32),
        lambda grey: grey.astype(np.float32),
    ],
    ids=["uint16", "int32", "float to 1", "float to 255", "float to 65535"],
)
def test_wide_tiffs_keep_their_tones(
    stored: Callable[[NDArray[np.uint16]], NDArray[np.generic]], codec: str | None, order: str
) -> None:
    data = tiff(stored(wide_grey()), byteorder=order, compression=codec)
    np.testing.assert_array_equal(read_picture(data), np.rint(wide_grey() / 257).repeat(3).reshape(20, 30, 3))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("codec", [None, "zlib"])
def test_sixteen_bit_rgb_tiff(codec: str | None, order: str) -> None:
    wide = np.dstack([wide_grey(), wide_grey()[::-1], wide_grey()[:, ::-1]])
    read = read_picture(tiff(wide, byteorder=order, compression=codec, photometric="rgb"))
    assert np.abs(read - wide / 257).max() <= 1


def test_sixteen_bit_png_of_opencv() -> None:
    wide = np.dstack([wide_grey(), wide_grey()[::-1], wide_grey()[:, ::-1]])
    grey = cv2.imencode(".png", wide_grey())[1].tobytes()
    rgb = cv2.imencode(".png", np.ascontiguousarray(wide[..., ::-1]))[1].tobytes()
    np.testing.assert_array_equal(read_picture(grey)[..., 0], np.rint(wide_grey() / 257))
    assert np.abs(read_picture(rgb) - wide / 257).max() <= 1


def test_white_is_zero() -> None:
    read = read_picture(tiff(wide_grey(), photometric="miniswhite"))
    np.testing.assert_array_equal(read[..., 0], 255 - np.rint(wide_grey() / 257))


def test_twelve_bit_tiff() -> None:
    levels = np.arange(24).reshape(4, 6) * 178
    bits = "".join(f"{level:012b}" for level in levels.flat)
    read = read_picture(bare_tiff({258: 12}, int(bits, 2).to_bytes(len(bits) // 8, "big")))
    np.testing.assert_array_equal(read[..., 0], np.rint(levels * 255 / 4095))


def test_separate_planes() -> None:
    planes = np.ascontiguousarray(np.moveaxis(scene(), -1, 0))
    np.testing.assert_array_equal(read_picture(tiff(planes, photometric="rgb", planarconfig="separate")), scene())
    with pytest.raises(UnsupportedPicture):
        read_picture(tiff(planes.astype(np.uint16), photometric="rgb", planarconfig="separate"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_float_pictures_without_a_range_are_refused(value: float) -> None:
    with pytest.raises(UnsupportedPicture) as caught:
        read_picture(tiff(np.full((4, 4), value, np.float32)), param="next")
    assert caught.value.param == "next"


def test_lab_is_refused() -> None:
    with pytest.raises(UnsupportedPicture):
        read_picture(encode(Image.new("LAB", (8, 8)), "TIFF"))


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF deflate"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(np.array([[10, 90, 170], [250, 50, 130]], np.uint8), np.ones((16, 16), np.uint8))
    options = {"compression": "tiff_deflate"} if kind == "TIFF deflate" else {}
    read = read_picture(encode(Image.fromarray(blocks).convert("RGB"), kind.split()[0], exif=exif, **options))
    expected = UPRIGHT[orientation](np.repeat(blocks[..., None], 3, axis=-1))
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).max() <= (0 if kind in ("PNG", "TIFF", "TIFF deflate") else 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_is_ignored() -> None:
    data = encode(Image.fromarray(scene()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_picture(data).shape == (40, 56, 3)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (read_picture(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("data", [b"hello", b"%PDF-1.7", b"<svg xmlns=''/>", b"P6 2 2 255 " + bytes(12), bytes(64)])
def test_other_types_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedPicture) as caught:
        read_picture(data)
    assert "PNG" in str(caught.value)
    assert caught.value.param == "image"


def test_messages_show_nothing_of_the_inside() -> None:
    data = samples()["PNG"]
    with pytest.raises(UnreadablePicture) as caught:
        read_picture(data[: len(data) // 2])
    assert not any(sign in str(caught.value) for sign in ("/", "0x", "PIL", "Error"))


def test_nothing_is_unreadable() -> None:
    with pytest.raises(UnreadablePicture) as caught:
        read_mask(b"")
    assert caught.value.param == "mask"


BOMBS = {
    "png": png_of_size(50_000, 50_000),
    "png beyond any": png_of_size(2**31 - 1, 2**31 - 1),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
    "webp": b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\xff" * 2 + bytes(20),
    "webp lossless": b"RIFF\x20\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\xff" + bytes(20),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff": bare_tiff({256: 60_000, 257: 60_000}, bytes(24)),
    "tiff tile": bare_tiff({259: 5, 322: 60_000, 323: 60_000, 324: 8, 325: 8}, bytes(24)),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_too_large_before_they_are_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    with pytest.raises(PictureTooLarge):
        read_picture(BOMBS[name])


def test_the_limit_is_the_callers() -> None:
    data = encode(Image.fromarray(scene()), "PNG")
    assert read_picture(data, max_pixels=40 * 56).shape == (40, 56, 3)
    with pytest.raises(PictureTooLarge, match="56 x 40"):
        read_picture(data, max_pixels=40 * 56 - 1)


@pytest.mark.parametrize("start", [b"zTXta\0\0", b"iTXta\0\1\0\0\0", b"iCCPa\0\0"])
@pytest.mark.parametrize("at", [33, -12], ids=["before the pixels", "after the pixels"])
def test_png_text_bombs(start: bytes, at: int) -> None:
    bomb = chunk(start[:4], start[4:] + zlib.compress(bytes(40_000_000), 9))
    data = encode(Image.fromarray(scene()), "PNG")
    tracemalloc.start()
    with suppress(InvalidInput):
        np.testing.assert_array_equal(read_picture(data[:at] + bomb + data[at:]), scene())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encode(Image.fromarray(scene()), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(UnsupportedPicture, match="scans"):
        read_picture(data[:-2] + scan * 200 + data[-2:])


def test_a_tiff_of_endless_strips_is_refused() -> None:
    data = bytearray(bare_tiff({}, bytes(24)))
    at = data.index(struct.pack("<HHI", 273, 4, 1))
    data[at + 4 : at + 8] = struct.pack("<I", 1_000_000)
    with pytest.raises(UnsupportedPicture, match="strips"):
        read_picture(bytes(data))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 64), (64, 1), (2, 101), (505, 10)])
def test_specks_and_threads_are_refused(width: int, height: int) -> None:
    with pytest.raises(InvalidInput, match=f"{width} x {height}"):
        read_picture(encode(Image.new("RGB", (width, height)), "PNG"))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_pictures_of_no_pixels_are_refused(width: int, height: int) -> None:
    with pytest.raises(InvalidInput):
        read_picture(png_of_size(width, height))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", samples())
def test_truncated_files_are_refused_or_whole(name: str) -> None:
    data = samples()[name]
    whole = read_picture(data)
    ends = {*range(0, min(len(data), 200), 3), *range(200, len(data), max(1, len(data) // 120))}
    refused = 0
    for end in ends:
        try:
            np.testing.assert_array_equal(read_picture(data[:end]), whole)
        except InvalidInput:
            refused += 1
    assert refused >= 0.6 * len(ends)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", [read_picture, read_mask])
def test_mutated_files_raise_only_our_errors(reader: Callable[[bytes], NDArray[np.generic]]) -> None:
    random = np.random.default_rng(7)
    for data in samples().values():
        for _ in range(25):
            broken = np.frombuffer(data, np.uint8).copy()
            reach = len(broken) if random.random() < 0.5 else min(len(broken), 120)
            broken[random.integers(0, reach, 3)] = random.choice([0, 1, 127, 128, 254, 255], 3)
            with suppress(InvalidInput):
                reader(broken.tobytes(), max_pixels=100_000)


@pytest.mark.filterwarnings("ignore")
def test_garbage_raises_only_our_errors() -> None:
    random = np.random.default_rng(8)
    for data in samples().values():
        for keep in (2, 4, 8, 16, 40):
            with pytest.raises(InvalidInput):
                read_picture(data[:keep] + random.bytes(200), max_pixels=1_000_000)


def test_out_of_memory_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", starve)
    with pytest.raises(PictureTooLarge):
        read_picture(encode(Image.fromarray(scene()), "BMP"))


def test_threads_do_not_disturb_each_other() -> None:
    files = list(samples().values())
    expected = [read_picture(data) for data in files]
    wrong: list[int] = []

    def work(first: int) -> None:
        for index in np.roll(np.arange(len(files)), first):
            if not np.array_equal(read_picture(files[index]), expected[index]):
                wrong.append(int(index))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


INSIDE = np.kron(np.array([[1, 0], [0, 1]], bool), np.ones((8, 8), bool))


@pytest.mark.parametrize(
    "stored",
    [
        INSIDE.astype(np.uint8) * 255,
        INSIDE.astype(np.uint8),
        INSIDE.astype(np.uint16) * 65535,
        INSIDE.astype(np.uint16),
        INSIDE[..., None].astype(np.uint8) * np.array([128, 0, 0], np.uint8),
    ],
    ids=["255", "1", "65535", "1 of 16 bits", "dark red"],
)
def test_masks_by_brightness(stored: NDArray[np.uint8]) -> None:
    mask = read_mask(write_png(stored))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, INSIDE)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_one_bit_masks(kind: str) -> None:
    np.testing.assert_array_equal(read_mask(encode(Image.fromarray(INSIDE), kind)), INSIDE)


def test_bool_tiff_mask() -> None:
    np.testing.assert_array_equal(read_mask(tiff(INSIDE, photometric="minisblack")), INSIDE)


def test_jpeg_mask() -> None:
    soft = encode(Image.fromarray(INSIDE.astype(np.uint8) * 255), "JPEG", quality=60)
    np.testing.assert_array_equal(read_mask(soft), INSIDE)


@pytest.mark.parametrize("level", [0, 255])
def test_masks_by_alpha(level: int) -> None:
    alpha = np.where(INSIDE, 200, 0).astype(np.uint8)
    picture = Image.fromarray(np.dstack([np.full((16, 16, 3), level, np.uint8), alpha]))
    np.testing.assert_array_equal(read_mask(encode(picture, "PNG")), INSIDE)


def test_an_opaque_alpha_says_nothing() -> None:
    picture = Image.fromarray(INSIDE.astype(np.uint8) * 255).convert("RGBA")
    np.testing.assert_array_equal(read_mask(encode(picture, "PNG")), INSIDE)


@pytest.mark.parametrize("level", [0, 255])
def test_plain_masks(level: int) -> None:
    mask = read_mask(write_png(np.full((4, 4), level, np.uint8)))
    assert mask.all() if level else not mask.any()


def test_masks_are_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = np.zeros((16, 8), bool)
    tall[:4] = True
    read = read_mask(encode(Image.fromarray(tall.astype(np.uint8) * 255), "PNG", exif=exif))
    np.testing.assert_array_equal(read, np.rot90(tall, -1))
