"""What must hold of a model for its attribution to be exact, tried once on the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from ..structure import TOLERANCE, Structure, embedding_weight, in_float64
from .integration import guard_tolerance, relative_error
from .prefill import Batch, native_forward
from .steering import hook_site, hooking, refusing

# Of logits that the head is tried with: large enough for a soft-cap to show.
_LOGITS = 20.0


def check_model(structure: Structure, input_ids: Tensor) -> None:
    """Raise unless earlier tokens do not see later ones and the head is what its config says.

    One forward pass of two prompts: one ``[1, T]``, and the same with another last token.

    Raises:
        UnsupportedModelError: naming what does not hold, or that there is no linear head.
    """
    model, head = structure.causal_lm, structure.head()
    (tokens,) = input_ids
    other = tokens[tokens != tokens[-1]]
    changed = tokens.clone()
    changed[-1] = other[0] if len(other) else (tokens[-1] + 1) % structure.vocab_size
    both = torch.stack([tokens, changed])
    lengths = torch.full((2,), len(tokens), device=both.device)
    hidden = _large_hidden(head.weight)

    def put_hidden() -> Iterator[RemovableHandle]:
        yield model.get_output_embeddings().register_forward_pre_hook(
            lambda _module, _args: (hidden.expand(2, len(tokens), -1),)
        )

    logits, prefix = native_forward(structure, both, Batch(both, lengths), put_hidden())
    # of the head that is gathered: FSDP2's shards may be of another dtype
    tolerance = TOLERANCE[head.weight.dtype]
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


def check_sums(structure: Structure, input_ids: Tensor) -> None:
    """Raise unless a layer with several blocks adds up what they give, and does no more with it.

    Two forward passes of a prompt ``[1, T]``: the model's own, and one where the last block gives
    the sum and the others zero.

    Raises:
        UnsupportedModelError: if the logits differ: a node is a coordinate of the sum.
    """
    several = [ffn for ffn in structure.present().values() if len(ffn.nodes) > 1]
    if not several:
        return

    def logits(handles: Iterable[RemovableHandle]) -> Tensor:
        with hooking(handles), refusing(structure, "its forward pass over the prompt"):
            last: Tensor = structure.run(input_ids=input_ids, use_cache=False).logits[:, -1]
        return last

    own = logits([])
    moved = (hook for ffn in several for hook in hook_site(ffn, "down_proj", lambda x: x))
    error = relative_error(logits(moved), own)
    tolerance = guard_tolerance(own.dtype, embedding_weight(structure.causal_lm).dtype)
    if error > tolerance:
        kinds = " and ".join(type(node).__name__ for node in several[0].nodes)
        raise UnsupportedModelError(
            f"{type(structure.causal_lm).__name__} does more than add up what {kinds} of a layer "
            f"give (moving the sum changes the logits: relative error {error:.2g}, allowed "
            f"{tolerance:.0e}); a node is a coordinate of their plain sum."
        )


def _large_hidden(weight: Tensor) -> Tensor:
    """``[1, 1, hidden_size]`` whose logits are about `_LOGITS` in size."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(weight.shape[1], generator=generator).to(weight)
    size = (weight.detach() @ hidden).float().std().clamp_min(1e-6)
    return (hidden * (_LOGITS / size).to(hidden))[None, None]


def _difference(got: Tensor, want: Tensor) -> float:
    got, want = in_float64(got), in_float64(want.to(got.device))
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
