"""The stages of a model's life, one file each: a typed configuration and `run(config, out)`. Every one is a command of
`saccade` and, under torchrun, `-m training.stages NAME CONFIG -o RUN`."""

from __future__ import annotations

STAGES: dict[str, str] = {
    "pretrain": "Learn to denoise pictures of classes.",
    "encode": "Write the latents of pictures of classes to shards, for pretrain.",
    "finetune": "Learn to see: depth, flow, amodal, from a pretrained model or from nothing.",
    "upcycle": "Make a mixture of experts of a dense model and go on training.",
    "adapt": "Learn tasks on a frozen model, by small adapters.",
}
"""Stage -> what it is for; each is the module of its name, with `Config` and `run(config, out, device)`."""
