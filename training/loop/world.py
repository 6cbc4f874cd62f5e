"""The processes of a run: who this one is, and what they tell each other."""

from __future__ import annotations

import atexit
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist

from saccade.errors import InvalidInput, ModelError

T = TypeVar("T")
DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, which computes on `device`."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None = None) -> World:
        """As torchrun's environment says; alone without one. `device`: cpu, cuda or cuda:1 (None: CUDA where it is).

        Raises InvalidInput for a device that is not here."""
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        kind = device_of(device)
        if kind.type == "cuda":
            if kind.index is None or size > 1:
                kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(kind)
        if size > 1 and not dist.is_initialized():
            _meet("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo")
        return cls(rank, size, kind)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the log and the folders."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """What every process has, on every process."""
        if self.size == 1:
            return [mine]
        theirs: list[Any] = [None] * self.size
        dist.all_gather_object(theirs, mine)
        return theirs

    def any(self, *flags: bool) -> list[bool]:
        """Which flags are up on at least one process."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Of a tensor over the processes, in its place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Of a tensor over the processes, in its place."""
        return self.sum(value).div_(self.size)

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` on every process; an OSError or ModelError of any is raised on all, so that none waits for it."""
        done, failed = None, None
        try:
            done = work()
        except (OSError, ModelError) as error:
            failed = (isinstance(error, ModelError), str(error))
        failures = [failure for failure in self.gather(failed) if failure]
        if failures:
            is_model, why = failures[0]
            raise ModelError(why) if is_model else OSError(why)
        return done  # type: ignore[return-value]

    def share_of(self, all_work: Sequence[T]) -> Sequence[T]:
        """What of a list this process takes on."""
        return all_work[self.rank :: self.size]


def device_of(name: str | None) -> torch.device:
    """cpu, cuda or cuda:1 (None: CUDA where it is). Raises InvalidInput for what is no such device, or is not here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not DEVICE.fullmatch(name):
        raise InvalidInput(f"a device is cpu, cuda or cuda:N, not {name!r}", param="device")
    kind = torch.device(name)
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("there is no CUDA device here", param="device")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"there is no {name} here, only {torch.cuda.device_count()}", param="device")
    return kind


def _meet(backend: str) -> None:
    """Join the other processes, until this one ends."""
    try:
        dist.init_process_group(backend)
    except RuntimeError as error:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            error.add_note(
                "After a restart torchrun hands out the addresses of the processes that died, unless it was started "
                "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment."
            )
        raise
    atexit.register(dist.destroy_process_group)


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Nobody else trains in `folder` meanwhile. Raises ModelError, on all processes, where somebody does."""
    with (folder / "lock").open("w") if world.first else nullcontext() as lock:
        world.agree(lambda: None if lock is None else _lock(lock, folder))
        yield


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
    except BlockingIOError:
        raise ModelError(f"another process trains in {folder}: wait for its end, or choose another folder") from None
