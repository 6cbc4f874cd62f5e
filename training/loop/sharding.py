"""What happens to a model before it is trained: compiled, told to recompute, sharded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from saccade.errors import InvalidInput
from training.loop.config import LoopConfig
from training.loop.world import World


def prepare(model: nn.Module, config: LoopConfig, world: World) -> None:
    """Move, compile and shard `model` in place. Raises InvalidInput where it cannot recompute its activations."""
    model.to(world.device)
    if config.checkpoint_activations:
        recompute(model)
    if config.compile:
        for unit in units(model) or [model]:
            unit.compile()
    if world.size > 1:
        alike(model)
        mesh = init_device_mesh(world.device.type, (world.size,))
        scalars = {parameter for parameter in model.parameters() if not parameter.ndim}  # FSDP2 shards none
        for unit in (*units(model), model):
            fully_shard(unit, mesh=mesh, ignored_params=scalars)


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered, compiled and freed one by one: the items of every list named `blocks`."""
    lists = (m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name.split(".")[-1] == "blocks")
    return [block for blocks in lists for block in blocks]


def recompute(model: nn.Module) -> None:
    """Switch on whatever in the model has a switch `checkpointing`."""
    able = [module for module in model.modules() if hasattr(module, "checkpointing")]
    if not able:
        raise InvalidInput("this model cannot recompute its activations", param="checkpoint_activations")
    for module in able:
        module.checkpointing = True  # type: ignore[assignment]


@torch.no_grad()
def alike(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, laid out as FSDP2 takes them."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
        dist.broadcast(tensor, 0)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimizer may move."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of it."""
    return isinstance(tensor, DTensor)
