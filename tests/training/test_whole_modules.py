"""What is trained whole beside the rows: saved with them, read with them, and put back."""

from __future__ import annotations

import json

import peft
import pytest
import torch

import loki_kernels as loki
from tests.models import assert_unchanged, build_model, snapshot
from tests.tiny_training import ROWS, load_model, logits, train

TIED = "llama_mlp_bias"


@pytest.fixture(params=["llama", TIED])
def trained(request, tmp_path):
    """A base's folder and a checkpoint's, a trained model, and its handle."""
    model = build_model(request.param)
    model.save_pretrained(tmp_path / "base")
    handle = loki.patch(model, ROWS, modules_to_save=["embed_tokens"])
    train(model)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path, model, handle


def test_a_checkpoint_goes_on_with_them(trained):
    folder, model, _ = trained
    base = load_model(folder / "base")
    again = loki.patch(base, folder / "checkpoint")
    assert again.report.whole == {"model.embed_tokens": "float32"}
    torch.testing.assert_close(logits(base), logits(model), rtol=0, atol=0)
    train(base)
    train(model)
    torch.testing.assert_close(logits(base), logits(model))
    model.save_pretrained(folder / "checkpoint")
    other = load_model(folder / "base")
    handle = loki.patch(other, ROWS, modules_to_save=["embed_tokens"])
    handle.load_state(folder / "checkpoint")
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)


def test_a_checkpoint_is_merged_with_them(trained):
    folder, model, _ = trained
    merged = loki.load_adapter(load_model(folder / "base"), folder / "checkpoint").merge()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=0)


def test_unpatching_puts_back_the_base_whatever_was_read_last(trained):
    folder, model, _ = trained
    train(model)
    loki.save_adapter(model, folder / "later")
    base = load_model(folder / "base")
    want = snapshot(base)
    again = loki.patch(base, folder / "checkpoint")
    again.load_state(folder / "later")
    torch.testing.assert_close(logits(base), logits(model), rtol=0, atol=0)
    again.unpatch()
    assert_unchanged(base, want)


def test_a_model_that_trains_others_is_refused(trained):
    folder, _, _ = trained
    base = load_model(folder / "base")
    want = snapshot(base)
    with (
        loki.patch(base, ROWS) as handle,
        pytest.raises(ValueError, match=r"has .*embed_tokens.weight, .* trains nothing"),
    ):
        handle.load_state(folder / "checkpoint")
    assert_unchanged(base, want)
    with pytest.raises(ValueError, match=r"trains model.embed_tokens.weight, model.norm.weight"):
        loki.patch(base, folder / "checkpoint", modules_to_save=["model.norm"])
    assert_unchanged(base, want)


@pytest.mark.parametrize("how", ["adapter", "checkpoint"])
def test_unpatching_puts_back_what_was_read(trained, how):
    folder, model, _ = trained
    loki.save_adapter(model, folder / "adapter")
    base = load_model(folder / "base")
    want = snapshot(base)
    handle = loki.load_adapter(base, folder / how)
    torch.testing.assert_close(logits(base), logits(model))
    handle.unpatch()
    assert_unchanged(base, want)


def test_drift_of_an_adapter_leaves_the_base(trained):
    folder, model, _ = trained
    loki.save_adapter(model, folder / "adapter")
    base = load_model(folder / "base")
    want = snapshot(base)
    texts = [{"input_ids": list(range(3, 40))}]
    result = loki.drift(base, folder / "adapter", texts)
    assert result.overall.kl > 0
    assert_unchanged(base, want)
    # the base's logits are of its own head, which the adapter's values lie in meanwhile
    side_by_side = loki.drift(load_model(folder / "base"), model, texts)
    torch.testing.assert_close(result.token_kl, side_by_side.token_kl)
    config = folder / "adapter" / "adapter_config.json"  # which says nothing of a bias alone
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": None}))
    result = loki.drift(base, folder / "adapter", texts)
    torch.testing.assert_close(result.token_kl, side_by_side.token_kl)


def test_tied_weights_have_any_of_their_names(tmp_path):
    """PEFT saves the embedding and the head of a vocabulary that was resized."""
    peft = pytest.importorskip("peft")
    from loki_kernels.peft import LokiConfig

    base = build_model(TIED)
    base.name_or_path = "its"  # PEFT reads the vocabulary's size there
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(load_model(tmp_path / "base"), LokiConfig(rows=ROWS))
    train(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    again = load_model(tmp_path / "base")
    want = snapshot(again)
    loaded = loki.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model))
    loaded.unpatch()
    assert_unchanged(again, want)


def test_a_lora_of_them_gives_the_trained_logits(trained):
    """Of a tied embedding PEFT would copy one of the two, and the head would be the base's."""
    folder, model, _ = trained
    loki.export_lora(model, folder / "lora")
    exported = peft.PeftModel.from_pretrained(load_model(folder / "base"), str(folder / "lora"))
    torch.testing.assert_close(logits(exported), logits(model), rtol=1e-4, atol=1e-4)
