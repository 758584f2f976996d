"""The analysis against the published procedure and captum, at whole models' shapes.

Both peers run the whole prompt for every layer, forward and backward, batched over the path points.
They take minutes a sample, so they run on three of the layers (first, middle, last), scaled to all.
On those layers ours is checked before it is timed, and captum, where it is installed.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from loki_kernels import attribute
from loki_kernels.attribution.reference import attribute_reference
from loki_kernels.discovery import find_structure

from .measure import (
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    attempt,
    check,
    floor,
    interleave,
    pair,
    twice_the_error,
)
from .shapes import MODELS, build, parameters

SCALED = "three of the layers, scaled to all"
# Of Llama-3.1-8B's shape 45 GiB are a bfloat16 model and its float32 copy, and 12 more the
# published procedure's gradient in float32 at m = 7; at 512 tokens they would be 48.
CHECKED_TOKENS = 128
CHECKED_STEPS = 7
CAPTUM = "the captum package"


def cases(scope: str) -> Iterator[dict[str, Any]]:
    """``samples`` is how many prompts ours takes at a time; times are a prompt's."""
    if scope == "dry":
        yield {"model": "tiny", "tokens": 16, "steps": 2, "samples": 2, "rounds": 1, "captum": True}
        return
    base = {"model": "SmolLM2-135M", "steps": 7, "samples": 8, "rounds": 5}
    deep = {"model": "Llama-3.1-8B", "steps": 7, "samples": 16, "rounds": 5}
    if DEVICE.type == "cuda":
        yield deep | {"tokens": 128, "captum": True}
        yield deep | {"tokens": 512}
        if scope == "full":
            yield from (deep | {"tokens": n, "rounds": 3} for n in (64, 256, 1024, 2048, 4096))
            yield from (deep | {"tokens": 128, "steps": m, "rounds": 3} for m in (20, 50))
        return
    yield base | {"tokens": 128, "captum": True}
    yield base | {"tokens": 512, "rounds": 3}
    if scope == "quick":
        return
    one = base | {"rounds": 1, "samples": 4}
    yield from (one | {"tokens": n} for n in (64, 256, 1024))
    yield from (one | {"tokens": 128, "steps": m} for m in (20, 50))
    yield from (one | {"tokens": 128, "layers": n} for n in (6, 12, 24))
    yield from (base | {"tokens": 128, "samples": n, "rounds": 2} for n in (1, 32))
    yield one | {"model": "Qwen2.5-0.5B", "tokens": 128}
    yield one | {"model": "Llama-3.1-8B", "layers": 3, "tokens": 128}


def least_work(model: str, layers: int | None, tokens: int, steps: int) -> float:
    """FLOPs of a prompt: prefill, the points' forward and backward pass, head and its gradient."""
    depth = layers or MODELS[model]["num_hidden_layers"]
    weights, width = parameters(model, layers), MODELS[model]["hidden_size"]
    head = width * MODELS[model]["vocab_size"]
    # A point begins above its own layer, so a layer is passed by those of the layers below it.
    points, passed = depth * steps, steps * depth * (depth - 1) / 2
    products = 2 * weights * tokens + 2 * 2 * weights / depth * passed + 2 * head * (2 * points + 1)
    # Two products of causal attention in the prefill; of a point two forward and three back, since
    # the prefix has no gradient.
    return products + 2 * width * tokens * (tokens + 1) * depth + 10 * width * tokens * passed


def least_bytes(model: str, layers: int | None) -> int:
    """Of a batch: the weights for prefill, points and back, the head for its product and back."""
    head = MODELS[model]["hidden_size"] * MODELS[model]["vocab_size"]
    return DTYPE.itemsize * (3 * parameters(model, layers) + 2 * head)


def run(scope: str) -> Iterator[dict[str, Any]]:
    model: LlamaForCausalLM | None = None
    built: tuple[str, int | None] | None = None
    for case in cases(scope):
        name, layers = case["model"], case.get("layers")
        with attempt(f"attribution, {name}, {case['tokens']} tokens"):
            if built != (name, layers):
                model, built = None, None
                gc.collect()
                model = build(name, layers).requires_grad_(False)  # no peer gets weight gradients
                built = name, layers
            assert model is not None
            yield from _compare(model, case)


def _compare(model: LlamaForCausalLM, case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    tokens, steps, samples = case["tokens"], case["steps"], case["samples"]
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, model.config.vocab_size, (samples, tokens), generator=generator)
    depth = model.config.num_hidden_layers
    picked = [0, depth // 2, depth - 1]
    one = ids[0].to(DEVICE)
    definitions = ["published", "captum"] if case.get("captum") else ["published"]
    few_steps = min(steps, CHECKED_STEPS)
    with_captum = check_scores(model, one[:CHECKED_TOKENS], few_steps, definitions, picked)

    ours = partial(attribute, model, [{"input_ids": ids}], steps=steps)
    contenders: dict[str, Callable[[], Any]] = {"ours": ours}
    contenders |= {f"published {i}": partial(_published, model, one, i, steps) for i in picked}
    times = interleave(contenders, case["rounds"])
    described = {
        "model": case["model"],
        "layers": depth,
        "tokens": tokens,
        "steps": steps,
        "samples": samples,
        "dtype": DTYPE_NAME,
    }
    least = floor(
        least_work(case["model"], case.get("layers"), tokens, steps),
        least_bytes(case["model"], case.get("layers")) / samples,
    )
    pairs = {
        "ours": [seconds / samples for seconds in times["ours"]],
        "published": _scaled(times, "published", picked, depth),
    }
    yield from pair("attribution", described, pairs, floor_s=least, notes={"published": SCALED})
    if with_captum:
        few = max(1, samples // 4)  # its path copies every position's keys and values
        prompts = [{"input_ids": ids[:few]}]
        contenders = {"ours": partial(attribute, model, prompts, steps=steps, definition="captum")}
        contenders |= {f"captum {i}": partial(_captum, model, one, i, steps) for i in picked}
        times = interleave(contenders, 1)
        pairs = {
            "ours": [seconds / few for seconds in times["ours"]],
            "captum": _scaled(times, "captum", picked, depth),
        }
        described = described | {"samples": few, "definition": "captum"}
        yield from pair("attribution", described, pairs, notes={"captum": SCALED})


def check_scores(
    model: LlamaForCausalLM, ids: Tensor, steps: int, definitions: list[str], picked: list[int]
) -> bool:
    """Leave unless ours computes what the published procedure does, on the picked layers.

    In float32 the two agree. 32 layers of random weights put bfloat16 a tenth off, whoever
    computes; so there ours may be twice as far from the published procedure in float32 as that is
    in bfloat16. The layers are judged together: an error all nodes of one share, as the
    probability's is, may be small for either by chance.

    Returns:
        Whether captum itself is there and does so too.
    """
    with torch.no_grad():  # once: in another dtype another token may be the likeliest
        token = int(model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].argmax())

    def published(judge: LlamaForCausalLM, definition: str) -> Tensor:
        scores = [_published(judge, ids, i, steps, definition, token).cpu() for i in picked]
        return torch.stack(scores)

    def ours(definition: str) -> Tensor:
        prompts = [{"input_ids": ids[None].cpu()}]
        found = attribute(model, prompts, steps=steps, definition=definition, target=[token])
        return found.scores[0, picked]

    results = {name: (ours(name), published(model, name)) for name in definitions}
    timed = "captum" in definitions and find_spec("captum") is not None
    if timed:
        found = [_captum(model, ids, i, steps, token)[0, -1].cpu() for i in picked]
        results[CAPTUM] = (torch.stack(found), results["captum"][1])
    elif "captum" in definitions:
        print("attribution: captum is not installed, and so not timed", flush=True)

    def agrees(name: str, where: str, got: Tensor, want: Tensor, most: float) -> bool:
        try:
            check(f"{name} on {where}", got, want, most)
        except SystemExit as error:
            if name != CAPTUM:
                raise
            print(f"attribution: not timed: {error}", flush=True)
            return False
        return True

    if torch.float32 == DTYPE:
        for name, (got, plain) in results.items():
            for layer, own, want in zip(picked, got, plain, strict=True):
                timed &= agrees(name, f"layer {layer}", own, want, 1e-4)
        return timed
    wide = copy.deepcopy(model).float()  # gone before anything is timed
    for name, (got, plain) in results.items():
        exact = published(wide, "captum" if name == CAPTUM else name)
        size = exact.norm(dim=-1, keepdim=True)
        got, plain, exact = got / size, plain / size, exact / size
        timed &= agrees(name, f"layers {picked}", got, exact, twice_the_error(plain, exact))
    del wide
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return timed


def _published(
    model: LlamaForCausalLM,
    ids: Tensor,
    layer: int,
    steps: int,
    definition: str = "published",
    target: int | None = None,
) -> Tensor:
    """One layer's scores ``[D]`` as the published procedure finds them."""
    layers = range(layer, layer + 1)
    return attribute_reference(
        model, ids, steps=steps, definition=definition, target=target, layers=layers
    )[0]


def _scaled(times: dict[str, list[float]], peer: str, picked: list[int], depth: int) -> list[float]:
    layers = zip(*(times[f"{peer} {i}"] for i in picked), strict=True)
    return [statistics.mean(seconds) * depth for seconds in layers]


def _captum(model: LlamaForCausalLM, ids: Tensor, layer: int, steps: int, target: int = 1) -> Any:
    from captum.attr import LayerIntegratedGradients

    def forward(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].softmax(-1)

    down_proj = find_structure(model).ffns[layer].nodes[0]
    explainer = LayerIntegratedGradients(forward, down_proj)
    return explainer.attribute(ids[None], target=target, n_steps=steps, method="riemann_trapezoid")
