"""The fixed codec: an 8 x 8 block DCT that keeps each plane's lowest coefficients. Two convolutions, nothing to train.

Coefficient (0, 0) times 1/8 is the block's mean, so latents live where the planes do, in about [-1, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

BLOCK = 8
KEPT = (10, 10, 3, 3)


class DCTCodec(nn.Module):
    """Target pictures [B, K, H, W] <-> latents [B, sum(kept), H / 8, W / 8].

    `kept`: how many coefficients of each plane stay, diagonal by diagonal from the lowest.
    """

    def __init__(self, kept: tuple[int, ...] = KEPT) -> None:
        super().__init__()
        self.kept = kept
        basis = torch.from_numpy(dct_basis()).float()
        weight = torch.zeros(sum(kept), len(kept), BLOCK, BLOCK)
        row = 0
        for plane, count in enumerate(kept):
            weight[row : row + count, plane] = basis[:count] / BLOCK
            row += count
        self.register_buffer("analysis", weight)
        self.register_buffer("synthesis", weight * BLOCK * BLOCK)

    def encode(self, pictures: Tensor) -> Tensor:
        return nn.functional.conv2d(pictures, self.analysis, stride=BLOCK)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(latents, self.synthesis, stride=BLOCK)

    forward = decode


def dct_basis() -> np.ndarray:
    """Orthonormal 2-D DCT-II basis pictures [64, 8, 8], lowest diagonals (row + column frequency) first."""
    k, n = np.indices((BLOCK, BLOCK))
    rows = np.cos(np.pi * (n + 0.5) * k / BLOCK) * np.sqrt(2 / BLOCK)
    rows[0] /= np.sqrt(2)
    order = sorted(((u, v) for u in range(BLOCK) for v in range(BLOCK)), key=lambda uv: (sum(uv), uv))
    return np.stack([np.outer(rows[u], rows[v]) for u, v in order])
