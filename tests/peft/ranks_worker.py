"""Run under torchrun by test_ranks: what two processes with different rows are told.

    torchrun --nproc-per-node 2 -m tests.peft.ranks_worker OUT.json

OUT.json gets, for each case, what each process has to say.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist

import loki_kernels as loki
from loki_kernels.peft import LokiConfig
from loki_kernels.training import targets
from tests.models import build_model
from tests.tiny_training import token_batch

RANK = int(os.environ["RANK"])
OWN_ROWS = [[1, 5, 40 + RANK], [0], [7, 3]]


def make(rows=OWN_ROWS, protect=None):
    # without rows those of an analysis
    config = LokiConfig(rows=rows, quota=10 if rows is None else None, protect=protect)
    return peft.get_peft_model(build_model(), config)


def protected(path):
    """The same rows, in other directions than another process."""
    texts = torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(RANK)).tolist()
    loki.estimate_protection(build_model(), texts).save(path)
    return make([[1], [0], [7]], path)


def step(model):
    model.train()(input_ids=token_batch(), labels=token_batch()).loss.backward()


def error_of(call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return None


def analysed_here(*_):
    """Scores of which the second process has a near-tie the other way."""
    scores = torch.arange(3 * 48.0).view(3, 48) / 100
    scores[:, 10] += 1e-6 if RANK else -1e-6
    scores[:, 9] = scores[:, 10] - (2e-6 if RANK else -2e-6)
    return scores


def chosen_rows():
    targets.cached_attribution = analysed_here
    targets.select = lambda scores, quota, **_: loki.RowSelection(
        [layer.argsort()[:10].sort().values for layer in scores]
    )
    model = make(None)
    rows = model.peft_config["default"].rows
    own = [layer.tolist() for layer in targets.select(analysed_here(), 10)]
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    return rows, own, layer.loki_index["default"].tolist()


def main(out: Path) -> None:
    early = make()  # before the processes know each other
    same = make([[1], [0], [7]])
    folder = out.parent / f"adapter-{RANK}"
    early.save_pretrained(folder)
    early_protected = protected(out.parent / f"early-{RANK}.safetensors")
    dist.init_process_group("gloo")
    early.eval()(input_ids=token_batch())  # evaluation is anyone's own
    results = {
        "first step": error_of(step, early),
        "same rows": error_of(step, same),
        "given": error_of(make),
        "protected, first step": error_of(step, early_protected),
        "protected, given": error_of(protected, out.parent / f"given-{RANK}.safetensors"),
        "evaluated": error_of(peft.PeftModel.from_pretrained, build_model(), str(folder)),
        "analysed": chosen_rows(),
    }
    gathered: list = [None, None]
    dist.all_gather_object(gathered, results)
    if RANK == 0:
        out.write_text(json.dumps({case: [r[case] for r in gathered] for case in results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
