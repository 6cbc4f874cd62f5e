"""Pictures and targets to latents and back, each channel of deviation about 1: the codecs of a perception model.

| kind        | pictures                           | targets (four planes, `saccade.tasks`)                        |
|-------------|------------------------------------|---------------------------------------------------------------|
| dct         | Y, Cb, Cr: 10 + 3 + 3 coefficients | 10 + 10 + 3 + 3 coefficients of the four planes               |
| autoencoder | an imported autoencoder, of RGB    | the same, of three: depth thrice; u, v, 0; the object in RGB |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saccade.errors import InvalidInput
from saccade.tasks import rgb_to_ycbcr
from training.config import POSITIVE, explained, within
from training.models.codec import BLOCK, DCTCodec

PICTURE_KEPT = (10, 3, 3)
TARGET_KEPT = (10, 10, 3, 3)
LEAST_DEVIATION = 0.03
"""Channels that hardly ever say anything are not blown up beyond this."""


@dataclass(frozen=True)
class CodecConfig:
    """What pictures and targets are coded with."""

    kind: Literal["dct", "autoencoder"] = explained(
        "dct: a fixed block transform; autoencoder: an imported one (path)", "dct"
    )
    path: str = explained("folder of the autoencoder, as diffusers has them", "")
    picture_std: tuple[float, ...] = explained(
        "of each channel of pictures' latents; empty: measured when a run begins", ()
    )
    target_std: tuple[float, ...] = explained("the same of targets' latents; empty: measured when a run begins", ())

    def __post_init__(self) -> None:
        within(self, POSITIVE, "picture_std", "target_std")


class Codec(nn.Module, ABC):
    """`planes` pictures of `stride` times the size <-> `channels` of latents."""

    planes: int
    channels: int
    stride: int

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor: ...

    @abstractmethod
    def planes_of(self, target: Tensor, task: Tensor) -> Tensor:
        """Four coded planes [B, 4, H, W] of tasks [B] (places in depth, flow, amodal) as this codec takes them."""


class Blocks(Codec):
    """The block DCT, its channels divided by their deviations. `ycbcr`: pictures are RGB outside and YCbCr inside."""

    stride = BLOCK

    def __init__(self, kept: tuple[int, ...], std: tuple[float, ...], ycbcr: bool) -> None:
        super().__init__()
        self.planes, self.channels = len(kept), sum(kept)
        std = std or (1.0,) * self.channels
        if len(std) != self.channels or not min(std) > 0:
            raise InvalidInput(f"the codec has {self.channels} channels, each with a deviation above 0", param="codec")
        self.dct = DCTCodec(kept)
        self.register_buffer("std", torch.tensor(std).float()[:, None, None])
        matrix = torch.tensor(rgb_to_ycbcr(torch.eye(3).numpy())) if ycbcr else torch.eye(len(kept))
        self.register_buffer("colours", matrix.float()[:, :, None, None])
        self.register_buffer("back", torch.linalg.inv(matrix.double()).float()[:, :, None, None])
        self.ycbcr = ycbcr

    def encode(self, pictures: Tensor) -> Tensor:
        if self.ycbcr:
            pictures = nn.functional.conv2d(pictures, self.colours)
        return self.dct.encode(pictures) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        pictures = self.dct.decode(latents * self.std)
        return nn.functional.conv2d(pictures, self.back) if self.ycbcr else pictures

    def planes_of(self, target: Tensor, task: Tensor) -> Tensor:
        return target


def pictures_of(config: CodecConfig) -> Codec:
    """The codec of images and prompts."""
    if config.kind == "dct":
        return Blocks(PICTURE_KEPT, config.picture_std, ycbcr=True)
    if not config.path:
        raise InvalidInput("name the folder of the model's autoencoder: codec.path", param="codec")
    from training.importers.autoencoders import open_codec

    return open_codec(config.path)


def targets_of(config: CodecConfig) -> Codec:
    """The codec of targets."""
    if config.kind == "dct":
        return Blocks(TARGET_KEPT, config.target_std, ycbcr=False)
    return pictures_of(config)


def deviations(latents: Tensor) -> tuple[float, ...]:
    """Root mean square of every channel of [B, C, h, w]."""
    return tuple(latents.double().square().mean((0, 2, 3)).sqrt().clamp(min=LEAST_DEVIATION).tolist())


def sources_of_targets() -> tuple[int, ...]:
    """For every channel of a DCT target, the picture's channel that is most like it: Y for the first two planes, then
    Cb and Cr. What was learned of pictures begins to serve targets through this."""
    y, cb, cr = PICTURE_KEPT
    return (*range(y), *range(y), *range(y, y + cb), *range(y + cb, y + cb + cr))
