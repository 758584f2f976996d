"""``python -m benchmarks.training.experts [DTYPE ...] [NAME=NUMBER ...]``: a step of experts.

Ours at a tenth of the rows against training all of the experts, their down-projections alone, and
PEFT's LoRA of their two parameters, in float32 and bfloat16 by default: the time of forward,
backward and AdamW, interleaved in one process, and in a process of each one's own the memory at its
peak beyond the block. Names are ``rounds`` (5) and those of `SIZES`. Prints Markdown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from loki_kernels import patch
from loki_kernels.selection import random_rows

from ..measure import DEVICE, interleave, quantiles
from .memory import resident

METHODS = ("ours", "all experts", "down_proj", "lora")
SIZES = {"hidden": 1024, "experts": 32, "inner": 512, "chosen": 4, "tokens": 512}


def block_of(method: str, dtype: torch.dtype, sizes: dict[str, int]) -> nn.Module:
    """A mixture of Qwen3-MoE's kind, ready to be trained by a method."""
    config = Qwen3MoeConfig(
        vocab_size=8, hidden_size=sizes["hidden"], intermediate_size=sizes["inner"],
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        num_experts=sizes["experts"], moe_intermediate_size=sizes["inner"],
        num_experts_per_tok=sizes["chosen"],
    )  # fmt: skip
    torch.manual_seed(0)
    # made in its dtype: on a CPU a conversion's peak would be taken for the steps'
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).requires_grad_(False)
    experts = model.model.layers[0].mlp.experts
    if method == "ours":
        patch(model, random_rows(1, sizes["hidden"], sizes["hidden"] // 10, seed=0))
    elif method == "lora":
        from peft import LoraConfig, get_peft_model

        names = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(r=16, target_modules=[], target_parameters=names)
            get_peft_model(model, config, autocast_adapter_dtype=False)  # as `peers.lora`
    else:
        experts.down_proj.requires_grad_(True)
        experts.gate_up_proj.requires_grad_(method == "all experts")
    return model.model.layers[0].mlp.train()


def step_of(block: nn.Module, dtype: torch.dtype, sizes: dict[str, int]) -> Callable[[], None]:
    trained = [p for p in block.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    x = torch.randn(1, sizes["tokens"], sizes["hidden"], device=DEVICE).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)

    def step() -> None:
        block(x).backward(upstream)
        x.grad = None
        optimizer.step()
        optimizer.zero_grad()

    return step


def times(dtype: torch.dtype, sizes: dict[str, int], rounds: int) -> dict[str, list[float]]:
    steps = {m: step_of(block_of(m, dtype, sizes), dtype, sizes) for m in METHODS}
    return interleave(steps, rounds)


def _peak(method: str, dtype: torch.dtype, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes at the peak of three steps beyond the block, and those that are trained."""
    on_gpu = DEVICE.type == "cuda"
    block = block_of(method, dtype, sizes)
    step = step_of(block, dtype, sizes)
    before = torch.cuda.memory_allocated() if on_gpu else resident("now")
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("peak")
    trained = [p for p in block.parameters() if p.requires_grad]
    return {
        "peak": peak - before,
        "trained": sum(p.numel() for p in trained),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
    }


def measured(dtype: torch.dtype, sizes: dict[str, int], rounds: int) -> Iterator[str]:
    """Lines of a table."""
    taken = times(dtype, sizes, rounds)
    for method in METHODS:
        name = str(dtype).removeprefix("torch.")
        command = [sys.executable, "-m", "benchmarks.training.experts", "peak", method, name]
        process = subprocess.run(
            [*command, json.dumps(sizes)], capture_output=True, text=True, check=True
        )
        peak = json.loads(process.stdout.splitlines()[-1])
        milliseconds = {k: 1e3 * v for k, v in quantiles(taken[method]).items()}
        ratio = quantiles([p / o for p, o in zip(taken[method], taken["ours"], strict=True)])
        yield (
            f"| {name} | {method} | {milliseconds['p50']:.0f} ms ({milliseconds['p20']:.0f} to "
            f"{milliseconds['p80']:.0f}) | {ratio['p50']:.2f} | {peak['peak'] / 2**20:.0f} MiB | "
            f"{peak['trained'] / 1e6:.2f} M | {peak['gradients'] / 2**20:.0f} MiB |"
        )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["peak"]:
        _, method, dtype, sizes = arguments
        print(json.dumps(_peak(method, getattr(torch, dtype), json.loads(sizes))))
        return
    print("| dtype | trained | a step (p20 to p80) | ours = 1 | peak | parameters | gradients |")
    print("|---|---|---|---|---|---|---|")
    given = dict(word.split("=") for word in arguments if "=" in word)
    rounds = int(given.pop("rounds", 5))
    sizes = SIZES | {name: int(number) for name, number in given.items()}
    dtypes = [word for word in arguments if "=" not in word]
    for dtype in dtypes or ("float32", "bfloat16"):
        for line in measured(getattr(torch, dtype), sizes, rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
