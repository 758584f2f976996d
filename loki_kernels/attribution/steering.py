"""A model borrowed for an attribution: its attention and hooks are ours, and then its own again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask

from ..errors import UnsupportedModelError
from ..placement import memory_is_full
from ..sharding import settle
from ..structure import FFN, Structure, evaluating, in_own_precision

ATTENTION_NAME = "loki_kernels"

# What caches whose keys and values are new tensors at every step are made of.
OUT_OF_PLACE = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    # Of a layer that keeps nothing, such as one that attends to an earlier one's; in later versions
    # of transformers.
    *filter(None, [getattr(cache_utils, "DummyLayer", None)]),
)

Attend = Callable[..., Tensor]
Change = Callable[[Tensor], Tensor]
# Where the attention in force is kept: on the model's own config, which every attention module
# holds. A ContextVar would do, but torch.compile cannot trace one.
_ATTEND = "_loki_kernels_attend"


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    output = getattr(module.config, _ATTEND)(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        window=kwargs.get("sliding_window"),
        sinks=kwargs.get("s_aux"),
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def why_no_staircase(decoder: Any) -> str | None:
    """What speaks against the staircase before a text decoder runs; None if nothing does."""
    name = type(decoder).__name__
    dispatches = getattr(type(decoder), "_can_set_attn_implementation", None)
    if dispatches is not None and not dispatches():
        return f"{name} does not run its attention through transformers' AttentionInterface."
    # Without a config a cache makes a plain layer for each that asks; with it, what they need.
    for i, layer in enumerate(DynamicCache(config=decoder.config).layers):
        if type(layer) not in OUT_OF_PLACE:
            return (
                f"layer {i} of {name} keeps another state than keys and values "
                f"({type(layer).__name__})."
            )
    return None


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever a trainer has set.

    TF32 and bfloat16 have 10 and 7 bits, with which a model's own passes agree less than they must.
    """
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    coarse = {s: s.fp32_precision for s in settings if s.fp32_precision not in ("none", "ieee")}
    for setting in coarse:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in coarse.items():
            setting.fp32_precision = precision


@contextlib.contextmanager
def borrowed(structure: Structure) -> Iterator[None]:
    """The model in evaluation mode, frozen and claimed; restored whatever happens.

    Raises:
        RuntimeError: if another attribution runs through a config of this model.
    """
    model = structure.causal_lm
    settle(structure.given)
    configs = structure.attention_configs
    with _claiming:
        if any(hasattr(config, _ATTEND) for config in configs):
            raise RuntimeError(
                "another attribution of this model, or of one that shares its config, is running; "
                "attribute in one thread, or give each thread a model with a config of its own."
            )
        for config in configs:
            setattr(config, _ATTEND, None)
    required = [
        (module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    try:
        _require_grad(required, False)
        with (
            evaluating(model),
            in_own_precision(model),
            _exact_products(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(structure.device.type, enabled=False),
        ):
            yield
    except BaseException:
        settle(structure.given, failed=True)
        raise
    finally:
        settle(structure.given)
        _require_grad(required, True)
        for config in configs:
            delattr(config, _ATTEND)


def forget_lengths(structure: Structure) -> None:
    """Have dynamic rotary embeddings begin anew, before a prompt or a batch of equal ones.

    They keep the frequencies of the longest sequence so far until a short one comes, and a prompt
    would have those of another: of a tiny Llama's scores that was 12 %.
    """
    suffix = "max_seq_len_cached"
    for module in structure.decoder.children():
        for name in [name for name in vars(module) if name.endswith(suffix)]:
            first, kind = getattr(module, "original_max_seq_len", None), name.removesuffix(suffix)
            if first is None or getattr(module, name) <= first:
                continue
            own = getattr(module, f"{kind}original_inv_freq")
            own = own.to(getattr(module, f"{kind}inv_freq").device)
            module.register_buffer(f"{kind}inv_freq", own, persistent=False)
            setattr(module, name, first)


_claiming = threading.Lock()


def _require_grad(parameters: Iterable[tuple[nn.Module, str]], flag: bool) -> None:
    """By name: where weights are offloaded a forward pass leaves other parameters behind."""
    for module, name in parameters:
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def replacing(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Each module with its ``forward`` here, and afterwards with what it had.

    That is its class's, or one of the instance's own, as accelerate's is.
    """
    before = {m: vars(m)["forward"] for m in forwards if "forward" in vars(m)}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in forwards.items():
            if vars(module).get("forward") is not forward:  # somebody has put another there
                continue
            del module.forward
            if module in before:
                module.forward = before[module]


@contextlib.contextmanager
def rerunning(structure: Structure) -> Iterator[None]:
    """Where `Structure.reruns`, layers that keep their inputs alone for a backward pass.

    Of a layer's forward pass only what it is called with is kept, and it runs again in the backward
    pass. Hooks on the layer itself are called once, those on modules within it twice. So are caches
    written twice: what a layer finds there is put back before.
    """
    layers = structure.layers if structure.reruns else ()
    with replacing({layer: _rerun(layer.forward) for layer in layers}):
        yield


def _rerun(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        caches = [x for x in (*args, *kwargs.values()) if hasattr(x, "reorder_cache")]
        if any(type(x) not in OUT_OF_PLACE for c in caches for x in getattr(c, "layers", [None])):
            return forward(*args, **kwargs)  # what is written in place cannot be put back
        found = [[(layer, dict(vars(layer))) for layer in cache.layers] for cache in caches]

        def again(*args: Any, **kwargs: Any) -> Any:
            for cache, layers in zip(caches, found, strict=True):
                cache.layers[:] = [layer for layer, _ in layers]
                for layer, state in layers:
                    vars(layer).clear()
                    vars(layer).update(state)
            return forward(*args, **kwargs)

        return checkpoint(
            again,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            early_stop=False,  # accelerate's hooks and ours would not see the end
            **kwargs,
        )

    return run


@contextlib.contextmanager
def hooking(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """The hooks of an iterable that registers them, gone afterwards and if it fails midway."""
    registered: list[RemovableHandle] = []
    try:
        registered.extend(handles)
        yield
    finally:
        for handle in registered:
            handle.remove()


@contextlib.contextmanager
def refusing(structure: Structure, what: str) -> Iterator[None]:
    """A failure of the model's own code is the reason why the model is refused.

    Raises:
        UnsupportedModelError: for what wrong shapes, types and missing parts raise; being out of
            memory, in whoever's words, is no reason.
    """
    try:
        yield
    except UnsupportedModelError:
        raise
    except (
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if memory_is_full(error):
            raise
        settle(structure.given, failed=True)
        summary = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UnsupportedModelError(
            f"{type(structure.causal_lm).__name__} cannot be attributed: {what} fails "
            f"({type(error).__name__}: {summary})."
        ) from error


@contextlib.contextmanager
def steered(
    structure: Structure, attend: Attend, handles: Iterable[RemovableHandle]
) -> Iterator[None]:
    """``attend`` as a borrowed decoder's attention; it and the hooks are gone afterwards."""
    configs = [(c, c._attn_implementation_internal) for c in structure.attention_configs]
    try:
        for config, _ in configs:
            setattr(config, _ATTEND, attend)
            config._attn_implementation_internal = ATTENTION_NAME
        with hooking(handles):
            yield
    finally:
        for config, implementation in configs:
            config._attn_implementation_internal = implementation
            setattr(config, _ATTEND, None)


def hook_layer_input(layer: nn.Module, change: Change) -> RemovableHandle:
    """Call ``change`` on the hidden states entering a decoder layer."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def hook_site(ffn: FFN, site: str, change: Change) -> Iterator[RemovableHandle]:
    """Register hooks that call ``change`` on the attributed activation: the node's output, or its
    input.

    Of an output with more in it, such as a router's logits, on the first part. Where a layer adds
    up several, the last gives the changed sum and the others zero; that the layer does add them up
    as they are is seen from its logits.
    """
    earlier: list[Tensor] = []

    def replace(_node: nn.Module, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if len(earlier) < len(ffn.nodes) - 1:
            earlier.append(x)
            x = torch.zeros_like(x)
        else:
            total = x
            for part in earlier:
                total = total + part.view_as(x)
            earlier.clear()
            x = change(total)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    for node in ffn.nodes:
        if site == "down_proj":
            yield node.register_forward_hook(replace)
        else:
            yield node.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))


def for_all(x: Tensor, count: int, dim: int) -> Tensor:
    """Keys or values of points along ``dim``, for ``count`` of them.

    Where a layer attends to an earlier one's, points have joined since: below the layer that each
    differs in it is the unperturbed one, which is the first.
    """
    missing = count - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.narrow(dim, 0, 1).expand(shape)], dim)


def like(new: Tensor, given: Tensor) -> Tensor:
    """``[..., tokens, D]`` with as many dimensions as a module gave: OPT's gives two."""
    return new.flatten(0, new.ndim - given.ndim)
