"""Write the latents of pictures of classes to shards, once, so that pretraining need not encode them in every epoch."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from training.codecs import CodecConfig, pictures_of
from training.config import COUNT, EDGE, NOT_NEGATIVE, build, explained, read, within
from training.data import LatentWriter
from training.data.latents import ABOUT
from training.loop.world import device_of
from training.stages.classify import measured
from training.stages.perceive import check_sizes
from training.stages.pictures import ImagesConfig, open_pictures

log = logging.getLogger(__name__)
STAGE = "encode"


@dataclass(frozen=True, kw_only=True)
class Config:
    """`saccade encode`."""

    images: ImagesConfig = explained("", factory=ImagesConfig)
    size: tuple[int, int] = explained("[height, width] in pixels", (256, 256))
    codec: CodecConfig = explained("", factory=CodecConfig)
    batch: int = explained("pictures encoded at once", 32)
    per_shard: int = explained("latents in a shard", 10_000)
    dtype: Literal["float16", "float32"] = explained("what a number is kept as", "float16")
    limit: int = explained("of the pictures, the first so many; 0: all", 0)

    def __post_init__(self) -> None:
        within(self, EDGE, "size")
        within(self, COUNT, "batch", "per_shard")
        within(self, NOT_NEGATIVE, "limit")


def run(config: Config, out: Path, device: str | None = None) -> int:
    """Shards in `out`, each written aside; goes on after the last whole one. How many latents there are.

    Raises InvalidInput."""
    where = device_of(device)
    source = open_pictures(config.images, 0, once=True)
    codec = measured(codec_of(config.codec, out), source, config.size)
    encoder = pictures_of(codec).to(where)
    check_sizes([config.size], encoder.stride)
    about = {"codec": asdict(codec), "size": list(config.size), "classes": source.classes}
    total = min(config.limit or len(source), len(source))
    with LatentWriter(out, about, config.per_shard, config.dtype) as writer:
        if writer.done >= total:
            log.info("encode: %s has all %d latents already", out, writer.done)
            return writer.done
        while writer.done < total:
            pictures, labels = source.batch(writer.done, min(config.batch, total - writer.done), config.size)
            with torch.no_grad():
                latents = encoder.encode(torch.from_numpy(pictures).to(where)).cpu().numpy()
            for latent, label in zip(latents, labels, strict=True):
                writer.add(latent, int(label))
    return total


def codec_of(codec: CodecConfig, out: Path) -> CodecConfig:
    """The codec, with the deviations that were measured for the shards in `out` where it names none itself."""
    said = read(out / ABOUT).get("codec") if (out / ABOUT).is_file() else None
    if not isinstance(said, dict) or said.get("kind") != codec.kind:
        return codec
    return replace(codec, picture_std=codec.picture_std or build(CodecConfig, said, "codec.").picture_std)
