"""TRL's trainers around a patched model and around a PEFT adapter.

GRPO's vLLM is a stand-in that keeps the model of the base checkpoint, takes what it is sent by
name, and answers from it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import loki_kernels as loki
from loki_kernels.peft import LokiConfig
from tests.models import DEVICE
from tests.tiny_training import (
    ROWS,
    SMALL_BATCHES,
    WAYS,
    assert_ordinary,
    load_model,
    logits,
    protection_file,
    tiny_trainer,
    train,
)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.02, "report_to": "none",
    "use_cpu": DEVICE.type == "cpu", "disable_tqdm": True, "bf16": False, "save_strategy": "no",
}  # fmt: skip


class Served:
    """What TRL uses of ``vllm.LLM``."""

    def __init__(self, model, **_):
        self.net = AutoModelForCausalLM.from_pretrained(model).to(DEVICE)
        self.own = dict(self.net.named_parameters())  # tied ones once
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        self.sent = []

    def load_weights(self, weights):
        for name, tensor in weights:
            self.own[name].data.copy_(tensor)  # KeyError for a name that it does not know
            self.sent.append(name)

    def reset_prefix_cache(self):
        assert set(self.sent) == set(self.own)
        self.sent = []

    def generate(self, prompts, sampling_params, use_tqdm):
        return [self.answer(prompt["prompt_token_ids"]) for prompt in prompts]

    @torch.no_grad()
    def answer(self, prompt):
        ids = torch.tensor([prompt], device=DEVICE)
        made = self.net.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=True)
        logprobs = self.net(made).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        tokens = made[0, len(prompt) :].tolist()
        said = [
            {token: SimpleNamespace(rank=1, logprob=float(logprobs[i, token]))}
            for i, token in enumerate(tokens)
        ]
        completion = SimpleNamespace(token_ids=tokens, logprobs=said)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[completion])


@pytest.fixture
def vllm(monkeypatch):
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Served, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets them
        monkeypatch.delenv(name)


CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} w9 {{ m.content }} w8 "
    "{% endgeneration %}{% else %} w7 {{ m.content }}{% endif %}{% endfor %}"
)
WORDS = [" ".join(f"w{3 * i + j}" for j in range(4 + i)) for i in range(8)]
EMBEDDINGS = ["embed_tokens", "lm_head"]
CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": SMALL_BATCHES,
}
NEW_WORDS = {"text": ["w1 <|new|> <|newer|> w3"] * 8}
PAIRS = {"prompt": ["w1 w2"] * 8, "chosen": WORDS, "rejected": WORDS[::-1]}


def start(way, folder, kind=AutoModelForCausalLM, **config):
    """(what a trainer takes as model, its other arguments) of a model to be trained in ROWS."""
    options = {"num_labels": 1} if "Sequence" in kind.__name__ else {}
    model = kind.from_pretrained(folder, **options).to(DEVICE)
    protect = protection_file(folder) if "protected" in way else None
    if way.startswith("patch"):
        loki.patch(model, ROWS, protect=protect)
        return model, {}
    return model, {"peft_config": LokiConfig(rows=ROWS, protect=protect, **config)}


def assert_rows_trained(way, trainer, base_folder, out):
    trainer.save_model(str(out))
    assert_ordinary(way, out, base_folder)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft_trainer(model, tokenizer, folder, records, peft_config=None, **options):
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=str(folder), max_length=32, **options, **COMMON),
        train_dataset=datasets.Dataset.from_dict(records),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def sft(way, base_folder, tmp_path, records, **options):
    model, arguments = start(way, base_folder)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = CHAT
    trainer = sft_trainer(model, tokenizer, tmp_path, records, **arguments, **options)
    trainer.train()
    assert_rows_trained(way, trainer, base_folder, tmp_path / "out")
    return trainer


@pytest.mark.parametrize("way", WAYS)
def test_sft_with_packing(way, base_folder, tmp_path):
    trainer = sft(way, base_folder, tmp_path, {"text": WORDS}, packing=True)
    assert len(trainer.train_dataset) < len(WORDS)


@pytest.mark.parametrize("way", WAYS)
def test_sft_with_assistant_only_loss(way, base_folder, tmp_path):
    chats = [
        [{"role": "user", "content": w}, {"role": "assistant", "content": "w3 w4"}] for w in WORDS
    ]
    trainer = sft(way, base_folder, tmp_path, {"messages": chats}, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum() == 4 * len(batch["labels"])  # w9 w3 w4 w8


@pytest.fixture
def template(base_folder, tmp_path):
    """A folder of the base's tokenizer with a chat template and two more tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = CHAT
    tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    tokenizer.save_pretrained(tmp_path / "template")
    return str(tmp_path / "template")


def tied_model(base_folder):
    config = AutoConfig.from_pretrained(base_folder, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE)
    model.name_or_path = str(base_folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_template_is_cloned_before_patching(tied, template, base_folder, tmp_path):
    """What TRL adds after it would stay frozen."""
    load = tied_model if tied else load_model
    model, tokenizer = load(base_folder), AutoTokenizer.from_pretrained(base_folder)
    loki.patch(model, ROWS)
    trainer = sft_trainer(model, tokenizer, tmp_path, NEW_WORDS, chat_template_path=template)
    with pytest.raises(RuntimeError, match="were added after"):
        trainer.train()
    model, tokenizer = load(base_folder), AutoTokenizer.from_pretrained(base_folder)
    protection = loki.estimate_protection(model, tokenizer=tokenizer, samples=2)
    model, tokenizer, added = trl.clone_chat_template(model, tokenizer, template)
    modules = ["embed_tokens"] if tied else EMBEDDINGS
    loki.patch(model, ROWS, protect=protection, modules_to_save=modules)
    before = model.lm_head.weight.detach().clone()
    sft_trainer(model, tokenizer, tmp_path, NEW_WORDS, chat_template_path=template).train()
    assert model.model.embed_tokens.weight.requires_grad
    assert (model.lm_head.weight != before).any(1)[added].all()


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_clones_a_template(tied, template, base_folder, tmp_path):
    """TRL has the new tokens and ``lm_head`` trained, which is refused where that is tied."""
    model = tied_model(base_folder) if tied else load_model(base_folder)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    options = {"chat_template_path": template, "peft_config": LokiConfig(rows=ROWS)}
    if tied:
        with pytest.raises(ValueError, match=r"lm_head.* trl\.clone_chat_template"):
            sft_trainer(model, tokenizer, tmp_path, NEW_WORDS, **options)
        return
    trainer = sft_trainer(model, tokenizer, tmp_path, NEW_WORDS, **options)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    kinds = ("loki_update", "trainable_tokens", "lm_head")
    assert [sum(kind in name for name in before) for kind in kinds] == [len(ROWS), 1, 1]
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all((now[name] != was).any() for name, was in before.items())


@pytest.mark.parametrize("reference", ["loaded by TRL", "given", "of a loaded adapter"])
@pytest.mark.parametrize("way", WAYS)
def test_dpo(way, reference, base_folder, tmp_path):
    model, arguments = start(way, base_folder)
    if reference == "given":
        arguments["ref_model"] = load_model(base_folder)
    elif reference == "of a loaded adapter":  # TRL adds a second one, "ref"
        if way.startswith("patch"):
            pytest.skip("PEFT's way alone")
        model = get_peft_model(model, arguments.pop("peft_config"))
        for name, parameter in model.named_parameters():  # as another training has left it
            if "loki_update" in name:
                parameter.data.normal_(std=0.05)
    config = trl.DPOConfig(output_dir=str(tmp_path), logging_steps=1, **COMMON)
    pairs = datasets.Dataset.from_dict(PAIRS)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    trainer = trl.DPOTrainer(
        model, args=config, train_dataset=pairs, processing_class=tokenizer, **arguments
    )
    trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-4)  # model and reference are one at first
    assert second != pytest.approx(first, abs=1e-4)
    assert_rows_trained(way, trainer, base_folder, tmp_path / "out")


@pytest.mark.parametrize("base", ["the checkpoint", "the base"])
def test_a_second_stage_has_its_base_for_reference(base, base_folder, tmp_path):
    """TRL loads it by the model's name."""
    model, _ = start("patch", base_folder)
    train(model).save_pretrained(tmp_path / "sft")
    if base == "the checkpoint":
        model = load_model(tmp_path / "sft")
        loki.patch(model, ROWS)
    else:
        model = load_model(base_folder)
        loki.patch(model, tmp_path / "sft")
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(tmp_path), logging_steps=1, **COMMON),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    trainer.train()
    alike = losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert alike == (base == "the checkpoint")


@pytest.mark.parametrize("way", WAYS)
def test_reward(way, base_folder, tmp_path):
    kind = AutoModelForSequenceClassification
    model, arguments = start(way, base_folder, kind, task_type="SEQ_CLS")
    config = trl.RewardConfig(output_dir=str(tmp_path), **COMMON)
    trainer = trl.RewardTrainer(
        model,
        args=config,
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
        **arguments,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved - {n for n in moved if n.endswith("down_proj.weight")} == trained
    assert sum("update" in name for name in trained) == len(ROWS)
    assert sum("score" in name for name in trained) == 1
    trainer.save_model(str(tmp_path / "out"))
    again = kind.from_pretrained(tmp_path / "out", num_labels=1).to(DEVICE).eval()
    ids = torch.tensor([[1, 2, 3]], device=DEVICE)
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


def grpo(model, folder, use_vllm, more=None, **options):
    arguments = trl.GRPOConfig(
        output_dir=str(folder), num_generations=4, max_completion_length=4, use_vllm=use_vllm,
        vllm_mode="colocate", logging_steps=1, **{**COMMON, **(more or {})},
    )  # fmt: skip
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"w{i} w2 w3" for i in range(4)]}),
        **options,
    )


def test_grpo_serves_the_merged_weights_of_an_adapter(base_folder, tmp_path, vllm):
    trainer = grpo(load_model(base_folder), tmp_path, True, peft_config=LokiConfig(rows=ROWS))
    trainer.train()
    apart = [
        entry["sampling/sampling_logp_difference/max"]
        for entry in trainer.state.log_history
        if "sampling/sampling_logp_difference/max" in entry
    ]
    assert len(apart) == COMMON["max_steps"]
    assert max(apart) < 1e-4  # the server answers as the model that trains does
    trainer.vllm_generation.sync_weights()
    served = trainer.vllm_generation.llm.net
    trainer.save_model(str(tmp_path))
    want = PeftModel.from_pretrained(load_model(base_folder), tmp_path).merge_and_unload()
    for (name, got), expected in zip(served.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(got, expected), name
    base = load_model(base_folder).model.layers[0].mlp.down_proj.weight
    changed = (want.model.layers[0].mlp.down_proj.weight != base).any(1)
    assert changed.nonzero().flatten().tolist() == ROWS[0]


def test_grpo_does_not_serve_a_patched_model(base_folder, tmp_path, vllm):
    """The callback says so before vLLM starts; without it vLLM does not know the update."""
    model = load_model(base_folder)
    handle = loki.patch(model, ROWS)
    with pytest.raises(RuntimeError, match=r"peft_config=loki_kernels\.peft\.LokiConfig"):
        grpo(model, tmp_path, True, callbacks=[handle.trainer_callback()])
    with pytest.raises(KeyError, match=r"mlp\.down_proj\.update"):
        grpo(model, tmp_path, True).train()


@pytest.mark.parametrize("rank", [None, 2])
def test_merged_parameters_are_what_a_server_loads(rank, base_folder, tmp_path):
    """After a step, before the forward pass that would write it into the weights."""
    model = load_model(base_folder)
    handle = loki.patch(model, ROWS, rank=rank)
    train(model, steps=1)
    served = load_model(base_folder)
    own = dict(served.named_parameters())
    for name, tensor in handle.merged_parameters():
        own.pop(name).data.copy_(tensor)
    assert not own
    assert torch.equal(logits(served), logits(handle.merge()))
    with pytest.raises(RuntimeError, match="no longer patched"):
        handle.merged_parameters()


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ("patch", RuntimeError, "sync_ref_model=True copies parameters one by one"),
        ("peft", (ValueError, NotImplementedError), "sync_ref_model.*PEFT"),  # by TRL's version
    ],
)
def test_sync_ref_model_is_refused(way, error, message, base_folder, tmp_path):
    """By this library, and with an adapter by TRL itself."""
    model = load_model(base_folder)
    options = {"peft_config": LokiConfig(rows=ROWS)}
    if way == "patch":
        options = {"callbacks": [loki.patch(model, ROWS).trainer_callback()]}
    with pytest.raises(error, match=message):
        grpo(model, tmp_path, False, {"sync_ref_model": True, "beta": 0.1}, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sync_ref_model", True), ("teacher_model_kind", "ema"), ("use_vllm", True)],
)
def test_what_is_refused_is_refused_of_a_callback_that_is_added_later(
    option, value, base_folder, tmp_path
):
    """`on_init_end` has been called by then; SDPO's and SDFT's teacher is an average too."""
    model = load_model(base_folder)
    callback = loki.patch(model, ROWS).trainer_callback()
    trainer = grpo(model, tmp_path, False)
    trainer.add_callback(callback)
    setattr(trainer.args, option, value)
    with pytest.raises(RuntimeError, match=option):
        trainer.train()


def test_an_average_beside_the_model_is_refused(base_folder, tmp_path):
    """By torch: `BEMACallback` reads the state dict into a model of its class that has no rows."""
    callback = trl.BEMACallback(device=str(DEVICE))
    model = load_model(base_folder)
    own = loki.patch(model, ROWS).trainer_callback()
    trainer = tiny_trainer(model, tmp_path, 1, [own, callback])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*down_proj\.update"):
        trainer.train()


@pytest.mark.parametrize("way", WAYS)
def test_grpo_without_a_server(way, base_folder, tmp_path):
    """The model that trains answers by itself."""
    model, arguments = start(way, base_folder)
    trainer = grpo(model, tmp_path, False, **arguments)
    trainer.train()
    assert_rows_trained(way, trainer, base_folder, tmp_path / "out")


@pytest.mark.parametrize("way", WAYS)
def test_grpo_with_continuous_batching(way, base_folder, tmp_path):
    model, arguments = start(way, base_folder)
    trainer = grpo(model, tmp_path, False, CONTINUOUS, **arguments)
    trainer.train()
    own = [p for n, p in trainer.model.named_parameters() if "update" in n]
    assert {p.dtype for p in own} == {torch.float32}
    assert_rows_trained(way, trainer, base_folder, tmp_path / "out")


def test_continuous_batching_does_not_round_the_update(base_folder, tmp_path):
    """TRL makes the model 16 bits before each generation, of whichever it is asked to train in."""
    model = load_model(base_folder)
    callbacks = [loki.patch(model, ROWS).trainer_callback()]
    with pytest.raises(RuntimeError, match="continuous_batching and bf16 or fp16"):
        grpo(model, tmp_path, False, {**CONTINUOUS, "bf16": True}, callbacks=callbacks)
    grpo(model, tmp_path, False, {"bf16": True}, callbacks=callbacks)
