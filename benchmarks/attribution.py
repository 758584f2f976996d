"""The staircase against the published procedure, side by side at SmolLM2-135M's shape.

The published procedure runs the whole prompt for every layer, forward and backward, batched over
its m path points. It takes minutes a sample, so it is run on three of the layers (first, middle,
last) and scaled to all.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

from loki_kernels import attribute
from loki_kernels.attribution.reference import attribute_reference

from .results import append

# HuggingFaceTB/SmolLM2-135M: weights are random, which changes no timing.
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def compare(model: LlamaForCausalLM, length: int, steps: int, runs: int, samples: int) -> dict:
    """Check the scores agree, then time both, interleaved."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 49152, (samples, length), generator=generator)
    depth = model.config.num_hidden_layers
    picked = [0, depth // 2, depth - 1]
    scores = attribute(model, [{"input_ids": ids[:1]}], steps=steps).scores[0]
    for layer in picked:
        (want,) = attribute_reference(model, ids[0], steps=steps, layers=range(layer, layer + 1))
        error = float((scores[layer] - want).norm() / want.norm())
        if error > 1e-4:
            raise SystemExit(f"layer {layer} differs by {error:.2g}; a wrong result is not timed")

    ours = Timer(
        "attribute(model, [{'input_ids': ids}], steps=steps)",
        globals={"attribute": attribute, "model": model, "ids": ids, "steps": steps},
        num_threads=torch.get_num_threads(),
    )
    peers = [
        Timer(
            "reference(model, ids, steps=steps, layers=layers)",
            globals={
                "reference": attribute_reference,
                "model": model,
                "ids": ids[0],
                "steps": steps,
                "layers": range(layer, layer + 1),
            },
            num_threads=torch.get_num_threads(),
        )
        for layer in picked
    ]
    own_times, peer_times = [], []
    for _ in range(runs):
        own_times.append(ours.timeit(1).median / samples)
        # attribute_reference also records the prompt once per call, which the whole procedure
        # does once a sample: 2 % of a layer's time, counted against the peer here.
        peer_times.append(statistics.mean(p.timeit(1).median for p in peers) * depth)
    ratios = [peer / own for own, peer in zip(own_times, peer_times, strict=True)]
    return {
        "suite": "attribution",
        "shape": "SmolLM2-135M",
        "dtype": "float32",
        "prompt_tokens": length,
        "steps": steps,
        "runs": runs,
        "ours_s_per_sample": statistics.median(own_times),
        "ours_min_max": [min(own_times), max(own_times)],
        "peer": "published procedure, batched over m, 3 of 30 layers scaled",
        "peer_s_per_sample": statistics.median(peer_times),
        "ratio": statistics.median(ratios),
        "ratio_min_max": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dry-run", action="store_true", help="one small model, once")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.dry_run:
        small = SMOLLM2_135M | {"num_hidden_layers": 3}
        model = LlamaForCausalLM(LlamaConfig(**small)).eval().requires_grad_(False)
        print(compare(model, length=16, steps=2, runs=1, samples=1))
        return
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval()
    model.requires_grad_(False)  # the peer, too, gets no weight gradients
    for length in arguments.lengths:
        row = compare(model, length, arguments.steps, arguments.runs, arguments.samples)
        append(row)
        print(
            f"T={length}: ours {row['ours_s_per_sample']:.2f} s a sample, published procedure "
            f"{row['peer_s_per_sample']:.1f} s, ratio {row['ratio']:.0f} "
            f"({row['ratio_min_max'][0]:.0f} to {row['ratio_min_max'][1]:.0f})"
        )


if __name__ == "__main__":
    main()
