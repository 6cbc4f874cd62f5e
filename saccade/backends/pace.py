"""How long a batch takes: seconds by kind of graph, label and size of picture, learnt from the batches that ran."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from statistics import median
from typing import Literal

Kind = Literal["encode", "denoise", "decode"]
Case = tuple[Kind, int | None, bool]
"""Of a batch: its kind, its label (of an encoding), and whether it ran alone."""

GUESS_PX = 256 * 256
GUESS_S: dict[Kind, float] = {"encode": 0.2, "denoise": 0.05, "decode": 0.05}
"""Of a batch at 256 x 256 px, until one of its kind has been seen."""
KEPT = 9
SAME = 0.03
"""By so much a size's median may stray from the one that is gone by."""
MOST_SIZES = 64


class Pace:
    """Seconds of a batch, by kind and the picture's pixels (those that the model is given), in company and alone.

    A size that was seen takes the median of its last batches, so that one that stood still for a while changes nothing.
    Between two sizes seen the time is linear in the pixels; beyond them it is in proportion to the nearest one's. What
    was only seen alone, or only in company, is in the same proportion to the other as at the nearest size seen in both.

    All this is known apart for each label (what selects a task) that pictures are encoded with: an encoder may do more
    for one than for another. A label that was not seen, or none, takes what the slowest one does: rather too much than
    too little. Steps and decodings ignore labels, for rows of several share a batch.

    `batch_size` rows of denoising run together; `concurrency` batches do.
    """

    def __init__(self, batch_size: int = 1, concurrency: int = 1) -> None:
        self._batch_size, self.concurrency = batch_size, concurrency
        self._seen: dict[Case, OrderedDict[int, deque[float]]] = defaultdict(OrderedDict)
        self._curves: dict[Case, dict[int, float]] = defaultdict(dict)
        self._known: dict[tuple[Case, int], float] = {}
        self.version = 0
        """Of what is known: while it stays, the same question has the same answer."""

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        self._batch_size = rows
        self.version += 1

    def saw(self, kind: Kind, pixels: int, seconds: float, alone: bool = False, label: int | None = None) -> None:
        """A batch ran for `seconds`; `alone`: without others beside it."""
        case = kind, label if kind == "encode" else None, alone
        seen = self._seen[case]
        seen.setdefault(pixels, deque(maxlen=KEPT)).append(seconds)
        seen.move_to_end(pixels)
        curve, now = self._curves[case], median(seen[pixels])
        if len(seen) > MOST_SIZES:
            del curve[seen.popitem(last=False)[0]]
        elif pixels in curve and abs(now - curve[pixels]) <= SAME * now:
            return
        curve[pixels] = now
        self._known.clear()
        self.version += 1

    def batch_s(self, kind: Kind, pixels: int, label: int | None = None, *, alone: bool = False) -> float:
        """Seconds of one batch from its start to its end."""
        case = kind, label, alone
        found = self._known.get((case, pixels))
        if found is None:
            found = self._known[case, pixels] = self._found(case, pixels)
        return found

    def _found(self, case: Case, pixels: int) -> float:
        """Of the case's label, or else of the slowest."""
        kind, label, alone = case
        seen = {known for of, known, _ in self._curves if of == kind}
        labels = {label} if label is not None and label in seen else seen
        found = (self._between((kind, known, alone), pixels) for known in labels)
        return max(found, default=GUESS_S[kind] * pixels / GUESS_PX)

    def _between(self, case: Case, pixels: int) -> float:
        kind, label, alone = case
        own, other = self._curves.get(case, {}), self._curves.get((kind, label, not alone), {})
        both = own.keys() & other.keys()
        if pixels in other and pixels not in own and both:
            near = min(both, key=lambda known: abs(known - pixels))
            return other[pixels] * own[near] / other[near]
        curve = sorted((own or other).items())
        at = bisect_left(curve, pixels, key=lambda point: point[0])
        if 0 < at < len(curve):
            (low, fast), (high, slow) = curve[at - 1], curve[at]
            return fast + (slow - fast) * (pixels - low) / (high - low)
        size, seconds = curve[min(at, len(curve) - 1)]
        return seconds * pixels / size

    def together(self, kind: Kind) -> int:
        """Rows of a full batch."""
        return self.batch_size if kind == "denoise" else 1

    def row_s(self, kind: Kind, pixels: int, label: int | None = None) -> float:
        """What a row takes of the machine's time when there is work for all of it."""
        return self.batch_s(kind, pixels, label) / self.together(kind) / self.concurrency

    def rows_s(self, kind: Kind, pixels: int, rows: int, at_once: int = 1, label: int | None = None) -> float:
        """Seconds until `rows` are done where nothing else runs and `at_once` of them never wait for each other."""
        wide = max(1, min(rows, at_once))
        batches = -(-wide // self.together(kind))  # of one round
        rounds = -(-rows // wide)
        return rounds * self.batch_s(kind, pixels, label, alone=batches == 1) * -(-batches // self.concurrency)

    def alone_s(self, pixels: int, steps: int, members: int, label: int | None = None) -> float:
        """Seconds of a request's graphs (one encoding, `steps` x `members`, a decoding each) that has all to itself."""
        encode = self.rows_s("encode", pixels, 1, label=label)
        denoise = steps * self.rows_s("denoise", pixels, members, members)
        return encode + denoise + self.rows_s("decode", pixels, members, members)

    def work_s(self, pixels: int, steps: int, members: int, label: int | None = None) -> float:
        """Seconds of the machine that such a request takes when it shares its batches with others."""
        rows: dict[Kind, int] = {"encode": 1, "denoise": steps * members, "decode": members}
        return sum(count * self.row_s(kind, pixels, label) for kind, count in rows.items())
