"""Run as a script, in a process of its own, on a saved checkpoint: is it an ordinary model?

Usage: python verify.py CHECKPOINT EXPECTED.json
"""

import hashlib
import json
import sys
from typing import Any


def row_hashes(weight: Any) -> list[str]:
    """A short hash of every row's bytes."""
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in weight]


def main(checkpoint: str, expected_path: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with open(expected_path, encoding="utf-8") as file:
        expected = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        logits = model(torch.tensor([expected["input_ids"]])).logits[0, -1]
    want = torch.tensor(expected["logits"])
    difference = float((logits - want).norm() / want.norm())

    trained = changed = 0
    state = model.state_dict()
    missing = state.keys() ^ expected["hashes"].keys()
    assert not missing, f"the checkpoint has other tensors: {sorted(missing)[:3]}"
    for name, hashes in expected["hashes"].items():
        rows = zip(row_hashes(torch.atleast_2d(state[name])), hashes, strict=True)
        moved = sum(now != before for now, before in rows)
        if name in expected["trained"]:
            trained += moved
        else:
            changed += moved
    result = {
        "architecture": type(model).__name__,
        "loki_kernels_imported": "loki_kernels" in sys.modules,
        "logits_relative_difference": difference,
        "trained_rows": sum(len(expected["hashes"][name]) for name in expected["trained"]),
        "trained_rows_changed": trained,
        "other_rows_changed": changed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
