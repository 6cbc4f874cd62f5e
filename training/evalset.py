"""The evaluation pictures: a folder with depth/, flow/ and amodal/, read, checked and listed.

    depth/NAME.png    depth/NAME.npz {gt [H, W] float, valid [H, W] bool, kind: "metric_depth_m" or "disparity_px"}
    flow/NAME_1.png   flow/NAME_2.png   flow/NAME.npz {flow [H, W, 2] pixels, u right and v down; valid [H, W] bool}
    amodal/IMG.png    amodal/ITEM_visible.png   amodal/ITEM_whole.png   masks, 0 and 255

IMG is ITEM, or ITEM without its trailing `_NN`. Any folder in this form can be evaluated, real or generated.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from saccade.formats import pictures
from saccade.tasks import TaskName

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Array = NDArray[np.float32]

ALL_TASKS: tuple[TaskName, ...] = get_args(TaskName)
MAX_PIXELS = 100_000_000
DENSE_FROM = 0.5
HIDDEN_FROM = 0.05
FLOW_SETS = {"mb": "middlebury"}


@dataclass(frozen=True)
class DepthItem:
    """`image` and the truth beside it."""

    task: ClassVar[TaskName] = "depth"
    name: str
    image: Path
    truth: Path

    def load(self) -> tuple[Picture, Array, Mask]:
        """Picture [H, W, 3], true depth [H, W] (metres, or 1/disparity), validity [H, W]."""
        picture = read_picture(self.image)
        arrays = _arrays(self.truth, "gt", "valid", "kind")
        truth, valid, kind = arrays["gt"].astype(np.float32), arrays["valid"].astype(bool), str(arrays["kind"])
        _expect(self.truth, truth, picture.shape[:2], valid)
        if kind not in ("metric_depth_m", "disparity_px"):
            raise InvalidInput(f"{_short(self.truth)}: kind is {kind!r}, not metric_depth_m or disparity_px")
        if not (truth[valid] > 0).all():
            raise InvalidInput(f"{_short(self.truth)}: valid {kind} values must be above 0")
        if kind == "disparity_px":
            truth = np.divide(1, truth, out=np.zeros_like(truth), where=valid)
        return picture, truth, valid


@dataclass(frozen=True)
class FlowItem:
    """Two frames, and the motion of the first's pixels."""

    task: ClassVar[TaskName] = "flow"
    name: str
    image: Path
    next_image: Path
    truth: Path

    @property
    def set(self) -> str:
        """The benchmark: what stands before the name's first underscore."""
        prefix = self.name.split("_")[0]
        return FLOW_SETS.get(prefix, prefix)

    def load(self) -> tuple[Picture, Picture, Array, Mask]:
        """Frames [H, W, 3], true flow [H, W, 2] in pixels, validity [H, W]."""
        picture, following = read_picture(self.image), read_picture(self.next_image)
        if following.shape != picture.shape:
            raise InvalidInput(f"{_short(self.next_image)}: not the size of the first frame")
        arrays = _arrays(self.truth, "flow", "valid")
        truth, valid = arrays["flow"].astype(np.float32), arrays["valid"].astype(bool)
        _expect(self.truth, truth, (*picture.shape[:2], 2), valid)
        return picture, following, truth, valid


@dataclass(frozen=True)
class AmodalItem:
    """A picture, the visible part of one object (the prompt), and the whole of it (the truth)."""

    task: ClassVar[TaskName] = "amodal"
    name: str
    image: Path
    visible: Path
    whole: Path

    def load(self) -> tuple[Picture, Mask, Mask]:
        """Picture [H, W, 3], visible part [H, W], whole object [H, W]."""
        picture = read_picture(self.image)
        visible, whole = read_mask(self.visible), read_mask(self.whole)
        for path, mask in ((self.visible, visible), (self.whole, whole)):
            if mask.shape != picture.shape[:2]:
                raise InvalidInput(f"{_short(path)}: not the size of the picture")
            if not mask.any():
                raise InvalidInput(f"{_short(path)}: the mask is empty")
        return picture, visible, whole


Item = DepthItem | FlowItem | AmodalItem


def find(data: Path, tasks: Sequence[TaskName] = ALL_TASKS) -> list[Item]:
    """Every item of the folder, in order of task and name.

    Every file is read once. Raises InvalidInput naming and counting all that are missing or broken, before any time
    is spent on a model; also when a task has no items at all.
    """
    items: list[Item] = []
    problems: list[str] = []
    for task in tasks:
        found = _LISTERS[task](data / task)
        if not found:
            problems.append(f"{task}/: no items")
        items += found
    problems += dict.fromkeys(problem for item in items if (problem := _problem(item)))
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise InvalidInput(f"{len(problems)} of the evaluation files cannot be used:{lines}", param="data")
    return items


def read_picture(path: Path) -> Picture:
    """[H, W, 3] uint8. Raises InvalidInput that names the file."""
    with _naming(path):
        return pictures.read_picture(path.read_bytes(), max_pixels=MAX_PIXELS, param="data")


def read_mask(path: Path) -> Mask:
    """[H, W] bool. Raises InvalidInput that names the file."""
    with _naming(path):
        return pictures.read_mask(path.read_bytes(), max_pixels=MAX_PIXELS, param="data")


def hidden_share(visible: Mask, whole: Mask) -> float:
    """Share of the whole object that its visible part leaves out."""
    return 1 - float((visible & whole).sum()) / float(whole.sum())


def _problem(item: Item) -> str | None:
    try:
        item.load()
    except InvalidInput as error:
        return str(error)
    return None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of reading and decoding become InvalidInput that says which file it is."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidInput(f"{_short(path)}: missing", param="data") from error
    except OSError as error:
        raise InvalidInput(f"{_short(path)}: cannot be opened: {error.strerror}", param="data") from error
    except InvalidInput as error:
        raise InvalidInput(f"{_short(path)}: {error}", param="data") from error


def _arrays(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    with _naming(path), path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _member(archive, name) for name in names}
        except InvalidInput:
            raise
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InvalidInput("not a readable npz file") from error


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    if f"{name}.npy" not in archive.namelist():
        raise InvalidInput(f"has no array {name}")
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _expect(path: Path, truth: Array, shape: tuple[int, ...], valid: Mask) -> None:
    if truth.shape != shape or valid.shape != shape[:2]:
        raise InvalidInput(f"{_short(path)}: arrays are {truth.shape} and {valid.shape}, the picture wants {shape}")
    if not valid.any():
        raise InvalidInput(f"{_short(path)}: no pixel is valid")
    if not np.isfinite(truth[valid]).all():
        raise InvalidInput(f"{_short(path)}: a valid pixel is not finite")


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _names(folder: Path, *endings: str) -> list[str]:
    """Every NAME for which a file NAME + ending is there: an incomplete item is listed, so that it is missed."""
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({name.removesuffix(end) for end in endings for name in files if name.endswith(end)})


def _depth_items(folder: Path) -> list[Item]:
    return [DepthItem(n, folder / f"{n}.png", folder / f"{n}.npz") for n in _names(folder, ".png", ".npz")]


def _flow_items(folder: Path) -> list[Item]:
    return [
        FlowItem(n, folder / f"{n}_1.png", folder / f"{n}_2.png", folder / f"{n}.npz")
        for n in _names(folder, "_1.png", "_2.png", ".npz")
    ]


def _amodal_items(folder: Path) -> list[Item]:
    return [
        AmodalItem(n, _amodal_image(folder, n), folder / f"{n}_visible.png", folder / f"{n}_whole.png")
        for n in _names(folder, "_visible.png", "_whole.png")
    ]


def _amodal_image(folder: Path, item: str) -> Path:
    own = folder / f"{item}.png"
    return own if own.exists() else folder / (re.sub(r"_\d+$", "", item) + ".png")


_LISTERS: dict[TaskName, Callable[[Path], list[Item]]] = {
    "depth": _depth_items,
    "flow": _flow_items,
    "amodal": _amodal_items,
}
