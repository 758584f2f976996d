"""The parts of a decoder language model; `discovery` finds them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModelError
from .head import Head, logit_scale_and_softcap
from .sharding import (
    DTensor,
    fsdp_device,
    full_shape,
    gather,
    has_fsdp,
    home,
    is_offloaded,
    is_sharded,
    weight_and_bias,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest relative difference allowed between a module and what we take it for, on random input: the
# same numbers, but that operations may round once more or sum in another order.
TOLERANCE = {
    torch.float64: 1e-5,  # transformers' activations may work in float32
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


def alike(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Whether every row, the last dimension, is the same but for rounding in ``dtype``."""
    got, want = in_float64(got), in_float64(want)
    error, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    return bool((error <= TOLERANCE[dtype] * size).all())


@dataclass(frozen=True)
class DownProjection:
    """A weight whose rows are the nodes of an FFN: ``getattr(module, parameter)``.

    Attributes:
        name: dotted name of ``module`` in the model.
        parent: the module that holds it.
        attribute: its name there.
        module: an ``nn.Linear``, a module that stands in for one, transformers' ``Conv1D``, or the
            experts of a mixture.
        parameter: name of the weight in it.
        axis: the weight's dimension along which rows are numbered: 0 of a linear's
            ``[D, I]``, 1 of Conv1D's ``[I, D]``, 1 or 2 of experts' ``[E, D, I]`` or ``[E, I, D]``.
    """

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module
    parameter: str = "weight"
    axis: int = 0

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.parameter))

    @property
    def of_experts(self) -> bool:
        """Whether it holds the rows of several experts."""
        return linear_shape(self.module) is None

    @property
    def experts(self) -> tuple[int, ...]:
        """``(E,)`` of E experts, ``()`` of one matrix: what stands before a row's number and
        weights."""
        return full_shape(self.weight)[:1] if self.of_experts else ()

    @property
    def in_features(self) -> int:
        """Weights of a row, of one expert."""
        shape = linear_shape(self.module)
        return full_shape(self.weight)[3 - self.axis] if shape is None else shape[0]

    @property
    def out_features(self) -> int:
        """Rows, of one expert."""
        shape = linear_shape(self.module)
        return full_shape(self.weight)[self.axis] if shape is None else shape[1]


@dataclass(frozen=True)
class FFN:
    """The feed-forward network of one decoder layer.

    Attributes:
        nodes: the modules whose outputs, added up, are attributed: the down-projection where there
            is one alone, else the block; several where the layer adds up blocks.
        projections: what makes its output; row j of the FFN is row j of each. Several in a mixture
            of experts: the experts', and the shared expert's.
    """

    nodes: tuple[nn.Module, ...]
    projections: tuple[DownProjection, ...]

    @property
    def lone(self) -> DownProjection | None:
        """Its only down-projection, of one matrix; None in a mixture of experts."""
        first, *others = self.projections
        return None if others or first.of_experts else first


@dataclass(frozen=True)
class Structure:
    """A causal language model seen as embeddings, decoder layers and head.

    Attributes:
        given: the model with what is around it, of PEFT for one.
        causal_lm: the transformers model.
        decoder: the text model inside, which turns tokens into last hidden states.
        layers: its decoder layers.
        ffns: each layer's; None for a layer without one.
    """

    given: nn.Module
    causal_lm: PreTrainedModel
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    ffns: tuple[FFN | None, ...]
    hidden_size: int
    vocab_size: int

    def width(self, site: str) -> int:
        """How many nodes a layer has at the attributed site.

        Raises:
            UnsupportedModelError: for ``ffn_neurons`` of mixtures of experts, of layers of several
                widths, or where each process has some of them.
        """
        if site == "down_proj":
            return self.hidden_size
        if self.split:
            raise UnsupportedModelError(
                f"{type(self.causal_lm).__name__} is split by tensor parallelism, which gives each "
                "process some of a layer's neurons; attribute site='down_proj', or load it without "
                "tp_plan."
            )
        lone = [None if ffn is None else ffn.lone for ffn in self.ffns]
        widths = {None if down is None else down.in_features for down in lone}
        (width, *others) = widths
        if width is None or others:
            raise UnsupportedModelError(
                f"site='ffn_neurons' needs one FFN of one width in every layer; "
                f"{type(self.causal_lm).__name__} has a mixture of experts, layers without an FFN "
                "or of several widths. Attribute site='down_proj'."
            )
        return width

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        gathered = fsdp_device(self.given) if self.sharded else None
        return gathered or home(
            self.causal_lm.get_input_embeddings(), embedding_weight(self.causal_lm)
        )

    @functools.cached_property
    def reruns(self) -> bool:
        """Whether a layer runs again for its backward pass, so that it keeps its inputs alone.

        So it is where memory is what a model lacks. autograd would also keep the weights of every
        layer that accelerate has offloaded.
        """
        return self.sharded or any(map(is_offloaded, self.parts))

    @functools.cached_property
    def parts(self) -> tuple[nn.Module, ...]:
        """The layers and every module in them; to walk through 32 layers takes 0.4 ms."""
        return tuple(module for layer in self.layers for module in layer.modules())

    @functools.cached_property
    def attention_configs(self) -> tuple[Any, ...]:
        """The configs by which modules of the decoder choose their attention."""
        found = {
            id(config): config
            for config in (getattr(module, "config", None) for module in self.decoder.modules())
            if hasattr(config, "_attn_implementation_internal")
        }
        return tuple(found.values())

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether processes make every forward pass together: by FSDP2 or tensor parallelism."""
        return self.split or has_fsdp(self.given)

    @functools.cached_property
    def split(self) -> bool:
        """Whether transformers' tensor parallelism gives a process a part of every row.

        A node's value and gradient are then whole in every process, those that enter the
        down-projection are not.
        """
        if (getattr(self.causal_lm, "_tp_size", None) or 1) == 1 or has_fsdp(self.given):
            return False
        weights = [down.weight for down in self.projections()]
        return all(isinstance(w, DTensor) and not w.placements[0].is_shard(0) for w in weights)

    def gather(self) -> None:
        """Have the weights outside of the layers here, if FSDP2 looks after them."""
        if self.sharded:
            gather(self.given, self.layers)

    def run(self, **inputs: Any) -> Any:
        """The model's output."""
        self.gather()
        return self.causal_lm(**inputs)

    def run_decoder(self, **inputs: Any) -> Tensor:
        """The decoder's last hidden state ``[B, T, hidden_size]``, without a cache."""
        self.gather()
        hidden: Tensor = self.decoder(use_cache=False, **inputs).last_hidden_state
        return hidden

    def projections(self) -> Iterator[DownProjection]:
        """Every down-projection, several of a layer that is a mixture of experts."""
        for ffn in self.present().values():
            yield from ffn.projections

    def present(self) -> dict[int, FFN]:
        """Layer -> its FFN, of the layers that have one."""
        return {i: ffn for i, ffn in enumerate(self.ffns) if ffn is not None}

    def head(self) -> Head:
        """The output projection, with the logit scale and soft-cap its config names.

        Where FSDP2 looks after it, it is there until a backward pass, or until `gather` again.

        Raises:
            UnsupportedModelError: as `head_module`.
        """
        module = self.head_module()
        self.gather()
        weight, bias = weight_and_bias(module)
        scale, softcap = logit_scale_and_softcap(text_config(self.causal_lm))
        return Head(weight, bias, scale, softcap)

    def head_module(self) -> nn.Module:
        """The module of the output projection, without bringing its weight in.

        Raises:
            UnsupportedModelError: if there is no linear one, or not all of it can be had here.
        """
        module: nn.Module = self.causal_lm.get_output_embeddings()
        weight = getattr(module, "weight", None)
        name = type(self.causal_lm).__name__
        if isinstance(weight, Tensor) and is_sharded(weight) and not self.sharded:
            raise UnsupportedModelError(
                f"the output head of {name} is split between processes (FSDP1, ZeRO-3); attribute "
                "the whole model, before an engine is put around it, or shard it by FSDP2 "
                "(fully_shard)."
            )
        if isinstance(weight, Tensor) and weight.is_meta and not is_offloaded(module):
            raise UnsupportedModelError(
                f"the output head of {name} is not in memory, and accelerate has not offloaded it; "
                "load the model's weights."
            )
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise UnsupportedModelError(
                f"{name} has no linear output head; "
                "attribution needs a causal language model with one."
            )
        return module


def refuse_tensor_parallelism(structure: Structure) -> None:
    """Raise UnsupportedModelError if a process holds parts of rows, and not some of them whole.

    transformers gives every process a part of down_proj's in_features, as a DTensor or, in earlier
    versions, as a smaller plain tensor; FSDP's own shards are of dimension 0, unless it is told
    others.
    """
    model = structure.causal_lm
    split = (getattr(model, "_tp_size", None) or 1) > 1
    for down in structure.projections():
        weight = getattr(down.module, down.parameter, None)
        if isinstance(weight, DTensor):
            split |= "tp" in (weight.device_mesh.mesh_dim_names or ())
            # FSDP splits the first dimension; another is that of the rows' numbers or within them
            inner = [*range(1, weight.ndim), *range(1 - weight.ndim, 0)]
            across = any(p.is_shard(i) for p in weight.placements for i in inner)
            split |= across and not has_fsdp(model)
    if split:
        raise UnsupportedModelError(
            f"{type(model).__name__} is split by tensor parallelism (tp_plan, parallelize_module): "
            "each process holds a part of every row. patch does not support that; attribute does "
            "where transformers' tp_plan splits it as DTensors, within rows. Load it without "
            "tp_plan; to train it on several GPUs patch it and then shard it with FSDP2 "
            "(fully_shard), to attribute it across GPUs shard it so or load it with "
            'device_map="auto".'
        )


def text_config(model: nn.Module) -> Any:
    """The text part of a Hugging Face config.

    Raises:
        UnsupportedModelError: if there is none.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no transformers config; "
            "pass a transformers causal language model (or a PEFT model around one)."
        )
    return config.get_text_config()


# Where torch's CheckpointWrapper, which accelerate puts around decoder layers, keeps the module.
WRAPPED = "_checkpoint_wrapped_module"


def plain_name(name: str) -> str:
    """The name of a module or parameter as state dicts have it."""
    return name.replace(f"{WRAPPED}.", "")


def without_engines(model: Any) -> nn.Module:
    """A model without ``torch.compile`` and DDP around it; PEFT's own stays."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return cast(nn.Module, model)


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT, DDP or ``torch.compile`` wrapper."""
    model = without_engines(model)
    while hasattr(model, "get_base_model"):
        model = without_engines(model.get_base_model())
    return cast("PreTrainedModel", model)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then in its own again, module by module."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:  # of 450 modules that need no change, eval() sets the flags in 2 ms
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def in_own_precision(model: Any) -> Iterator[None]:
    """Without the autocast that accelerate leaves around a forward pass which it has trained.

    It is entered inside any context of ours. HF Trainer's ``bf16=True``, TRL's default, is that.
    """
    wrapped = []
    for module in cast(dict[Any, None], dict.fromkeys((without_engines(model), unwrap(model)))):
        held = module.__dict__
        # PEFT takes a prompt away by the base's forward pass in place of the one that is wrapped.
        taken = held.get("_adapters_disabled") and module.active_peft_config.is_prompt_learning
        if "forward" in held and "_original_forward" in held and not taken:
            wrapped.append((module, held["forward"]))
            module.forward = held["_original_forward"]
    try:
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


def embedding_weight(model: PreTrainedModel) -> Tensor:
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        weight = None
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(f"{type(model).__name__} has no single token embedding.")
    return weight


def is_linear_like(module: nn.Module) -> bool:
    """``nn.Linear``, or a module that stands in for one (a PEFT tuner layer, LokiLinear)."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def linear_shape(module: nn.Module) -> tuple[int, int, int] | None:
    """(in_features, out_features, axis of the rows) of a linear layer; None for another module."""
    if is_linear_like(module):
        return module.in_features, module.out_features, 0  # type: ignore[return-value]
    if isinstance(module, Conv1D):
        inner, outer = full_shape(module.weight)
        return inner, outer, 1
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer is an ``nn.Linear`` of floating-point numbers, whole or sharded."""
    return (
        type(module) is nn.Linear
        and type(module.weight.data) in (Tensor, DTensor)
        and module.weight.is_floating_point()
    )


def foreign_forward(module: nn.Module) -> str | None:
    """The name of another program's method that runs in place of a module's own forward pass.

    What wraps its own, as accelerate's hooks do, is a function and no method.
    """
    method = getattr(module.__dict__.get("forward"), "__func__", None)
    if method is None or method is type(module).forward:
        return None
    return getattr(method, "__qualname__", repr(method))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class's forward pass.

    Its hooks, or a ``forward`` of the instance's own, as accelerate's hooks are.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def in_float64(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on the CPU if its device may have none (Apple's, some of Intel's)."""
    return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).double()
