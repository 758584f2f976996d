"""What is said of a state dict whose rows are not used, or not trained on, and what to do then."""

from __future__ import annotations

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
