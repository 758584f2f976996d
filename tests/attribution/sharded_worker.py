"""Run under torchrun by test_sharded: attributions of sharded models against those of whole ones.

    torchrun --nproc-per-node 2 -m tests.attribution.sharded_worker FOLDER

Each process writes FOLDER/RANK.json: what it found for each case.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import loki_kernels as loki
from loki_kernels import attribute, mean_activations
from loki_kernels.attribution import job
from loki_kernels.fingerprint import model_fingerprint
from tests.models import build_model

RANK = int(os.environ["RANK"])
PROMPTS = [{"input_ids": [1 + i, 5, *range(2, 2 + i % 4)]} for i in range(5)]
OPTIONS = {"batch_size": 2, "steps": 2}

attributed: list[list[int]] = []
attribute_batch, compute = job.attribute_batch, job.Job._compute


def recording(self, planned, *arguments):
    scores = compute(self, planned, *arguments)
    attributed.append(planned.members)
    return scores


def sharded(model, how="layers and root", **kind):
    kind["mesh"] = init_device_mesh("cpu", (2,))
    for layer in model.model.layers if how != "root" else ():
        fully_shard(layer, **kind)
    if how == "groups":
        fully_shard(model.model.embed_tokens, **kind)
        fully_shard([model.model.norm, model.lm_head], **kind)
    if how != "layers":
        fully_shard(model, **kind)
    return model


def distance(got, want) -> float:
    """The largest relative difference of what two results hold; infinite where targets differ."""
    if not torch.equal(got.targets, want.targets):
        return float("inf")
    pairs = [(getattr(got, n), getattr(want, n)) for n in ("scores", "value", "change")]
    return max(
        float((g - w).norm() / w.norm()) for g, w in pairs if g is not None and w is not None
    )


def all_is_as_before(model) -> bool:
    """Every weight is put away, trained and without a gradient, in training mode."""
    trained = all(p.requires_grad and p.grad is None for p in model.parameters())
    layer = all(isinstance(p, DTensor) for p in model.model.layers[0].parameters())
    return trained and layer and model.training


def train_step(model) -> torch.Tensor:
    """The gradients' norm of one step, each process on its own tokens."""
    model.zero_grad()
    ids = torch.arange(6)[None] + 7 * RANK
    model(input_ids=ids, labels=ids).loss.backward()
    norms = [p.grad.full_tensor().norm() for p in model.parameters()]
    model.zero_grad()
    return torch.stack(norms)


def compare(name="llama", how="layers and root", kind=None, share=True, trains=False, **options):
    """One attribution of a sharded model, and perhaps a training step afterwards."""
    kind = kind or {}
    whole, own = build_model(name, device="cpu"), contextlib.nullcontext()
    if "mp_policy" in kind:
        whole.to(torch.bfloat16)
        # a sharded model runs its own norms, which round twice
        own = mock.patch.object(job, "find_fusion", return_value={})
    with own:
        want = attribute(whole, PROMPTS, share=False, **OPTIONS | options)
    model = sharded(build_model(name, device="cpu"), how, **kind).train()
    attributed.clear()
    got = attribute(model, PROMPTS, share=share, **OPTIONS | options)
    found = {
        "distance": distance(got, want),
        "batches": attributed[:],
        "engine": got.run["engine"],
        "as before": all_is_as_before(model),
    }
    if trains:
        untouched = sharded(build_model(name, device="cpu"), how, **kind).train()
        found["trains"] = torch.equal(train_step(model), train_step(untouched))
    return found


def stopped(folder: Path) -> dict[str, object]:
    """SIGTERM to one process of two, as a log is written; the same call goes on."""
    model, out = build_model(device="cpu"), folder / "scores.safetensors"
    want = attribute(model, PROMPTS, share=False, **OPTIONS)
    found: dict[str, object] = {"fingerprint": model_fingerprint(model)}
    sharded(model)
    found["sharded"] = model_fingerprint(model)

    def ending(*arguments):
        if RANK:
            os.kill(os.getpid(), signal.SIGTERM)
        return attribute_batch(*arguments)

    attributed.clear()
    job.attribute_batch = ending
    try:
        attribute(model, PROMPTS, out=out, **OPTIONS)
    except SystemExit as end:
        found["ended"] = end.code
    finally:
        job.attribute_batch = attribute_batch
    found["before"] = len(attributed)
    dist.barrier()
    attributed.clear()
    got = attribute(model, PROMPTS, out=out, **OPTIONS)
    return found | {"distance": distance(got, want), "after": len(attributed)}


def parallel(folder: Path) -> dict[str, object]:
    """An attribution under transformers' tensor parallelism."""
    whole = build_model(device="cpu")
    if RANK == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    load = transformers.AutoModelForCausalLM.from_pretrained
    split = load(folder, tp_plan="auto").eval()
    found: dict[str, object] = {
        "split": split.model.layers[1].mlp.gate_proj.weight.to_local().shape[0]
    }
    want = attribute(whole, PROMPTS, share=False, **OPTIONS)
    attributed.clear()
    got = attribute(split, PROMPTS, **OPTIONS)
    found |= {"distance": distance(got, want), "batches": attributed[:]}
    refused = []
    for call in (
        lambda: loki.patch(split, [[1], [2], [3]]),
        lambda: attribute(split, PROMPTS, site="ffn_neurons"),
    ):
        try:
            call()
        except loki.UnsupportedModelError as error:
            refused.append(str(error))
    return found | {"refused": refused}


def averaged() -> float:
    model = build_model(device="cpu")
    want = mean_activations(model, PROMPTS)
    return float((mean_activations(sharded(model), PROMPTS) - want).norm() / want.norm())


class Around(torch.nn.Module):
    """As a PEFT model is, which takes two seconds to import."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model


def within() -> float:
    """The root of the shards is around the model that is attributed."""
    model = build_model(device="cpu")
    want = attribute(model, PROMPTS, share=False, **OPTIONS)
    for layer in model.model.layers:
        fully_shard(layer)
    return distance(attribute(fully_shard(Around(model)), PROMPTS, **OPTIONS), want)


def main(folder: Path) -> None:
    os.environ["LOKI_KERNELS_CACHE"] = str(folder / "cache")
    dist.init_process_group("gloo")
    job.Job._compute = recording
    low = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    found: dict[str, object] = {
        "compared": {
            "layers and root": compare(trains=True),
            "root": compare(how="root"),
            "layers": compare(how="layers"),
            "groups": compare(how="groups", trains=True),
            "put away at once": compare(
                kind={
                    "reshard_after_forward": True,
                    "offload_policy": CPUOffloadPolicy(pin_memory=False),
                }
            ),
            "mixed precision": compare(kind=low, trains=True),
            "norms after": compare("gemma2"),
            "sequence": compare(definition="captum"),
            "decode": compare(engine="decode"),
            "alone": compare(share=False),
        },
        "parallel": parallel(folder / "whole"),
        "stopped": stopped(folder),
        "averaged": averaged(),
        "within": within(),
    }
    (folder / f"{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
