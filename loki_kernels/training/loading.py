"""Whether a state dict's update is one of these rows, and what is said of one that is not used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..sharding import full_shape, full_values, is_partitioned
from .arithmetic import of_products, same_rows, updated_rows

# The name of a protection's fingerprint in a state dict.
DIGEST = "protection_digest"

_AVERAGE = (
    "Of an average of state dicts load the updates alone: model.load_state_dict({k: v for k, v in "
    "average.items() if k.endswith(('update', 'delta_a', 'delta_b'))}, strict=False)."
)
OTHER_ROWS = (
    f"the rows that were trained are others than this model's; patch it with those. {_AVERAGE}"
)
OTHER = (
    "the update that was saved is of other base weights, or of another protection; patch the model "
    f"it was trained on, not a merged one, with the same protect=. {_AVERAGE}"
)
_READ_IT = (
    "Read the update beside the checkpoint: with handle.trainer_callback() for HF Trainer, "
    "loki_kernels.patch(model, rows=<checkpoint folder>), or "
    "handle.load_state(<checkpoint folder>)."
)
PASSED_OVER = (
    "a state dict of this model's layers was loaded that has nothing of these rows under their "
    "names in memory, as the files of save_pretrained have not where a family's names differ "
    f"(experts one by one), so the update is not that of the other weights. {_READ_IT}"
)
MERGED_ALONE = (
    "the weights that were loaded hold trained rows merged into them and not the update itself, so "
    f"training would go on from a rounding. {_READ_IT} To start anew from these weights, merge and "
    "patch."
)


def why_not_load(layer: Any, state_dict: dict[str, Any], prefix: str) -> str | None:
    """Why an update that was saved is none of a `LokiRows`' rows, or of other base rows."""
    index = state_dict.get(prefix + "index")
    if index is not None and not torch.equal(index.cpu(), layer.index.cpu()):
        return OTHER_ROWS
    digests = state_dict.get(prefix + DIGEST), layer.digest()
    saved, own = (None if digest is None else digest.tolist() for digest in digests)
    if index is not None and saved != own:
        return OTHER
    weight = state_dict.get(prefix + layer.parameter)
    names = [name for name, _ in layer.trained_parameters()]
    factors = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
    if weight is None or is_partitioned(layer.frozen) or not layer.is_like(factors):
        return None  # of what has another shape torch says so
    if tuple(weight.shape) != full_shape(layer.frozen):
        return None
    rows = layer.take_rows(full_values(weight)).to(layer.base_rows.device)
    # Perhaps not where the rows were made (Lightning restores on the host what a GPU has trained),
    # and another device's products are others, above all in TF32.
    read = {name: full_values(factor).to(rows.device) for name, factor in factors.items()}
    formed = list(layer.formed(read).values())
    want = updated_rows(layer.base_rows, *formed)
    same = same_rows(rows, want) or same_rows(
        rows, want, besides=of_products(list(read.values()), formed)
    )
    return None if same else OTHER


def check_there(layer: Any) -> Any:
    """A `LokiRows`; UnsupportedModelError if accelerate has taken its weight away."""
    if layer.frozen.is_meta and not layer.base_rows.is_meta:
        raise UnsupportedModelError(
            f"the weight {layer.parameter} of a patched layer is not in memory: something has "
            "offloaded it after loki_kernels.patch (accelerate's cpu_offload, dispatch_model with "
            '"cpu" or "disk"). Call handle.merge() or handle.unpatch() before you offload, or '
            "leave the model in memory."
        )
    return layer


def check_known(layers: Iterable[Any]) -> None:
    """Raise RuntimeError, before anything is written, if an update is not that of what was loaded.

    Merged rows alone are enough where they are what the update gives, as in evaluation.
    """
    for layer in layers:
        layer.check_loaded()
