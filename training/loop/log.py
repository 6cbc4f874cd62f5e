"""What a run says of itself: rows of JSON, TensorBoard's events, a line that moves."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
WAITING = 1000


class Rows:
    """RUN/log.jsonl, one row a line, each with its `step`; rows beyond the step that a run resumes from are cut off.

    What a full disk does not take waits for the next row.
    """

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.waiting = file, list[str]()
        self.good = _length_until(file, step)
        if file.exists():
            os.truncate(file, self.good)

    def add(self, row: dict[str, Any]) -> None:
        """Append, and everything that waits."""
        self.waiting = [*self.waiting, json.dumps(row) + "\n"][-WAITING:]
        text = "".join(self.waiting).encode()
        try:
            with self.file.open("ab") as stream:
                stream.write(text)
        except OSError as error:
            log.warning("%s: %s; %d rows wait", self.file, error.strerror or error, len(self.waiting))
            self._mend()
            return
        self.good += len(text)
        self.waiting.clear()

    def _mend(self) -> None:
        """Cut off the half row that a failed write leaves."""
        with suppress(OSError):
            os.truncate(self.file, self.good)


def _length_until(file: Path, step: int) -> int:
    """Bytes of the rows up to a step."""
    length = 0
    try:
        with file.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n") or not json.loads(line)["step"] <= step:
                    break
                length += len(line)
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        pass  # the rest is no log
    return length


class Events:
    """RUN/tensorboard, where the package is installed; steps beyond the one resumed from are marked as void.

    Written here and now, not in a thread: a full disk must not end the run, or block it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.writer, self.file = None, None
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return
        self.pb = event_pb2
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / name).open("ab")
            self.writer = RecordWriter(self.file)
        except OSError as error:
            log.warning("no TensorBoard: %s", error)
        self._write(self.pb.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:
            begun = self.pb.SessionLog(status=self.pb.SessionLog.START)
            self._write(self.pb.Event(wall_time=time.time(), step=step + 1, session_log=begun))

    def add(self, row: dict[str, Any]) -> None:
        """The numbers of a row, each a curve over the steps."""
        if self.writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=k, simple_value=v) for k, v in row.items() if isinstance(v, float)]
        self._write(self.pb.Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        if self.writer is None:
            return
        try:
            self.writer.write(event.SerializeToString())
            self.writer.flush()
        except OSError as error:
            log.warning("TensorBoard's events end here: %s", error.strerror or error)
            self.writer = None

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what a full disk did not take
                self.file.close()


class Line:
    """Loss, speed, share of the machine and time left: a line that moves on a terminal, lines of a log elsewhere."""

    def __init__(self, stage: str, step: int, steps: int) -> None:
        self.stage, self.steps, self.bar = stage, steps, None
        if sys.stderr.isatty():
            with suppress(ImportError):
                self.bar = _bar(stage, step, steps)

    def show(self, row: dict[str, Any], left_s: float) -> None:
        """`row` as the log has it."""
        share = "" if row.get("mfu") is None else f"  MFU {row['mfu']:.0%}"
        text = f"loss {row['loss']:.4f}  {row['samples_per_s']:.1f} samples/s{share}  {duration(left_s)} left"
        if self.bar:
            self.bar[0].update(self.bar[1], completed=row["step"], text=text)
        else:
            log.info("%s %d/%d  %s", self.stage, row["step"], self.steps, text)

    def close(self) -> None:
        if self.bar:
            self.bar[0].stop()


def _bar(stage: str, step: int, steps: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(stage, total=steps, completed=step, text="")
    bar.start()
    return bar, task


def duration(seconds: float) -> str:
    """5 s, 3 min, 2 h 05 min, 3 d 4 h."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, days = minutes // 60, minutes // 1440
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60:02d} min" if days < 1 else f"{days} d {hours % 24} h"
