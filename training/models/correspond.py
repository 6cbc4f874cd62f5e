"""Dense correspondence with nothing to learn: what two frames say of motion before any training.

Locally normalised luminance is compared at coarse sizes first. At each size the second frame is warped by the motion
so far, every place looks around itself (a soft minimum over a small cost volume), and motion is smoothed by trusting
sure places over unsure ones. The idea is that of patch-based inverse search (Kroeger et al. 1603.03590), written as
convolutions and lookups, so that it exports with the network that learns where to believe it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COARSEST = 8
LEVELS = ((COARSEST, 4), (4, 3), (2, 3))  # shrink, rounds
RADIUS, WINDOW, TRUST_WINDOW = 2, 5, 7
SHARPNESS, DECISION, INERTIA = 8.0, 32.0, 0.5
LUMA = (0.299, 0.587, 0.114)


class Correspondence(NamedTuple):
    """At half the pictures' size: `motion` [B, 2, H/2, W/2] in half-size pixels, `trust` in (0, 1] and `mismatch` >= 0,
    both [B, 1, H/2, W/2]."""

    motion: Tensor
    trust: Tensor
    mismatch: Tensor


@torch.no_grad()
def correspond(first: Tensor, second: Tensor, guess: Tensor) -> Correspondence:
    """Frames [B, 3, H, W], multiples of 16, and a guess [B, 2, H/8, W/8] in eighth-size pixels, which a place takes
    where it fits better than what was found from no motion."""
    frames = [
        (x.float() * x.new_tensor(LUMA, dtype=torch.float32)[:, None, None]).sum(1, True) for x in (first, second)
    ]
    motion = torch.zeros_like(guess)
    for shrink, rounds in LEVELS:
        one, two = (normalised(F.avg_pool2d(frame, shrink)) for frame in frames)
        if shrink < COARSEST:
            motion = resized(motion, 2)
        if shrink == COARSEST // 2:
            motion = better(one, two, motion, resized(guess, 2))
        for _ in range(rounds):
            motion, trust = look_around(one, two, motion)
            motion = settle(motion, trust)
    return Correspondence(motion, trust, box((one - warp(two, motion)).square(), WINDOW))


def box(x: Tensor, edge: int) -> Tensor:
    """Mean over edge x edge windows."""
    padded = F.pad(x, (edge // 2,) * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, (edge, 1), 1), (1, edge), 1)


def normalised(luminance: Tensor) -> Tensor:
    """Without the local mean, of about unit local contrast: blind to exposure and to slow shading."""
    detail = luminance - box(luminance, TRUST_WINDOW)
    return detail / (box(detail.square(), TRUST_WINDOW) + 4e-4).sqrt()


def resized(motion: Tensor, factor: float) -> Tensor:
    """Motion [B, 2, h, w] in its own pixels, at `factor` times the size and in that size's pixels."""
    return F.interpolate(motion, scale_factor=factor, mode="bilinear", align_corners=False) * factor


def warp(picture: Tensor, motion: Tensor) -> Tensor:
    """[B, C, h, w] looked up where motion [B, 2, h, w] leads; beyond the edge, the edge."""
    height, width = picture.shape[-2:]
    y = torch.arange(height, device=motion.device)[:, None] + motion[:, 1]
    x = torch.arange(width, device=motion.device) + motion[:, 0]
    grid = torch.stack([(x + 0.5) / width * 2 - 1, (y + 0.5) / height * 2 - 1], -1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)


def better(one: Tensor, two: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of two motions, at each place the one under which the frames agree; without a jump where both do."""
    cost_a, cost_b = (box((one - warp(two, motion)).square(), WINDOW) for motion in (a, b))
    return a + (b - a) * torch.sigmoid(DECISION * (cost_a - cost_b))


def look_around(one: Tensor, two: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Motion moved by the mean of the offsets, weighted by how well each fits; the largest weight as trust."""
    height, width = one.shape[-2:]
    padded = F.pad(warp(two, motion), (RADIUS,) * 4, mode="replicate")
    reach = range(2 * RADIUS + 1)
    shifted = [padded[..., dy : dy + height, dx : dx + width] for dy in reach for dx in reach]
    offsets = one.new_tensor([(dx - RADIUS, dy - RADIUS) for dy in reach for dx in reach])[:, :, None, None]
    cost = box((one - torch.cat(shifted, 1)).square(), WINDOW)
    weight = (-SHARPNESS * cost - INERTIA * offsets.norm(dim=1)).softmax(1)
    step = torch.stack([(weight * offsets[:, axis]).sum(1) for axis in (0, 1)], 1)
    return motion + step, weight.amax(1, keepdim=True)


def settle(motion: Tensor, trust: Tensor) -> Tensor:
    """Each place takes the mean of its window, the sure ones counting most."""
    weight = trust.square() + 1e-4
    return box(motion * weight, TRUST_WINDOW) / box(weight, TRUST_WINDOW)
