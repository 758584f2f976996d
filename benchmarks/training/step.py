"""A whole training step with AdamW: our rows against everything, LoRA and DoRA."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from loki_kernels import Protection, patch
from loki_kernels.discovery import find_structure
from loki_kernels.protection.moments import default_directions
from loki_kernels.ranking import rows_per_layer
from loki_kernels.selection import random_rows

from ..measure import DEVICE, DTYPE, DTYPE_NAME, attempt, floor, interleave, pair
from ..shapes import MODELS, build, parameters
from . import peers

QUOTA = 10.0  # percent of the rows
METHODS = ("ours", "full", "lora", "ours_protected", "dora")


def prepare(method: str, model: nn.Module) -> nn.Module:
    """``model``, ready to be trained by ``method``: of `METHODS`, or a variant of one of them.

    Of a variant that ends in ``_compiled`` every decoder layer is compiled, which takes one
    compilation where they are alike.
    """
    if method.endswith("_compiled"):
        compiled = prepare(method.removesuffix("_compiled"), model)
        for layer in model.model.layers:
            layer.compile()
        return compiled
    if method == "ours_protected":  # what `patch(model)` does
        patch(model, quota=100, protect=made_up_protection(model))
        return model
    if method in ("ours", "ours_fused"):
        width, depth = model.config.hidden_size, model.config.num_hidden_layers
        rows = random_rows(depth, width, rows_per_layer(QUOTA, width), seed=0)
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
        "quota": QUOTA,
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


def begin(method: str, name: str, layers: int | None, tokens: int) -> tuple[Any, float]:
    """A method's step, and the loss of its first, which compiles and has no optimizer's state."""
    step = make_step(prepare(method, build(name, layers)), tokens)
    return step, step()


def least_time(name: str, layers: int | None, tokens: int) -> float:
    """Seconds that a step of some rows takes at the ceilings; without attention's own products.

    Forward every weight, the head too, and back the gradient of the activations, but for the first
    layer's: its rows are the lowest that are trained. Once more the rows.
    """
    shape, weights = MODELS[name], parameters(name, layers)
    depth, width = layers or shape["num_hidden_layers"], shape["hidden_size"]
    rows = depth * rows_per_layer(QUOTA, width) * shape["intermediate_size"]
    back = weights * (depth - 1) / depth
    flops = 2 * tokens * (weights + back + 2 * width * shape["vocab_size"] + rows)
    return floor(flops, 2 * DTYPE.itemsize * weights)


def run(scope: str) -> Iterator[dict[str, Any]]:
    for name, layers, tokens, methods in cases(scope):
        case = describe(name, layers, tokens)
        with attempt(f"training_step, {name}, {tokens} tokens"):
            steps = checked_steps(name, layers, tokens, methods)
            if "ours" in steps:  # what is not there has been said
                times = interleave(steps, rounds=2 if scope == "dry" else 5)
                least = least_time(name, layers, tokens)
                yield from pair("training_step", case, times, floor_s=least)
        steps = {}
        gc.collect()


def checked_steps(
    name: str, layers: int | None, tokens: int, methods: Sequence[str]
) -> dict[str, Callable[[], float]]:
    """Each method's step, if its first loss is the first method's: a wrong result is not timed."""
    steps, losses = {}, []
    for method in methods:
        with attempt(f"training_step, {name}, {tokens} tokens, {method}"):
            step, loss = begin(method, name, layers, tokens)
            losses.append(loss)
            if not math.isclose(losses[0], loss, rel_tol=1e-2):
                raise SystemExit(f"its first loss is {loss:.5g} and not {losses[0]:.5g}")
            steps[method] = step
    return steps
