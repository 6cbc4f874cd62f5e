"""Autoencoders of latent diffusion, from diffusers' folders: Stable Diffusion's AutoencoderKL and the tiny ones.

Their classes compute; what is read into them, and how they are made fit for export at any size, is here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from saccade.errors import ModelError, NotInstalled
from saccade.tasks import ycbcr_to_rgb
from training.codecs import Codec
from training.importers.reading import State, assign, listed, locate, read_json, read_state

Module = TypeVar("Module", bound=nn.Module)
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention layers as older files of diffusers call them."""
_OLD = re.compile(rf"(?P<block>.*attentions\.\d{{1,4}})\.(?P<layer>{'|'.join(OLD_NAMES)})\.(?P<value>weight|bias)")


class Autoencoder(nn.Module):
    """RGB [B, 3, H, W] in [-1, 1] <-> latents [B, `channels`, H / `stride`, W / `stride`]: the mean, nothing drawn.

    `scale`: diffusion works on latents times this, which neither direction applies.
    """

    planes = 3

    def __init__(self, inner: nn.Module, kind: Literal["AutoencoderKL", "AutoencoderTiny"]) -> None:
        super().__init__()
        config = inner.config
        self.inner, self.kind = any_size(inner).eval(), kind
        self.channels = int(config.latent_channels)
        levels = config.encoder_block_out_channels if kind == "AutoencoderTiny" else config.block_out_channels
        self.stride = 2 ** (len(levels) - 1)
        self.scale = float(config.scaling_factor)

    def encode(self, pictures: Tensor) -> Tensor:
        encoded = self.inner.encoder(pictures)
        if self.kind == "AutoencoderTiny":
            return encoded
        if self.inner.quant_conv is not None:
            encoded = self.inner.quant_conv(encoded)
        return encoded[:, : self.channels]

    def decode(self, latents: Tensor) -> Tensor:
        if self.kind == "AutoencoderKL" and self.inner.post_quant_conv is not None:
            latents = self.inner.post_quant_conv(latents)
        return self.inner.decoder(latents)

    forward = decode


class Scaled(Codec):
    """An autoencoder as the codec of a perception model: latents come multiplied by its scale.

    Targets are three planes: depth thrice; u, v and nothing; the whole object in RGB on white.
    """

    planes = 3

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False)
        self.channels, self.stride = autoencoder.channels, autoencoder.stride
        matrix = torch.tensor(ycbcr_to_rgb(torch.eye(3).numpy()))
        self.register_buffer("to_rgb", matrix.float()[:, :, None, None], persistent=False)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.autoencoder.encode(pictures) * self.autoencoder.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents / self.autoencoder.scale)

    def planes_of(self, target: Tensor, task: Tensor) -> Tensor:
        depth = target[:, :1].expand(-1, 3, -1, -1)
        flow = torch.cat([target[:, :2], torch.zeros_like(target[:, :1])], 1)
        whole = nn.functional.conv2d(target[:, 1:4], self.to_rgb)
        each = torch.stack([depth, flow, whole], 1)
        return each[torch.arange(len(target), device=task.device), task]


def open_codec(place: str | Path) -> Scaled:
    """The autoencoder at a folder (or hub name) as a codec."""
    return Scaled(open_autoencoder(locate(place)))


def open_autoencoder(folder: Path) -> Autoencoder:
    """Of diffusers' folder, or of a pipeline's folder with one inside. Raises ModelError for what is not one."""
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ModelError(f"{folder.name}/config.json is of {kind}; autoencoders are {' and '.join(CLASSES)}")
    if kind == "AutoencoderTiny":
        config.pop("block_out_channels", None)  # written for pipelines to see, a copy of the decoder's
    if config.get("shift_factor"):
        raise ModelError(f"{folder.name}: an autoencoder whose latents are shifted (shift_factor) is not supported")
    model = built(getattr(_diffusers(), kind), config, folder.name)
    state = renamed(read_state(folder))
    assign(model, state, folder.name)
    return Autoencoder(model.requires_grad_(False), kind)


def renamed(state: State) -> State:
    """Older files' attention layers under today's names, 1 x 1 convolutions as the matrices that they are."""
    found: State = {}
    for key, value in state.items():
        if match := _OLD.fullmatch(key):
            key = f"{match['block']}.{OLD_NAMES[match['layer']]}.{match['value']}"
            value = value.flatten(1) if value.ndim == 4 else value
        if key in found:
            raise ModelError(f"two weights are called {key}, one by an older name")
        found[key] = value
    return found


def built(kind: type[Module], config: dict[str, Any], what: str) -> Module:
    """A module of diffusers by its configuration, on the meta device: sizes are believed only with their weights.

    Raises ModelError for a configuration that it does not take.
    """
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            return kind(**own)
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, NotImplementedError, RuntimeError) as error:
        told = str(error).partition("\n")[0]
        raise ModelError(f"{what}/config.json does not describe a {kind.__name__}: {told}") from error


def any_size(module: Module) -> Module:
    """Replace diffusers' upsampling, whose branches on batch and size would be frozen by an export."""
    from diffusers.models.upsampling import Upsample2D

    strange = []
    for name, child in list(module.named_modules()):
        if not isinstance(child, Upsample2D):
            continue
        plain = not child.use_conv_transpose and child.norm is None
        if not plain or not isinstance(getattr(child, "conv", None), nn.Conv2d):
            strange.append(name)
            continue
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, Enlarge(child.conv))
    if strange:
        raise ModelError(f"layers that enlarge in ways that are not supported: {listed(strange)}")
    return module


class Enlarge(nn.Module):
    """Twice the size, or the size that is asked for, by nearest neighbours; then a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, size: Any = None, *_: Any, **__: Any) -> Tensor:
        if size is None:
            return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(nn.functional.interpolate(x, size=size, mode="nearest"))


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise NotInstalled("this needs diffusers: pip install 'saccade[train]'") from error
    return diffusers
