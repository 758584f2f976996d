"""``python -m benchmarks.engines``: one prompt's attribution by each engine that takes the model.

Random models of a dense, a mixture's and a hybrid's shape, small enough for a CPU. Every engine's
scores are compared with the first one's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial

import torch
import transformers
from torch import nn

import loki_kernels as loki
from loki_kernels.options import EngineName

from .measure import seconds

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def models() -> Iterator[tuple[str, nn.Module]]:
    """Each with weights of one seed, whatever was drawn before."""
    dense = transformers.Qwen3Config(**SIZES, intermediate_size=1536)
    torch.manual_seed(0)
    yield "dense (Qwen3)", transformers.Qwen3ForCausalLM(dense)
    mixture = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=384, num_experts=16, num_experts_per_tok=4
    )
    torch.manual_seed(0)
    yield "mixture (Qwen3-MoE, 4 of 16 experts)", transformers.Qwen3MoeForCausalLM(mixture)
    hybrid = transformers.Qwen3_5TextConfig(
        **SIZES,
        intermediate_size=1536,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )
    torch.manual_seed(0)
    yield "hybrid (Qwen3.5, 3 of 4 layers recurrent)", transformers.Qwen3_5ForCausalLM(hybrid)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| model | engine | s a prompt | times the first | relative error |")
    print("|---|---|---|---|---|")
    for name, model in models():
        model.eval()
        prompt = [{"input_ids": torch.randint(0, SIZES["vocab_size"], (options.tokens,))}]
        first: tuple[float, torch.Tensor] | None = None
        engines: tuple[EngineName, ...] = ("staircase", "decode", "reforward")
        for engine in engines:
            call = partial(loki.attribute, model, prompt, steps=options.steps, engine=engine)
            try:
                result = call()
            except loki.UnsupportedModelError:
                continue
            taken = statistics.median(seconds(call) for _ in range(options.rounds))
            if first is None:
                first = taken, result.scores
            error = (result.scores - first[1]).norm() / first[1].norm()
            print(f"| {name} | {engine} | {taken:.2f} | {taken / first[0]:.1f} | {error:.0e} |")


if __name__ == "__main__":
    main()
