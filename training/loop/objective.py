"""What a stage brings to the loop."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Objective(Protocol):
    """What is learnt, from what. Subclass it: what has a body here is a default.

    `model` holds float32 parameters; those with requires_grad are trained, averaged and kept in checkpoints with the
    rest. With several processes it is sharded in place (FSDP2: its `blocks`, one by one, and the root), so `loss` must
    go through `model(...)` itself, and never read a parameter beside that. The loop moves it to the device.
    """

    model: nn.Module

    def batch(self, step: int, part: int, parts: int) -> Any:
        """Part `part` of the `parts` equal parts of a step's rows, on the CPU: tensors, arrays, or dicts, tuples and
        dataclasses of them. Pure in its arguments, which is all there is to resume. May run in a thread, ahead."""

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part's mean loss, and what the log should have beside it (scalars; not every part needs every name).

        Tensors of the batch are on the model's device, where `generator` is too: it is seeded by (seed, step, part), as
        torch's own is, so draws of both kinds come out the same after a resume.
        """

    def after(self, model: nn.Module, step: int) -> None:
        """After the optimizer's step: buffers to keep up. Counts as part of the step."""

    def rows(self, step: int) -> int | None:
        """Rows of a step over all parts; None: the configuration's `batch`."""
        return None

    def rate(self, step: int) -> float | None:
        """A learning rate of its own; None: the configuration's."""
        return None
