"""What can be served: three modules, and what a card needs to know of them. Exported by `training.export`, evaluated as
they are by `training.backend`.

    encoder    image, prompt [B, 3, H, W] in [-1, 1], task [B] int64  ->  one tensor for each of `conditioning`
    denoiser   latent [B, C, h, w], timestep [B] int64, task [B] int64, *conditioning  ->  prediction [B, C, h, w]
    decoder    latent [B, C, h, w], divided by its scale  ->  target picture [B, planes, H, W]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a card needs pydantic, training does not
    from saccade.card import Latent, Noise

Part = Literal["encoder", "denoiser", "decoder"]
PARTS: tuple[Part, ...] = ("encoder", "denoiser", "decoder")
Size = tuple[int, int, int]
"""Batch, and the picture's height and width in pixels."""


@dataclass(frozen=True)
class Spec:
    """One conditioning tensor [B, channels, H / cell, W / cell]."""

    name: str
    channels: int
    cell: int


@dataclass(frozen=True)
class Servable:
    """`labels`: the tasks' labels, which examples draw from. `tolerance`: how far an exported graph may be from eager
    torch, as a share of the output's deviation. `sizes`: batches and pictures on which that is looked at; edges are
    brought to the next multiple that the model takes."""

    encoder: nn.Module
    denoiser: nn.Module
    decoder: nn.Module
    conditioning: tuple[Spec, ...]
    latent: Latent
    noise: Noise
    planes: int
    labels: tuple[int, ...]
    tolerance: float = 1e-5
    sizes: tuple[Size, ...] = ((1, 96, 160), (3, 128, 64), (2, 144, 144))

    def module(self, part: Part) -> nn.Module:
        """The module behind a graph."""
        modules: Mapping[Part, nn.Module] = dict(zip(PARTS, (self.encoder, self.denoiser, self.decoder), strict=True))
        return modules[part]

    @property
    def parameters(self) -> int:
        """Of the three modules together; what they share counts once, and buffers do not."""
        return sum(p.numel() for p in nn.ModuleList(map(self.module, PARTS)).parameters())

    @property
    def encoded(self) -> tuple[Spec, ...]:
        """The encoder's outputs: the conditioning, or for a model without any the picture's own latent."""
        return self.conditioning or (Spec("image_latent", self.latent.channels, self.latent.stride),)

    @property
    def names(self) -> dict[Part, tuple[list[str], list[str]]]:
        """Inputs and outputs of each graph, in the order of the modules' arguments."""
        seen = [spec.name for spec in self.conditioning]
        return {
            "encoder": (["image", "prompt", "task"], [spec.name for spec in self.encoded]),
            "denoiser": (["latent", "timestep", "task", *seen], ["prediction"]),
            "decoder": (["latent"], ["picture"]),
        }

    def examples(self, batch: int, height: int, width: int, seed: int) -> dict[Part, tuple[Tensor, ...]]:
        """Random inputs of the three graphs for pictures of height x width, brought to multiples that the model takes;
        the second picture is the first, moved."""
        draw = torch.Generator().manual_seed(seed)
        height, width = (max(1, round(edge / self.latent.multiple)) * self.latent.multiple for edge in (height, width))

        def normal(channels: int, cell: int) -> Tensor:
            return torch.randn((batch, channels, height // cell, width // cell), generator=draw)

        picture = nn.functional.interpolate(normal(3, 4), scale_factor=4, mode="bicubic").tanh()
        task = torch.tensor(self.labels)[torch.randint(len(self.labels), (batch,), generator=draw)]
        latent = normal(self.latent.channels, self.latent.stride)
        timestep = torch.randint(self.noise.timesteps, (batch,), generator=draw)
        seen = [normal(spec.channels, spec.cell) for spec in self.conditioning]
        return {
            "encoder": (picture, picture.roll((1, 3), (2, 3)), task),
            "denoiser": (latent, timestep, task, *seen),
            "decoder": (latent,),
        }

    def dynamic_shapes(self, largest_batch: int) -> dict[Part, tuple[dict[int, Any], ...]]:
        """Batch and both sizes are free in every graph; sizes are tied to each other as strides demand."""
        from torch.export import Dim

        batch = Dim("batch", min=1, max=largest_batch)
        rows, columns = Dim("rows", min=1, max=256), Dim("columns", min=1, max=256)

        def sized(cell: int) -> dict[int, Any]:
            times = self.latent.multiple // cell
            return {0: batch, 2: times * rows if times > 1 else rows, 3: times * columns if times > 1 else columns}

        picture, latent, one = sized(1), sized(self.latent.stride), {0: batch}
        free = {0: batch, 2: Dim("h", min=1, max=512), 3: Dim("w", min=1, max=512)}
        seen = [sized(spec.cell) for spec in self.conditioning]
        return {"encoder": (picture, picture, one), "denoiser": (latent, one, one, *seen), "decoder": (free,)}

    def eval(self) -> Servable:
        """The same, its modules in evaluation mode."""
        for part in PARTS:
            self.module(part).eval()
        return self
