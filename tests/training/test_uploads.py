"""What is uploaded to the Hub, which is faked, and what large checkpoints are made of."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file

import loki_kernels as loki
from tests.models import build_model, changed_rows
from tests.tiny_training import (
    ROWS,
    WAYS,
    load_model,
    logits,
    protection_file,
    start,
    tiny_trainer,
)

STEPS = 3


class Hub:
    """What transformers uses of ``HfApi``: it keeps the names of uploaded files, by folder."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path, path_in_repo="", ignore_patterns=None, **_):
        paths = [p for p in Path(folder_path).rglob("*") if p.is_file()]
        names = sorted(str(path.relative_to(folder_path)) for path in paths)
        kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=ignore_patterns)
        self.files.setdefault(path_in_repo, set()).update(kept)
        done = Future()
        done.set_result(None)
        return done

    def create_commit(self, *, operations, **_):
        self.files.setdefault("", set()).update(o.path_in_repo for o in operations)
        return SimpleNamespace(commit_url="")


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    if not hasattr(transformers.trainer, "hf_api"):
        pytest.skip("this transformers takes another way to the Hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: made)
    card = SimpleNamespace(save=lambda path: None)  # it would look for one on the Hub
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: made)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: card)
    return made


FILES = {
    "patch": {"config.json", "model.safetensors", "loki_rows.update"},
    "peft": {"adapter_config.json", "adapter_model.safetensors"},
}
for way in ("patch", "peft"):
    FILES[f"{way}, protected"] = FILES[way] | {"loki_rows.protection"}


@pytest.mark.parametrize("way", WAYS)
def test_push_to_hub(way, base_folder, tmp_path, hub):
    """The files of the last upload, and of the uploads while it trained."""
    model, callbacks = start(way, base_folder)
    trainer = tiny_trainer(
        model, tmp_path, STEPS, callbacks, push_to_hub=True, hub_strategy="checkpoint",
        hub_model_id="me/rows",
    )  # fmt: skip
    if way == "peft, protected":  # as docs/trainers.md says, since a Trainer does not copy it
        trainer.model.save_pretrained(trainer.args.output_dir)
    trainer.train()
    assert hub.files[""] >= FILES[way]
    assert hub.files["last-checkpoint"] >= FILES[way] | {"optimizer.pt"}
    hub.files.clear()
    trainer.push_to_hub()
    assert hub.files[""] >= FILES[way]


@pytest.mark.parametrize("way", ["patch", "patch, protected"])
@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_a_model_pushes_its_update(by, way, base_folder, tmp_path, hub):
    model = load_model(base_folder)
    loki.patch(model, ROWS, protect=protection_file(base_folder) if "protected" in way else None)
    if by == "push_to_hub":
        model.push_to_hub("me/rows")
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/rows")
    assert hub.files[""] >= FILES[way]


@pytest.mark.parametrize("tied", [False, True])
def test_shards(tied, tmp_path):
    model = build_model("llama_mlp_bias" if tied else "llama")
    model.save_pretrained(tmp_path / "base")
    handle = loki.patch(model, ROWS)
    tiny_trainer(model, tmp_path, STEPS, save_strategy="no").train()
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert changed_rows(tmp_path / "out", tmp_path / "base") == ROWS[0]
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("model-*.safetensors"))]
    for order in (shards, shards[::-1]):  # to evaluate; a layer lies in several
        merged = load_model(tmp_path / "base")
        loki.patch(merged, ROWS)
        for shard in order:
            merged.load_state_dict(shard, strict=False)
        torch.testing.assert_close(logits(merged), logits(model))
    again = loki.patch(load_model(tmp_path / "base"), tmp_path / "out")
    for (_, a), (_, b) in zip(handle.named_layers(), again.named_layers(), strict=True):
        assert torch.equal(a.update, b.update)
