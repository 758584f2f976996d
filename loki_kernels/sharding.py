"""Parameters that FSDP, ZeRO-3 or accelerate keep elsewhere, and buffers that DDP has not to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.tensor import DTensor as DTensor
    from torch.distributed.tensor import distribute_tensor
else:  # builds of torch for Windows, for one

    class DTensor(Tensor):
        """What no tensor is there."""


T = TypeVar("T")

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # DDP's own name for it


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the first one of its group, or alone; it writes for all."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def process_device() -> torch.device | None:
    """This process's accelerator; None if there is none."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return None
    index = torch.accelerator.current_device_index()
    if index == 0:  # perhaps not chosen yet: a launcher's processes have one each
        index = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    return torch.device(kind.type, index)


def device_of_the_group() -> torch.device:
    """Where tensors have to be that all processes of the group exchange.

    NCCL alone wants each process's own GPU, and torch takes the current one, which is the first in
    every process of a loop that gives models a device and never chooses one.
    """
    if "cpu:" in torch.distributed.get_backend_config():
        return torch.device("cpu")
    bound = getattr(torch.distributed.group.WORLD, "bound_device_id", None)  # by who made the group
    return bound or process_device() or torch.device("cpu")


def of_the_first(content: T) -> T:
    """The first process's object, in all of the group; every process has to ask."""
    shared = [content]
    torch.distributed.broadcast_object_list(shared, src=0, device=device_of_the_group())
    return shared[0]


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 looks after a parameter: outside its layer's forward pass it is empty."""
    return hasattr(tensor, "ds_id")


def is_released(tensor: Tensor) -> bool:
    """Whether ZeRO-3 looks after a parameter and has gathered it for nobody: it is empty."""
    return is_partitioned(tensor) and tuple(tensor.shape) != full_shape(tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter's values are not all in this process."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def shards_its_weights(module: nn.Module) -> bool:
    """Whether an engine keeps a model's weights sharded between forward passes.

    Inside a forward pass the weights may look whole; writing to them would be lost.

    Raises:
        UnsupportedModelError: for FSDP1, which cannot make a state dict without trained rows; and
            for FSDP2 around a larger module alone, which may gather the weights anew for backward.
    """
    if not is_distributed():  # asked before every forward pass
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = has_fsdp(module)
    for part in module.modules():
        # Either marks what is inside; FSDP1 may be around the whole model, where no part is it.
        if isinstance(part, FullyShardedDataParallel) or (
            not sharded and vars(part).get("_is_fsdp_managed_module")
        ):
            raise UnsupportedModelError(
                "a patched model cannot be trained with FSDP1, nor with FSDP2 around a larger "
                "module alone; use FSDP2 around the model itself (fully_shard, or fsdp_version: 2 "
                "for accelerate)."
            )
    return sharded or any(map(is_partitioned, module.parameters()))


def has_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 looks after some of a model's weights."""
    return is_distributed() and bool(_fsdp_modules(module))


def fsdp_device(model: nn.Module) -> torch.device | None:
    """Where FSDP2 gathers a model's weights, which may wait on the CPU; None without it."""
    for part in _fsdp_modules(model) if is_distributed() else ():
        return cast(torch.device, part._get_fsdp_state()._device)
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings a module's own weights in for its forward pass alone."""
    # asked of every module: a miss of getattr passes through nn.Module's own lookup
    return getattr(vars(module).get("_hf_hook"), "offload", False) is True


def home(module: nn.Module, weight: Tensor) -> torch.device:
    """The device of one of a module's weights when it runs."""
    if weight.is_meta and is_offloaded(module):
        return torch.device(module._hf_hook.execution_device)  # type: ignore[arg-type, union-attr]
    return weight.device


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A linear layer's; what accelerate has offloaded is there as long as it is held.

    Of one that is split by tensor parallelism every process has to ask, and gets all of it.
    """
    there: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if is_offloaded(module):
        from accelerate.utils import align_module_device

        there = align_module_device(module)
    with there:
        weight, bias = cast(Tensor, module.weight), getattr(module, "bias", None)
    return full_values(weight), None if bias is None else full_values(bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen ``nn.Linear`` of a whole weight ``[out_features, in_features]`` and its bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def gather(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Have FSDP2 gather what it looks after outside of ``layers``, which gather their own.

    A forward or backward pass may put it away; what is there already is not gathered again.
    """
    inside = {id(part) for layer in layers for part in layer.modules()}
    for part in _fsdp_modules(model):
        if id(part) not in inside:
            # not by part.unshard(), which asks again which weights are trained
            state = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # one group before torch 2.12
            for group in filter(None, [state._fsdp_param_group] if groups is None else groups):
                group.unshard()
                group.wait_for_unshard()


def settle(model: nn.Module, *, failed: bool = False) -> None:
    """Have FSDP2 put away what it has gathered: the parameters are then those that it keeps.

    Their flags become those of what it gathers next.

    Args:
        failed: after an exception, which may have left a forward pass at its middle.
    """
    if not is_distributed():
        return
    for part in _fsdp_modules(model):
        state = part._get_fsdp_state()
        state._lazy_init()  # with the caller's flags: it asks which weights are trained, once
        if failed and state._is_root and hasattr(part, "reset_iter_state"):  # torch 2.13
            part.reset_iter_state()
        part.reshard()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """The outer before the inner."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Of a model under FSDP2, whole and on the host in the first process; every one has to ask."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Any], get_model_state_dict(model, options=options))


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered of a model's weights: the parameters are those that it keeps.

    After a forward pass without a backward one what it has gathered is the model's still, of what
    the root holds and with ``reshard_after_forward=False`` of all. Values that are read there may
    be rounded (mixed precision), and what is written is lost when they are freed.
    """
    if not is_distributed():
        return
    for part in _fsdp_modules(model):
        part.reshard()


def ignore_in_ddp(model: nn.Module, names: Collection[str]) -> None:
    """Make DDP leave buffers alone that are the same in every process.

    It would write them anew at each step, under pending backward passes.
    """
    setattr(model, _DDP_IGNORES, [*getattr(model, _DDP_IGNORES, ()), *names])


def heed_in_ddp(model: nn.Module, names: Collection[str]) -> None:
    """Undo `ignore_in_ddp`."""
    ignored = [name for name in getattr(model, _DDP_IGNORES) if name not in names]
    if ignored:
        setattr(model, _DDP_IGNORES, ignored)
    else:
        delattr(model, _DDP_IGNORES)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """A parameter's shape before it was split."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def full_values(parameter: Tensor) -> Tensor:
    """All values of a parameter, detached, where it is; of a sharded one every process has to ask.

    One that ZeRO-3 has gathered for somebody is read as it is: gathering it again would split it.
    """
    if isinstance(parameter, DTensor):
        part = cast(DTensor, parameter.detach())
        if part.device.type != part.device_mesh.device_type:
            # what waits on the CPU (offloaded, or a state dict) NCCL gathers on the GPU alone
            part = cast(DTensor, part.to(part.device_mesh.device_type))
        return part.full_tensor().to(parameter.device)
    if is_released(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def writable(parameter: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A parameter's values may be written in it, the same in every process.

    One that ZeRO-3 has split is whole inside, and then what the first process wrote is split.
    """
    if not is_partitioned(parameter):
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0
    )
    return gathered


def own_part(parameter: Tensor) -> Tensor:
    """What this process has of a DTensor, in the same memory."""
    return cast(DTensor, parameter.detach()).to_local()


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's part of ``tensor``, sharded as ``model`` is."""
    if isinstance(model, DTensor):
        part = distribute_tensor(
            tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None
        )
        return part.to(model.device)  # it is on the mesh's device, and what is offloaded is not
    return tensor.to(model.device)
