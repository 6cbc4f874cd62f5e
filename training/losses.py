"""What the default model is asked for in a training step: denoise, see without noise, and find what moved where."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.schedule import NoiseSchedule
from saccade.tasks import FlowCoding
from training.data import Batch
from training.models.codec import BLOCK
from training.models.perceiver import TASKS, Model, Motion


class Seen(NamedTuple):
    """The rows of a step, after the encoder: `latent` [B, C, h, w] is the truth, `weight` [B, h, w] counts its cells,
    `y` [B] the task, `estimate` [B, C, h, w] the encoder's own, without gradient; `own` and `matching` are losses."""

    context: Tensor
    detail: Tensor
    latent: Tensor
    weight: Tensor
    y: Tensor
    estimate: Tensor
    own: Tensor
    matching: Tensor


def see(model: Model, batches: dict[str, Batch], task_weights: dict[str, float], own_l1: bool) -> Seen:
    """Encode every task's batch."""
    device = model.codec.analysis.device
    rows: list[tuple[Tensor, ...]] = []
    own, matching = torch.zeros((), device=device), torch.zeros((), device=device)
    for task, batch in batches.items():
        image, prompt, target, weight = (
            torch.from_numpy(array).to(device) for array in (batch.image, batch.prompt, batch.target, batch.weight)
        )
        pictures = (p.contiguous(memory_format=torch.channels_last) for p in (image, prompt))
        context, detail, motion = model.encoder.of_task(*pictures, task)
        weight = weight * task_weights[task]
        with torch.autocast(device.type, enabled=False):  # targets are exact
            latent = model.codec.encode(target)
        estimate = detail[:, model.config.detail :].float()
        own = own + own_loss(model, estimate, latent, target, weight, own_l1)
        if motion is not None:
            matching = matching_loss(motion, target[:, :2], max(image.shape[-2:]))
        label = torch.full(image.shape[:1], TASKS.index(task), device=device)
        rows.append((context, detail, latent, weight, label, estimate.detach()))
    return Seen(*(torch.cat(parts) for parts in zip(*rows, strict=True)), own / len(batches), matching)


def own_loss(model: Model, estimate: Tensor, latent: Tensor, target: Tensor, weight: Tensor, l1: bool) -> Tensor:
    """Of the encoder's own estimate [B, C, h, w]: pixel by pixel against the target picture (L1), or latent by latent
    (squares)."""
    if not l1:
        return ((estimate - latent).square().sum(1) * weight).mean()
    with torch.autocast(target.device.type, enabled=False):
        beyond = target - model.codec.decode(latent)  # what the codec cannot say
    return (pixel_error(model, estimate - latent, beyond) * weight).mean()


def pixel_error(model: Model, off: Tensor, beyond: Tensor | float = 0.0) -> Tensor:
    """Mean absolute error [B, h, w] of each block's pixels, summed over planes, for latents that are `off`."""
    with torch.autocast(off.device.type, enabled=False):
        error = (model.codec.decode(off.float()) - beyond).abs().sum(1, keepdim=True)
    return F.avg_pool2d(error, BLOCK)[:, 0]


def denoising_error(
    model: Model,
    schedule: NoiseSchedule,
    seen: Seen,
    draws: int,
    shift: float,
    unroll: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Errors [B * draws, h, w], weighted, of `draws` noise levels for every row, and the tasks [B * draws].

    The error is v's, squared. For a share `unroll` of the rows the noisy latent is made of the model's own answer from
    pure noise in place of the truth, as it will be when serving, and the error is that of the clean picture, absolute:
    what such a latent says is the model's own belief, not to be trusted, and what users measure are absolute errors
    ("step-unrolled" training with L1, Saxena et al. 2306.01923).
    """
    z0, c, d, w, y = (
        rows.repeat_interleave(draws, 0) for rows in (seen.latent, seen.context, seen.detail, seen.weight, seen.y)
    )
    counts = torch.bincount(seen.y).tolist()
    at = generator.device
    t = torch.cat([timesteps(count * draws, shift, generator) for count in counts if count]).to(z0.device)
    noise = torch.randn(z0.shape, generator=generator, device=at).to(z0)
    believed = (torch.rand(len(z0), generator=generator, device=at) < unroll).to(z0.device)
    start = z0.clone()
    if believed.any():
        start[believed] = from_noise(model, schedule, noise[believed], y[believed], c[believed], d[believed])
    abar = torch.tensor(schedule.alphas_cumprod).float().to(z0.device)[t][:, None, None, None]
    noisy = abar.sqrt() * start + (1 - abar).sqrt() * noise
    predicted = model.denoiser(noisy, t, y, c, d).float()
    clean = abar.sqrt() * noisy - (1 - abar).sqrt() * predicted
    off = predicted - (abar.sqrt() * noise - (1 - abar).sqrt() * z0)
    error = torch.where(believed[:, None, None], pixel_error(model, clean - z0), off.square().sum(1))
    return error * w, y


@torch.no_grad()
def from_noise(model: Model, schedule: NoiseSchedule, noise: Tensor, y: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The model's clean latents after one step from pure noise."""
    last = torch.full((len(noise),), schedule.timesteps - 1, device=noise.device)
    abar = float(schedule.alphas_cumprod[-1])
    return abar**0.5 * noise - (1 - abar) ** 0.5 * model.denoiser(noise, last, y, c, d).float()


def timesteps(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Stratified draws of 0 .. 999, [count] int64, more of them noisy.

    u -> shift u / (1 + (shift - 1) u) (Esser et al. 2403.03206, eq. 23).
    """
    at = generator.device
    u = (torch.arange(count, device=at) + torch.rand(count, generator=generator, device=at)) / count
    t = shift * u / (1 + (shift - 1) * u)
    return (t * 1000).long().clamp(max=999)[torch.randperm(count, generator=generator, device=at)]


def matching_loss(motion: Motion, coded: Tensor, longer_edge: int) -> Tensor:
    """What the matcher should have found: the true places' likelihood, and L1 of the local reading."""
    far = unlikelihood(motion.log_match, flow_in_cells(coded, longer_edge))
    near = (motion.coded.float() - F.avg_pool2d(coded, 4)).abs().mean()
    return 0.2 * far + near


def flow_in_cells(coded: Tensor, longer_edge: int) -> Tensor:
    """Coded flow [B, 2, H, W] -> displacement [B, 2, H/8, W/8] in eighth-cells."""
    cells, coding = F.avg_pool2d(coded, 8), FlowCoding()
    share = torch.expm1(cells.abs() * np.log1p(coding.reach / coding.knee)) * coding.knee
    return cells.sign() * share * longer_edge / 8


def unlikelihood(log_match: Tensor, flow: Tensor) -> Tensor:
    """Mean negative log-probability [B, N, N] of where cells went by flow [B, 2, h, w]; the four cells around a place
    share it bilinearly, and cells that leave the picture do not count."""
    height, width = flow.shape[-2:]
    x, y = torch.arange(width, device=flow.device), torch.arange(height, device=flow.device)[:, None]
    to_x, to_y = (x + flow[:, 0]).flatten(1), (y + flow[:, 1]).flatten(1)
    stays = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    total = torch.zeros_like(to_x)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at_x, at_y = (to_x.floor() + dx).clamp(0, width - 1), (to_y.floor() + dy).clamp(0, height - 1)
        share = (1 - (to_x - at_x).abs()).clamp(min=0) * (1 - (to_y - at_y).abs()).clamp(min=0)
        total = total + share * log_match.gather(2, (at_y * width + at_x).long()[..., None])[..., 0]
    return -(total * stays).sum() / stays.sum().clamp(min=1)
