"""Surgery on states: what a trained model becomes before it goes on to learn more, or something else.

Each function takes a state, the configuration it belongs to and the one that it shall fit, and returns a new state.
Raises InvalidInput where the two differ in more than that surgery changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from saccade.errors import InvalidInput, ModelError
from training.models.dit import DiT, DiTConfig

State = dict[str, Tensor]
TABLE = "y_embedder.embedding_table.weight"
OFFSET = "y_embedder.task_offset"
ADAPTER_PARTS = ("scale", "shift", "down", "up")
ROUTER_STD = 0.02


def widen_input(
    state: State,
    old: DiTConfig,
    new: DiTConfig,
    sources: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
) -> State:
    """For fine-tuning: room for the condition's latents, for tasks' labels, and for each task's own input convolution.

    The input convolution is repeated over the channels and divided by the number of copies. Labels below first_label
    keep their rows, the others start as the unconditional one (the last). Learned variances may be dropped. Positions
    and masks have no weights, so grid and routing may change.

    `sources`: the old input channel behind every new one; without it, the old ones over and over. `outputs`: the old
    channel behind every new one that is predicted; without it, they stay as they are.
    """
    free = ("condition", "labels", "grid", "learn_sigma", "inputs", "first_label", "routing")
    demand_equal(old, new, but=free if outputs is None else (*free, "channels"))
    if new.learn_sigma and not old.learn_sigma:
        raise InvalidInput("a model that learned no variances cannot begin to", param="learn_sigma")
    grown = dict(state)
    grown[TABLE] = label_rows(state[TABLE], old, new)
    grown |= input_layer(state, old, new, sources)
    grown |= output_layer(state, old, new, outputs)
    return fitting(grown, new)


def upcycle(state: State, old: DiTConfig, new: DiTConfig) -> State:
    """A dense model's MLPs, each copied into every expert (2212.05055): the same function, which can now part ways.

    A token's weights must add up to 1 for that, so the experts have to be plain and renormalised. Routers start small
    and random: equal scores would send all tokens to the same experts. A shared expert starts by adding nothing.
    """
    demand_equal(old, new, but=("experts",))
    experts = new.experts
    if old.experts is not None or experts is None:
        raise InvalidInput("upcycling makes a dense model one of experts", param="experts")
    if experts.gated or not experts.renormalise:
        raise InvalidInput("upcycled experts need gated = false and renormalise = true", param="experts")
    if old.adapters is not None:
        raise InvalidInput("a model with adapters cannot be upcycled", param="adapters")
    grown = {key: value for key, value in state.items() if ".mlp." not in key or not key.startswith("blocks.")}
    draw = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if key not in grown:
            block, layer = key.split(".mlp.")
            grown[f"{block}.moe.experts.{layer}"] = value.expand(experts.count, *value.shape).clone()
    for key, shape in shapes_of(new).items():
        if key.endswith(".moe.gate.weight"):
            grown[key] = ROUTER_STD * torch.randn(shape, generator=draw)
        elif key.endswith(".shared_experts.fc1.weight"):
            grown[key] = uniform(shape, draw)
        elif ".shared_experts." in key:
            grown[key] = torch.zeros(shape)
    return fitting(grown, new)


def adapt(
    state: State,
    old: DiTConfig,
    new: DiTConfig,
    sources: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
) -> State:
    """Adapters for a frozen base, at first changing nothing; or more tasks for a model that has some. What
    `widen_input` changes may change too."""
    if new.adapters is None:
        raise InvalidInput("adapting needs adapters in the new configuration", param="adapters")
    if old.adapters is not None and replace(old.adapters, tasks=new.adapters.tasks) != new.adapters:
        raise InvalidInput("adapters that are there keep their rank, scale and layers", param="adapters")
    had = {key: value for key, value in state.items() if key == OFFSET or is_adapter(key)}
    base = {key: value for key, value in state.items() if key not in had}
    grown = widen_input(base, replace(old, adapters=None), replace(new, adapters=None), sources, outputs)
    draw = torch.Generator().manual_seed(0)
    for key, shape in shapes_of(new).items():
        if key not in grown:
            fresh = uniform(shape, draw) if key.endswith(".down") else torch.zeros(shape)
            kept = had.get(key, fresh[:0])[: shape[0]]
            grown[key] = torch.cat([kept, fresh[len(kept) :]])
    return fitting(grown, new)


def is_adapter(key: str) -> bool:
    return key.rpartition(".")[2] in ADAPTER_PARTS


def uniform(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """The first weights of a linear layer [..., out, in]."""
    return (torch.rand(shape, generator=draw) * 2 - 1) * shape[-1] ** -0.5


def label_rows(table: Tensor, old: DiTConfig, new: DiTConfig) -> Tensor:
    """The label table [old.labels, D] for the new labels [new.labels, D]."""
    if (old.labels, old.first_label) == (new.labels, new.first_label):
        return table
    more = new.first_label == old.first_label and new.labels > old.labels
    kept = table[: old.labels - 1] if more else table[: min(new.first_label, old.labels - 1)]
    return torch.cat([kept, table[-1:].expand(new.labels - len(kept), -1)])


def input_layer(state: State, old: DiTConfig, new: DiTConfig, sources: Sequence[int] | None) -> State:
    """Weights and biases of the input convolutions, repeated over channels and over tasks."""
    if old.inputs == 1:
        weight, bias = state["x_embedder.proj.weight"].flatten(1).T[None], state["x_embedder.proj.bias"][None]
    else:
        weight, bias = state["x_embedder.weight"], state["x_embedder.bias"]  # [tasks, C * patch^2, D], [tasks, D]
    had, wanted = old.condition + old.channels, new.condition + new.channels
    if sources is None and wanted % had:
        raise InvalidInput(f"{wanted} input channels are no multiple of the {had} that there are", param="condition")
    behind = picked([i % had for i in range(wanted)] if sources is None else sources, wanted, had, "sources")
    copies = behind.bincount(minlength=had)[behind]
    weight = weight.unflatten(1, (had, old.patch**2))[:, behind] / copies[:, None, None]
    weight = weight.flatten(1, 2)
    if new.inputs < old.inputs:
        raise InvalidInput(f"{old.inputs} input convolutions cannot become {new.inputs}", param="inputs")
    added = new.inputs - old.inputs
    weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(added, -1, -1)])
    bias = torch.cat([bias, bias.mean(0, keepdim=True).expand(added, -1)])
    if new.inputs > 1:
        return {"x_embedder.weight": weight, "x_embedder.bias": bias}
    conv = weight[0].T.reshape(old.width, wanted, old.patch, old.patch)
    return {"x_embedder.proj.weight": conv.contiguous(), "x_embedder.proj.bias": bias[0]}


def output_layer(state: State, old: DiTConfig, new: DiTConfig, outputs: Sequence[int] | None) -> State:
    """The last projection, whose rows are patch^2 cells of the channels (and of as many variances)."""
    behind = picked(range(old.channels) if outputs is None else outputs, new.channels, old.channels, "outputs")
    if new.learn_sigma:
        behind = torch.cat([behind, behind + old.channels])
    had = old.channels * (2 if old.learn_sigma else 1)
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    return {name: state[name].unflatten(0, (old.patch**2, had))[:, behind].flatten(0, 1) for name in names}


def picked(indices: Sequence[int], wanted: int, had: int, name: str) -> Tensor:
    """The indices as int64 [wanted], each below `had`."""
    if len(indices) != wanted or not all(0 <= index < had for index in indices):
        raise InvalidInput(f"{name} must be {wanted} numbers from 0 to {had - 1}", param=name)
    return torch.tensor(list(indices))


def demand_equal(old: DiTConfig, new: DiTConfig, but: tuple[str, ...]) -> None:
    for field in fields(DiTConfig):
        was, is_now = getattr(old, field.name), getattr(new, field.name)
        if field.name not in but and was != is_now:
            raise InvalidInput(f"{field.name} cannot change from {was} to {is_now} here", param=field.name)


def shapes_of(config: DiTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in DiT(config).state_dict().items()}


def fitting(state: State, config: DiTConfig) -> State:
    """The state without what the configuration has no place for. Raises ModelError for what is missing or misshapen."""
    wanted = shapes_of(config)
    wrong = [key for key, shape in wanted.items() if key not in state or state[key].shape != shape]
    if wrong:
        raise ModelError(f"weights do not fit the configuration: {', '.join(sorted(wrong)[:5])}")
    return {key: state[key] for key in wanted}
