"""Marigold (2312.02145) and its kin: depth by Stable Diffusion's U-Net, as a folder of diffusers.

unet/, vae/ (AutoencoderKL or a tiny one), scheduler/, text_encoder/ and tokenizer/, model_index.json. Of the text only
the empty prompt matters: its embedding becomes a constant of the denoiser. What a file does not tell: that a one-step
variant (E2E-FT, 2409.11355) starts from zero instead of noise (`start`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import ModelError, NotInstalled
from training.importers.autoencoders import Autoencoder, any_size, built
from training.importers.imported import (
    Choices,
    ImageLatent,
    Imported,
    autoencoder_of,
    check_channels,
    facts_of,
    latent_of,
)
from training.importers.reading import assign, read_json, read_state
from training.importers.schedulers import scheduler_of
from training.servable import Servable, Spec

CLASS = "UNet2DConditionModel"
PIPELINES = ("MarigoldDepthPipeline", "MarigoldPipeline")
STEPS, ONE_STEP, EDGE_PX = 10, 1, 768
SUMMARY = "Depth by Stable Diffusion's U-Net, imported from a Marigold folder of diffusers."
UNUSED = (
    "class_embed_type", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "time_embedding_act_fn",
    "time_cond_proj_dim", "num_class_embeds", "time_embedding_dim",
)  # fmt: skip
"""Options of a U-Net that Stable Diffusion's leave alone."""


def load(place: Path, choices: Choices) -> Imported:
    """Raises ModelError for what is not such a folder, or not of depth, InvalidInput for a transformer's options."""
    choices.refuse("a U-Net", "dtr", "dtr_alpha", "dtr_beta", "active", "heads", "grid")
    index = read_json(place / "model_index.json") if (place / "model_index.json").is_file() else {}
    check_index(index)
    autoencoder = autoencoder_of(choices, place / "vae")
    if autoencoder is None:
        raise ModelError(f"{place.name} has no vae: name an autoencoder (codec)")
    unet = open_unet(place / "unet")
    channels = int(unet.config.out_channels)
    check_channels(autoencoder, channels)
    if unet.config.in_channels != 2 * channels:
        taken = unet.config.in_channels
        raise ModelError(f"the U-Net takes {taken} channels, not {2 * channels} of a picture and a map")
    scheduler = scheduler_of(place / "scheduler")
    denoiser = UNetDenoiser(unet, empty_prompt(place, int(unet.config.cross_attention_dim)))
    noise = choices.noise(**scheduler.noise)
    servable = Servable(
        ImageLatent(autoencoder),
        denoiser,
        autoencoder,
        (Spec("image_latent", channels, autoencoder.stride),),
        latent_of(autoencoder, patch=1),
        noise,
        Autoencoder.planes,
        (0,),
    ).eval()
    defaults = defaults_of(index, choices, scheduler.spacing, noise.start)
    task = {"label": 0, "coding": {"channels": 3, "clip": True}, "defaults": defaults}
    return Imported("marigold", None, {}, servable, facts_of(SUMMARY, choices) | {"tasks": {"depth": task}})


def check_index(index: dict[str, Any]) -> None:
    """Their siblings for normals and for light are U-Nets of the same shape."""
    pipeline, predicts = index.get("_class_name", PIPELINES[0]), index.get("prediction_type") or "depth"
    if pipeline not in PIPELINES or predicts != "depth":
        raise ModelError(f"{pipeline} predicts {predicts}: only depth can be imported")


def defaults_of(index: dict[str, Any], choices: Choices, spacing: str, start: str) -> dict[str, Any]:
    """What callers get who ask for nothing: as the folder says, one step for one-step variants."""
    steps = ONE_STEP if start == "zeros" else index.get("default_denoising_steps") or STEPS
    told = (choices.resolution, index.get("default_processing_resolution"), EDGE_PX)
    return {
        "steps": choices.steps or steps,
        "ensemble_size": 1,
        "reduction": "aligned_median",
        "spacing": choices.spacing or ("trailing" if start == "zeros" else spacing),
        "processing_resolution": next(edge for edge in told if edge is not None),
    }


def open_unet(folder: Path) -> nn.Module:
    """Stable Diffusion's U-Net. Raises ModelError for one with more than that."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise NotInstalled("a U-Net needs diffusers: pip install 'saccade[train]'") from error
    config = read_json(folder / "config.json")
    if config.get("_class_name") != CLASS:
        raise ModelError(f"unet/config.json is of {config.get('_class_name')}, not of {CLASS}")
    if strange := [name for name in UNUSED if config.get(name) is not None]:
        raise ModelError(f"a U-Net with {', '.join(strange)} is not supported")
    if config.get("center_input_sample") or config.get("dual_cross_attention"):
        raise ModelError("a U-Net with center_input_sample or dual_cross_attention is not supported")
    if not isinstance(config.get("cross_attention_dim", 1280), int):
        raise ModelError("a U-Net with several cross_attention_dim is not supported")
    unet = built(UNet2DConditionModel, config, "unet")
    assign(unet, read_state(folder), "unet")
    return any_size(unet).requires_grad_(False)


class UNetDenoiser(nn.Module):
    """latent [B, 4, h, w], timestep [B], task [B], image_latent [B, 4, h, w] -> prediction [B, 4, h, w], at any size.

    The U-Net's own layers in its own order. Its own `forward` decides by the size how it enlarges, which an export
    would freeze; here every level is enlarged to the size that it had on the way down.
    """

    def __init__(self, unet: nn.Module, prompt: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("prompt", prompt)

    def forward(self, latent: Tensor, timestep: Tensor, task: Tensor, image_latent: Tensor) -> Tensor:
        unet, text = self.unet, self.prompt.expand(latent.shape[0], -1, -1)
        time = unet.time_embedding(unet.time_proj(timestep).to(latent.dtype))
        x = unet.conv_in(torch.cat([image_latent, latent], 1))
        passed: tuple[Tensor, ...] = (x,)
        for block in unet.down_blocks:
            x, outputs = block(hidden_states=x, temb=time, **_seen(block, text))
            passed += outputs
        x = unet.mid_block(x, time, encoder_hidden_states=text)
        for block in unet.up_blocks:
            count = len(block.resnets)
            own, passed = passed[-count:], passed[:-count]
            size = passed[-1].shape[2:] if passed else None
            x = block(hidden_states=x, temb=time, res_hidden_states_tuple=own, upsample_size=size, **_seen(block, text))
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def _seen(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


def empty_prompt(place: Path, width: int) -> Tensor:
    """What the text encoder makes of nothing, [1, tokens, width]. Raises ModelError for a broken or another encoder."""
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise NotInstalled("the empty prompt needs transformers: pip install transformers") from error
    for part in ("text_encoder", "tokenizer"):
        if not (place / part).is_dir():
            raise ModelError(f"{place.name} has no {part}: the empty prompt's embedding comes from it")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place / "tokenizer", local_files_only=True)
        encoder, found = CLIPTextModel.from_pretrained(
            place / "text_encoder", local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
        )
    except Exception as error:  # their readers' own, of many kinds
        told = str(error).partition("\n")[0][:200]
        raise ModelError(f"the text encoder or its tokenizer cannot be read: {type(error).__name__}: {told}") from error
    faults = [str(key) for part in ("missing_keys", "mismatched_keys") for key in found.get(part, ())]
    if faults:
        raise ModelError(f"the text encoder's weights do not fit its configuration: {', '.join(sorted(faults)[:5])}")
    tokens = tokenizer("", padding="do_not_pad", truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        embedding = encoder.eval()(tokens)[0].clone()
    if embedding.shape[-1] != width or not bool(embedding.isfinite().all()):
        raise ModelError(f"the text encoder gives {list(embedding.shape)}, the U-Net wants [1, tokens, {width}]")
    return embedding
