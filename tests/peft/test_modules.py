"""What is trained beside the rows: heads, whole modules, embeddings of new tokens."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import loki_kernels as loki
from loki_kernels.peft import LokiConfig, LokiLayer
from tests.models import ARCHITECTURES, DEVICE, build_model, to_device
from tests.tiny_training import ROWS, load_model, logits, token_batch, train


def classifier():
    torch.manual_seed(0)
    config = ARCHITECTURES["llama"]()
    config.pad_token_id, config.num_labels = 0, 3
    return AutoModelForSequenceClassification.from_config(config).to(DEVICE)


def train_classifier(model):
    return train(model, input_ids=token_batch(4), labels=to_device(torch.tensor([0, 1, 2, 0])))


def classifier_with_another_head():
    """The same base, as a user has it when an adapter is loaded."""
    model = classifier()
    torch.nn.init.ones_(model.score.weight)
    return model


def trained_names(model):
    return {n.removeprefix("base_model.model.") for n, p in model.named_parameters()
            if p.requires_grad}  # fmt: skip


def test_a_new_head_is_trained_and_saved(tmp_path):
    model = peft.get_peft_model(classifier(), LokiConfig(rows=ROWS, task_type="SEQ_CLS"))
    updates = {f"model.layers.{i}.mlp.down_proj.loki_update.default" for i in range(3)}
    assert trained_names(model) == updates | {"score.modules_to_save.default.weight"}
    want = logits(train_classifier(model))
    assert not torch.equal(want, logits(classifier()))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(classifier_with_another_head(), str(tmp_path))
    assert torch.equal(logits(again), want)
    handle = loki.load_adapter(classifier_with_another_head(), tmp_path)
    torch.testing.assert_close(logits(handle.model), want)
    torch.testing.assert_close(logits(again.merge_and_unload()), want)


@pytest.mark.parametrize(("kind", "task", "head"), [
    ("TokenClassification", "TOKEN_CLS", "score"),
    ("QuestionAnswering", "QUESTION_ANS", "qa_outputs"),
])  # fmt: skip
def test_other_heads_are_trained_and_saved(kind, task, head, tmp_path):
    def made():
        torch.manual_seed(0)
        make = getattr(transformers, f"AutoModelFor{kind}")
        return make.from_config(ARCHITECTURES["llama"]()).to(DEVICE).eval()

    model = peft.get_peft_model(made(), LokiConfig(rows=ROWS, task_type=task))
    names = trained_names(model)
    assert {n for n in names if head in n} == {
        f"{head}.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    assert len(names) == 3 + 2
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(made(), str(tmp_path))
    outputs = (m.eval()(input_ids=token_batch(2)).to_tuple() for m in (again, model))
    for got, want in zip(*outputs, strict=True):
        assert torch.equal(got, want)


def test_reads_the_head_that_save_adapter_wrote(tmp_path):
    model = classifier()
    loki.patch(model, ROWS)
    want = logits(train_classifier(model))
    loki.save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(classifier_with_another_head(), str(tmp_path))
    torch.testing.assert_close(logits(again), want)


def test_a_head_without_its_task_is_refused():
    model = classifier()
    with pytest.raises(ValueError, match="task_type='SEQ_CLS'"):
        peft.get_peft_model(model, LokiConfig(rows=ROWS))
    assert not any(isinstance(module, LokiLayer) for module in model.modules())


def test_whole_modules(tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    config = LokiConfig(rows=ROWS, modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(load_model(tmp_path / "base"), config)
    want = logits(train(model))
    model.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), folder)
    assert torch.equal(logits(again), want)
    handle = loki.load_adapter(load_model(tmp_path / "base"), folder)
    torch.testing.assert_close(logits(handle.model), want)
    model.add_adapter("other", LokiConfig(rows=ROWS, modules_to_save=["lm_head"]))
    assert torch.equal(logits(model), want)
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(build_model()))
    model.set_adapter("default")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want)
    assert merged.state_dict().keys() == build_model().state_dict().keys()


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        ("llama", ["nothing"], "names 'nothing', which the model lacks"),
        ("llama", ["mlp"], "holds model.layers.0.mlp.down_proj; its rows are trained"),
        ("llama", "lm_head", "must be a list of names"),
        ("tied", ["embed_tokens"], "whose weight is lm_head.weight too"),
    ],
)
def test_modules_that_peft_would_leave_out(model, names, message):
    base = tied_model() if model == "tied" else build_model(model)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, LokiConfig(rows=ROWS, modules_to_save=names))
    assert not any(isinstance(module, LokiLayer) for module in base.modules())


def tied_model():
    torch.manual_seed(0)
    config = ARCHITECTURES["llama"]()
    config.tie_word_embeddings = True
    return AutoModelForCausalLM.from_config(config).to(DEVICE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("resized_base", [False, True])
def test_new_tokens(tmp_path, tied, resized_base):
    """Of a vocabulary that is resized in memory, or before the base is saved."""

    def load():
        model = load_model(tmp_path / "base")
        torch.manual_seed(0)
        model.resize_token_embeddings(100)
        return model

    base = tied_model() if tied else build_model()
    if resized_base:
        base.resize_token_embeddings(100)
    base.save_pretrained(tmp_path / "base")
    before = load()
    model = peft.get_peft_model(load(), LokiConfig(rows=ROWS, trainable_token_indices=[96, 97, 98]))
    batch = token_batch(4)
    batch[:, 3], batch[:, 5] = 97, 98
    train(model, input_ids=batch, labels=batch)
    with torch.no_grad():
        want = model.eval()(input_ids=batch).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=batch).logits, want)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=batch).logits, want)
    old, new = (m.get_input_embeddings().weight.detach() for m in (before, merged))
    assert (old != new).any(1).nonzero().flatten().tolist() == [96, 97, 98]
    if tied:
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with pytest.raises(ValueError, match="embeddings of single tokens"):
        loki.load_adapter(load(), tmp_path / "adapter")


BESIDE = [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": list(range(50))}]


@pytest.mark.parametrize("other", [None, {"rows": [[2], [9], [8]], "modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("second", [{}, *BESIDE])
@pytest.mark.parametrize("first", BESIDE)
def test_what_is_trained_beside_the_rows_is_replaced_with_them(first, second, other):
    """A sweep's second round on one base starts from that base, also where others have a head."""
    old = version.parse(peft.__version__) < version.parse("0.19")
    if old and other is not None and "modules_to_save" not in first:
        pytest.skip("PEFT 0.18 wraps no base in which there is a head and none of them is active")

    def run(*rounds):
        base, names = build_model(), set()
        for options in rounds:
            model = peft.get_peft_model(base, LokiConfig(rows=ROWS, **options))
            names = trained_names(model)
            train(model)
            if other is not None and "other" not in model.peft_config:
                model.add_adapter("other", LokiConfig(**other))
        return names, logits(model)

    names, got = run(first, second)
    want_names, want = run(second)
    assert names == want_names
    torch.testing.assert_close(got, want)


def test_tokens_of_an_embedding_that_is_named(tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    config = LokiConfig(rows=ROWS, trainable_token_indices={"embed_tokens": [5, 9]})
    model = peft.get_peft_model(load_model(tmp_path / "base"), config)
    want = logits(train(model))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), want)
    moved = merged.model.embed_tokens.weight != build_model().model.embed_tokens.weight
    assert set(moved.any(1).nonzero().flatten().tolist()) <= {5, 9}
    assert moved.any()


def test_a_resized_vocabulary_trained_whole(tmp_path):
    """PEFT saves each embedding three times then."""
    build_model().save_pretrained(tmp_path / "base")

    def load():
        model = load_model(tmp_path / "base")
        model.resize_token_embeddings(100)
        return model

    config = LokiConfig(rows=ROWS, modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(load(), config)
    want = logits(train(model))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), want)
    handle = loki.load_adapter(load(), tmp_path / "adapter")
    torch.testing.assert_close(logits(handle.model), want)
