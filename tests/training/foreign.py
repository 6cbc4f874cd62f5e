"""Checkpoints of others with small random weights, written by their own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 24
V1_0: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "prediction_type": "v_prediction", "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
V1_1: dict[str, Any] = {**V1_0, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ONE_STEP: dict[str, Any] = {**V1_0, "timestep_spacing": "trailing"}


def randomised(module: nn.Module, seed: int, scale: float = 0.15) -> nn.Module:
    """Weights that no initialisation would give: biases and gates that are zero elsewhere matter too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(torch.randn(value.shape, generator=draw) * scale + (1.0 if norm else 0.0))
    return module.eval()


def autoencoder(kind: str, seed: int = 0) -> nn.Module:
    """The tiny one of four levels, so of stride 8, like the real ones; the other of two."""
    if kind == "AutoencoderTiny":
        model = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
        )  # fmt: skip
    else:
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
            scaling_factor=0.18215,
        )  # fmt: skip
    return randomised(model, seed)


def unet(seed: int = 1) -> nn.Module:
    """Of Stable Diffusion's blocks, two levels and a few channels."""
    model = UNet2DConditionModel(
        in_channels=8, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=(2, 4), use_linear_projection=True,
    )  # fmt: skip
    return randomised(model, seed)


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Of the two tokens that the empty prompt consists of."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def text_encoder(seed: int = 2) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=3, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return randomised(CLIPTextModel(config), seed, 0.3)


def marigold(folder: Path, scheduler: dict[str, Any], vae: str = "AutoencoderKL", steps: int = 4) -> Any:
    """A pipeline of diffusers, saved to `folder` by itself."""
    from diffusers import MarigoldDepthPipeline

    pipeline = MarigoldDepthPipeline(
        unet(), autoencoder(vae), DDIMScheduler(**scheduler), text_encoder(), tokenizer(folder / "words"),
        prediction_type="depth", scale_invariant=True, shift_invariant=True,
        default_denoising_steps=steps, default_processing_resolution=0,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def dit(seed: int = 3, **changes: Any) -> DiTTransformer2DModel:
    """Every block's copy of the embedders is the same, as conversions have it."""
    options: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    model = DiTTransformer2DModel(**options | changes)
    randomised(model, seed)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model
