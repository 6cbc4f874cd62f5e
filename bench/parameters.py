"""Parameters of every named size beside the papers' figures, as in docs/models.md.

    python -m bench.parameters

Counted as the papers count: 1001 labels, learned variances, and the fixed positions of a 256-pixel picture, which
their checkpoints hold as a parameter and ours compute. No model is built: shapes are enough.
"""

from __future__ import annotations

import torch

from training.models.affiner import own_parameters
from training.models.dit import NAMES, Adapters, DiT, Experts, named, parameters_of

# Millions of parameters, in all and active: Ravishankar et al. (a1 to a6, mixtures), Peebles & Xie (S to XL).
PUBLISHED: dict[str, tuple[float, float]] = {
    "a1": (14.8, 14.8), "a2": (77.2, 77.2), "a3": (215, 215), "a4": (458, 458), "a5": (1200, 1200), "a6": (1900, 1900),
    "S/2": (33, 33), "S/4": (33, 33), "S/8": (33, 33), "B/2": (130, 130), "B/4": (130, 130), "B/8": (131, 131),
    "L/2": (458, 458), "L/4": (458, 458), "L/8": (459, 459), "XL/2": (675, 675), "XL/4": (675, 675), "XL/8": (676, 676),
    "S/2-8E2A": (199, 71), "S/2-16E2A": (369, 71), "L/2-8E2A": (2800, 1000),
}  # fmt: skip
RANKS = (1, 2, 4, 8, 16, 32)
LATENT_PX = 32


def counted(name: str) -> tuple[float, float]:
    """Millions of parameters of a named model, in all and active, as the papers count."""
    config = named(name, learn_sigma=True)
    positions = (LATENT_PX // config.patch) ** 2 * config.width
    counts = parameters_of(config)
    return (counts.total + positions) / 1e6, (counts.active + positions) / 1e6


def adapters(rank: int, name: str = "XL/2") -> float:
    """Millions of parameters of one task's adapters in the blocks."""
    with torch.device("meta"):
        model = DiT(named(name, adapters=Adapters(tasks=1, rank=rank)))
    own = set(own_parameters(model))
    return sum(p.numel() for key, p in model.named_parameters() if key in own and key.startswith("blocks.")) / 1e6


def sizes_table() -> str:
    rows = [
        "| model | width | heads | depth | published, M: total (active) | ours, M: total (active) |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        config, (total, active), (said, used) = named(name), counted(name), PUBLISHED[name]
        ours = f"{total:.1f}" + (f" ({active:.1f})" if config.experts else "")
        theirs = f"{said:g}" + (f" ({used:g})" if config.experts else "")
        rows.append(f"| {name} | {config.width} | {config.heads} | {config.depth} | {theirs} | {ours} |")
    return "\n".join(rows)


def options_table() -> str:
    """What options add to XL/2, and the published generalist."""
    plain = parameters_of(named("XL/2")).total / 1e6
    generalist = named(
        "XL/2", labels=1005, condition=8, learn_sigma=True, inputs=4, first_label=1000, grid=32,
        experts=Experts(8, 2, shared=False, gated=False),
    )  # fmt: skip
    counts = parameters_of(generalist)
    rows = ["| option | parameters, M | share of XL/2 |", "|---|---|---|"]
    rows += [
        f"| Affiner, rank {rank}, one task | {adapters(rank):.2f} | {adapters(rank) / plain:.2%} |" for rank in RANKS
    ]
    rows.append("| routing by timestep (DTR) | 0 | 0 |")
    share = f"{counts.total / 1e6:.1f} ({counts.active / 1e6:.1f} active)"
    rows.append(f"| the published generalist: 4 inputs, 8 plain experts | {share} | |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(sizes_table())
    print()
    print(options_table())
