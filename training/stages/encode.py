"""Write the latents of pictures of classes to shards, once, so that pretraining need not encode them in every epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from training.codecs import CodecConfig, pictures_of
from training.config import explained
from training.data import LatentWriter
from training.stages.classify import measured
from training.stages.pictures import ImagesConfig, open_pictures

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


def run(config: Config, out: Path, device: str | None = None) -> int:
    """Shards in `out`, each written aside; goes on after the last whole one. How many latents there are."""
    source = open_pictures(config.images, 0, once=True)
    codec = measured(config.codec, source, config.size)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = pictures_of(codec).to(where)
    about = {"codec": asdict(codec), "size": list(config.size), "classes": source.classes}
    total = min(config.limit or len(source), len(source))
    with LatentWriter(out, about, config.per_shard, config.dtype) as writer:
        while writer.done < total:
            pictures, labels = source.batch(writer.done, min(config.batch, total - writer.done), config.size)
            with torch.no_grad():
                latents = encoder.encode(torch.from_numpy(pictures).to(where)).cpu().numpy()
            for latent, label in zip(latents, labels, strict=True):
                writer.add(latent, int(label))
    return total
