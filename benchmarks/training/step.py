"""A whole training step with AdamW: our rows against everything, LoRA and DoRA."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from loki_kernels import Protection, patch
from loki_kernels.discovery import find_structure
from loki_kernels.protection.moments import default_directions
from loki_kernels.ranking import rows_per_layer
from loki_kernels.selection import random_rows

from ..measure import DEVICE, DTYPE, DTYPE_NAME, floor, interleave, pair
from ..shapes import MODELS, build, parameters
from . import peers

METHODS = ("ours", "full", "lora", "ours_protected", "dora")


def prepare(method: str, model: nn.Module, quota: float = 10.0) -> nn.Module:
    """``model``, ready to be trained by ``method``: of `METHODS`, or a variant of one of them.

    Of a variant that ends in ``_compiled`` every decoder layer is compiled, which takes one
    compilation where they are alike.
    """
    if method.endswith("_compiled"):
        compiled = prepare(method.removesuffix("_compiled"), model, quota)
        for layer in model.model.layers:
            layer.compile()
        return compiled
    if method == "ours_protected":  # what `patch(model)` does
        patch(model, quota=100, protect=made_up_protection(model))
        return model
    if method in ("ours", "ours_fused"):
        width, depth = model.config.hidden_size, model.config.num_hidden_layers
        rows = random_rows(depth, width, rows_per_layer(quota, width), seed=0)
        patch(model, rows, fuse_mlp=method == "ours_fused")
        return model
    if method == "full":
        return model.requires_grad_(True)
    targets = ["down_proj"] if method == "lora_down_proj" else "all-linear"
    return peers.lora(model, targets, dora=method == "dora")


def made_up_protection(model: nn.Module) -> Protection:
    """Random directions, as many as are estimated: a step takes as long with any."""
    directions = {}
    for down_proj in find_structure(model).projections():
        count = default_directions(down_proj.in_features)
        noise = torch.randn(down_proj.in_features, count, device=DEVICE)
        directions[down_proj.name] = torch.linalg.qr(noise)[0].cpu()
    energies = {name: torch.ones(own.shape[1]) for name, own in directions.items()}
    totals = {name: 2.0 * own.shape[1] for name, own in directions.items()}
    return Protection(directions, energies, totals)


def make_step(model: nn.Module, tokens: int) -> Callable[[], float]:
    """A function that trains one step on one batch and returns its loss."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # HF Trainer's
    length = min(tokens, 512)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (tokens // length, length), generator=generator).to(DEVICE)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def describe(name: str, layers: int | None, tokens: int) -> dict[str, Any]:
    """The case of a record."""
    return {
        "model": name,
        "layers": layers or MODELS[name]["num_hidden_layers"],
        "tokens": tokens,
        "quota": 10.0,
        "dtype": DTYPE_NAME,
    }


def cases(scope: str) -> Iterator[tuple[str, int | None, int, tuple[str, ...]]]:
    """Model, layers (None: all), tokens, methods."""
    if scope == "dry":
        yield "tiny", None, 32, METHODS
    elif DEVICE.type == "cuda":
        # AdamW's state of a whole 8B model does not fit beside it
        yield "Llama-3.1-8B", 4, 4096, METHODS
    else:
        yield "SmolLM2-135M", None, 512, METHODS
        if scope == "full":
            yield "SmolLM2-135M", None, 2048, METHODS[:4]
            yield "Qwen2.5-0.5B", None, 512, METHODS[:4]


def run(scope: str) -> Iterator[dict[str, Any]]:
    for name, layers, tokens, methods in cases(scope):
        models = {method: prepare(method, build(name, layers)) for method in methods}
        steps = {method: make_step(model, tokens) for method, model in models.items()}
        losses = {method: step() for method, step in steps.items()}
        if not all(math.isclose(losses["ours"], loss, rel_tol=1e-2) for loss in losses.values()):
            raise SystemExit(f"the first losses differ: {losses}; a wrong result is not timed")
        times = interleave(steps, rounds=2 if scope == "dry" else 5)
        weights, head = parameters(name, layers), MODELS[name]["hidden_size"]
        head *= MODELS[name]["vocab_size"]
        # Forward and the gradient of the activations for every weight, once more for the rows:
        # a tenth of the down-projections, which are under a third of the weights.
        flops = 2 * tokens * (2 * (weights + head) + 0.1 * weights / 3)
        least = floor(flops, 2 * DTYPE.itemsize * weights)
        yield from pair("training_step", describe(name, layers, tokens), times, floor_s=least)
        del models, steps
        gc.collect()
