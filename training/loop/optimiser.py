"""AdamW and the average of the weights, each with a flat state of tensors that checkpoints can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.errors import InvalidInput
from training.loop.config import LoopConfig
from training.loop.sharding import is_sharded, local, trained
from training.loop.world import World


class Optimiser:
    """AdamW over a model's trained parameters; what has fewer than two dimensions does not decay."""

    def __init__(self, model: nn.Module, config: LoopConfig, world: World) -> None:
        self.named, self.clip, self.world = dict(trained(model)), config.clip, world
        if not self.named:
            raise InvalidInput("the model has no parameter to train")
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self.named.values():  # sharded and whole tensors do not go into one group
            groups.setdefault((parameter.ndim >= 2, is_sharded(parameter)), []).append(parameter)
        decays = [{"params": p, "weight_decay": config.weight_decay * kind[0]} for kind, p in groups.items()]
        self.adamw = torch.optim.AdamW(decays, config.lr, config.betas, fused=True)
        for parameter in self.named.values():  # at once, so that a checkpoint has a place to be read into
            self.adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def length(self) -> Tensor:
        """Of the whole gradient, which is then made no longer than `clip`."""
        sharded, whole = self._gradients()
        for gradient in whole:
            self.world.mean(gradient)
        squares = [self.world.sum(_square(sharded))] if sharded else []
        length = torch.stack([*squares, *([_square(whole)] if whole else [])]).sum().sqrt()
        if self.clip:
            torch._foreach_mul_(sharded + whole, (self.clip / (length + 1e-6)).clamp(max=1))
        return length

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """This process's parts of those that are sharded, and those that are not."""
        sharded = [p.grad.to_local() for p in self.named.values() if p.grad is not None and is_sharded(p)]
        return sharded, [p.grad for p in self.named.values() if p.grad is not None and not is_sharded(p)]

    def step(self, rate: float) -> None:
        """Move the parameters, and forget the gradient."""
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradient."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """NAME.step, NAME.exp_avg and NAME.exp_avg_sq of every parameter: the tensors themselves."""
        return {f"{name}.{key}": v for name, p in self.named.items() for key, v in self.adamw.state[p].items()}


def _square(tensors: list[Tensor]) -> Tensor:
    """Of the length of all of them together."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


class Average:
    """The exponential moving average of a model's trained parameters, sharded as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.followed = dict(trained(model))
        self.values = {name: parameter.detach().clone() for name, parameter in self.followed.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * parameter."""
        mine, theirs = ([local(t) for t in side.values()] for side in (self.values, self.followed))
        torch._foreach_lerp_(mine, theirs, 1 - decay)
