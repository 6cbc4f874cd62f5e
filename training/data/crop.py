"""Which part of a picture is seen, and in which colours: the same draws for pictures and for their truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRETCH = 1.15  # how far from the picture's own proportions a sample may be

Look = tuple[float, np.ndarray, float]


@dataclass(frozen=True)
class Crop:
    """A part of a picture, mirrored or not, brought to `size` (H, W).

    The part fills the top left `content` (H, W) of it, all of it by default; past that, its last row and column repeat,
    as they do when serving (`saccade.fit`).
    """

    top: int
    left: int
    height: int
    width: int
    mirror: bool
    size: tuple[int, int]
    content: tuple[int, int] | None = None

    @classmethod
    def random(cls, rng: np.random.Generator, full: tuple[int, int], size: tuple[int, int], least: float) -> Crop:
        """Of the target's aspect ratio give or take 15%, covering at least `least` of what would fit."""
        aspect = size[1] / size[0] * np.exp(rng.uniform(-0.15, 0.15))
        height = min(full[0], full[1] / aspect) * np.sqrt(rng.uniform(least, 1))
        h, w = max(8, int(height)), max(8, min(full[1], int(height * aspect)))
        top, left = int(rng.integers(full[0] - h + 1)), int(rng.integers(full[1] - w + 1))
        return cls(top, left, h, w, rng.random() < 0.5, size)

    @classmethod
    def around(cls, mask: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> Crop:
        """As `saccade.fit.context_box` with a context of 0.5 to 1, then widened towards the aspect ratio of `size`, as
        far as the picture goes; what still differs is stretched by up to 15% and padded."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        margin = rng.uniform(0.5, 1.0) * max(np.ptp(rows) + 1, np.ptp(columns) + 1)
        spans = [(v[0] - margin, v[-1] + 1 + margin) for v in (rows, columns)]
        spans = [(max(0, int(a)), min(edge, int(b))) for (a, b), edge in zip(spans, mask.shape, strict=True)]
        height, width = (b - a for a, b in spans)
        wanted = max(height, width * size[0] / size[1]), max(width, height * size[1] / size[0])
        (top, bottom), (left, right) = (
            _widened(*span, want, edge, rng) for span, want, edge in zip(spans, wanted, mask.shape, strict=True)
        )
        return cls(top, left, bottom - top, right - left, rng.random() < 0.5, size)._padded()

    @classmethod
    def whole(cls, full: tuple[int, int], size: tuple[int, int], mirror: bool = False) -> Crop:
        """All of a picture, stretched by up to 15% and padded."""
        return cls(0, 0, *full, mirror, size)._padded()

    def picture(self, picture: np.ndarray) -> np.ndarray:
        """[H, W] or [H, W, C] resampled with antialiasing."""
        import cv2

        return self._resize(picture, cv2.INTER_AREA if self.height > self.filled[0] else cv2.INTER_LINEAR)

    def nearest(self, plane: np.ndarray) -> np.ndarray:
        """[H, W] or [H, W, C] without mixing values."""
        import cv2

        return self._resize(plane, cv2.INTER_NEAREST)

    def flow(self, flow: np.ndarray) -> np.ndarray:
        """[H, W, 2]: vectors follow the resize and the mirror."""
        across, down = self.filled[1] / self.width, self.filled[0] / self.height
        scale = np.array([-across if self.mirror else across, down], np.float32)
        return self.nearest(flow) * scale

    def seen(self) -> np.ndarray:
        """[H, W] bool of `size`: where the picture is, and not its padding."""
        out = np.zeros(self.size, bool)
        out[: self.filled[0], : self.filled[1]] = True
        return out

    @property
    def filled(self) -> tuple[int, int]:
        return self.content or self.size

    def _padded(self) -> Crop:
        """The same part, padded where filling `size` would stretch it by more than 15%."""
        stretch = (self.size[1] / self.width) / (self.size[0] / self.height)
        height, width = self.size
        if stretch > STRETCH:
            width = max(1, round(self.size[0] / self.height * self.width * STRETCH))
        elif stretch < 1 / STRETCH:
            height = max(1, round(self.size[1] / self.width * self.height * STRETCH))
        fits = (height, width) == self.size
        return Crop(
            self.top, self.left, self.height, self.width, self.mirror, self.size, None if fits else (height, width)
        )

    def _resize(self, picture: np.ndarray, how: int) -> np.ndarray:
        import cv2

        part = picture[self.top : self.top + self.height, self.left : self.left + self.width]
        out = cv2.resize(np.ascontiguousarray(part), self.filled[::-1], interpolation=how)
        if self.mirror:
            out = np.ascontiguousarray(out[:, ::-1])
        if self.content is None:
            return out
        below, right = self.size[0] - self.content[0], self.size[1] - self.content[1]
        return cv2.copyMakeBorder(out, 0, below, 0, right, cv2.BORDER_REPLICATE)


def _widened(low: int, high: int, want: float, edge: int, rng: np.random.Generator) -> tuple[int, int]:
    """The span within 0 .. edge, of length `want` where that fits, `low` to `high` somewhere in it."""
    length = max(high - low, min(edge, round(want)))
    low = int(rng.integers(max(0, high - length), min(low, edge - length) + 1))
    return low, low + length


def draw_look(rng: np.random.Generator) -> Look:
    """Saturation, gain of each channel, gamma."""
    return rng.uniform(0, 1.3), np.exp(rng.normal(0, 0.08, 3) + rng.normal(0, 0.2)), float(np.exp(rng.normal(0, 0.2)))


def apply_look(picture: np.ndarray, look: Look) -> np.ndarray:
    """[H, W, 3] in 0..255 -> the same as float32."""
    saturation, gain, gamma = look
    values = picture.astype(np.float32)
    grey = values.mean(-1, keepdims=True)
    values = np.clip((grey + (values - grey) * saturation) * gain, 0, 255)
    return (255 * (values / 255) ** gamma).astype(np.float32)


def colours(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For single pictures: colours, sometimes blur or noise."""
    import cv2

    values = apply_look(picture, draw_look(rng))
    if rng.random() < 0.3:
        values = cv2.GaussianBlur(values, (0, 0), rng.uniform(0.3, 1.2))
    if rng.random() < 0.3:
        values = values + rng.normal(0, rng.uniform(1, 10), values.shape).astype(np.float32)
    return np.clip(values, 0, 255)
