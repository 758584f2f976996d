"""What must hold of a model for its attribution to be exact, tried once on the model itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from ..structure import Structure, in_float64
from .prefill import Batch, native_forward

# Largest relative difference between results that are the same but for rounding.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
_TOKENS = 16
# Of logits that the head is tried with: large enough for a soft-cap to show.
_LOGITS = 20.0

_checked: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()


def check_model(structure: Structure, batch: Batch) -> None:
    """Raise unless earlier tokens do not see later ones and the head is what its config says.

    One forward pass of two short prompts, the first time a model is attributed in a dtype and with
    an attention implementation.

    Raises:
        UnsupportedModelError: naming what does not hold.
    """
    model = structure.causal_lm
    head = structure.head()
    tried = head.weight.dtype, getattr(model.config, "_attn_implementation", None)
    if tried in _checked.setdefault(model, set()):
        return
    tokens = batch.input_ids[0, : int(batch.lengths[0])]
    tokens = tokens.repeat(-(-_TOKENS // len(tokens)))[-_TOKENS:]
    other = tokens[tokens != tokens[-1]]
    changed = tokens.clone()
    changed[-1] = other[0] if len(other) else (tokens[-1] + 1) % structure.vocab_size
    input_ids = torch.stack([tokens, changed])
    lengths = torch.full((2,), _TOKENS, device=input_ids.device)
    hidden = _large_hidden(head.weight)

    def put_hidden() -> Iterator[RemovableHandle]:
        yield model.get_output_embeddings().register_forward_pre_hook(
            lambda _module, _args: (hidden.expand(2, _TOKENS, -1),)
        )

    batch = Batch([], input_ids, lengths)
    logits, prefix = native_forward(structure, input_ids, batch, put_hidden())
    tolerance = _TOLERANCE[head.weight.dtype]
    name = type(model).__name__
    for layer, (keys, values) in prefix.items():
        if max(_difference(x[0, :, :-1], x[1, :, :-1]) for x in (keys, values)) > tolerance:
            raise UnsupportedModelError(
                f"{name}: earlier tokens see later ones (the keys and values of layer {layer} "
                "change with the last token), so scaling it would change them too."
            )
    structure.gather()  # the forward pass has put the head away
    if _difference(logits[:1], head.logits(hidden[0])) > tolerance:
        raise UnsupportedModelError(
            f"{name} makes its logits in another way than by its output head, scaled and capped "
            "as its config says."
        )
    _checked[model].add(tried)


def _large_hidden(weight: Tensor) -> Tensor:
    """``[1, 1, hidden_size]`` whose logits are about `_LOGITS` in size."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(weight.shape[1], generator=generator).to(weight)
    size = (weight.detach() @ hidden).float().std().clamp_min(1e-6)
    return (hidden * (_LOGITS / size).to(hidden))[None, None]


def _difference(got: Tensor, want: Tensor) -> float:
    got, want = in_float64(got), in_float64(want.to(got.device))
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
