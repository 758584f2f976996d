"""An installed package does its job: attribute, select, patch, train, save. Needs no test package.

    python tests/smoke.py [--compiled]

``--compiled`` also asks for the C++ implementations.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

import loki_kernels as loki
from loki_kernels.environment import environment


def main() -> None:
    here = Path(loki.__file__).parent
    assert "site-packages" in here.parts, f"not the installed package: {here}"
    for name, value in environment().items():
        print(f"{name:16} {value}")
    state = loki.backends()["count_lowest"]["cpp"]
    compiled = "--compiled" in sys.argv
    assert state.startswith("not live: not compiled: ") != compiled, state

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=112, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    prompts = [{"input_ids": torch.randint(0, 97, (n,))} for n in (5, 9)]
    rows = loki.select(loki.attribute(model, prompts), quota=10.0)
    assert rows.counts == [4, 4, 4]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loki.patch(model, rows)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = torch.randint(0, 97, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    changed = {n: int((saved[n] != before[n]).any(-1).sum()) for n in before if saved[n].ndim == 2}
    assert {n: count for n, count in changed.items() if count} == {
        f"model.layers.{layer}.mlp.down_proj.weight": 4 for layer in range(3)
    }
    report = loki.backends()["count_lowest"]["cpp"]
    assert not compiled or report.startswith("verified in float32"), report
    print("ok")


if __name__ == "__main__":
    main()
