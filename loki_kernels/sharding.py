"""Parameters that FSDP or ZeRO-3 has split between processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter's values are not all in this process."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def shards_its_weights(module: nn.Module) -> bool:
    """Whether an engine keeps a model's weights sharded between forward passes.

    Inside a forward pass the weights may look whole; writing to them would be lost.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(
        isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules()
    ) or any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All values of a parameter; with a sharded one every process has to ask."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's part of ``tensor``, sharded as ``model`` is."""
    if isinstance(model, DTensor):
        return distribute_tensor(
            tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None
        )
    return tensor.to(model.device) if model.device != torch.device("meta") else tensor
