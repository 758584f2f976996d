"""`loki.drift` against a naive computation, its files, and its callback."""

from __future__ import annotations

import copy
import json
import math
import weakref
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
import transformers
from accelerate import dispatch_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import WhitespaceSplit

import loki_kernels as loki
from loki_kernels.attribution.prompts import tokenize_prompts
from loki_kernels.cli import main
from loki_kernels.errors import UnsupportedModelError
from loki_kernels.forgetting import measure, meter, models
from loki_kernels.forgetting import result as forgetting_result
from loki_kernels.forgetting.texts import encode, read_texts
from loki_kernels.peft import LokiConfig
from loki_kernels.peft import layer as layer_module
from loki_kernels.training import adapter_file
from loki_kernels.training import rows as rows_module
from tests.architectures import falcon_h1
from tests.models import assert_unchanged, build_model, save_base, snapshot
from tests.tiny_tokenizers import bos_tokenizer, chat_tokenizer
from tests.tiny_training import ROWS, WordTokenizer, load_model, tiny_trainer, train
from tests.zoo.build import build

LENGTHS = (1, 7, 13, 4, 30)


def texts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(0, 97, (n,), generator=generator), "domain": "ab"[i % 2]}
        for i, n in enumerate(lengths)
    ]


def moved(model, scale=0.05):
    """A copy with noise on every weight."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * noise).to(parameter))
    return other


def move(model, by=0.05):
    """Move the rows that a patched model trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def naive(base, tuned, records):
    """(KL of each record's tokens, negative log-likelihoods before, after), in float64."""
    kl, nll = [], ([], [])
    for record in records:
        ids = record["input_ids"].to(base.device)[None]
        with torch.no_grad():
            before, after = (m(ids).logits[0].double().log_softmax(-1) for m in (base, tuned))
        kl.append((before.exp() * (before - after)).sum(-1).cpu())
        for values, log_p in zip(nll, (before, after), strict=True):
            values += (-log_p[:-1].gather(1, ids[0, 1:, None])).flatten().tolist()
    return kl, *nll


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "gpt_neox", "mistral"])
@pytest.mark.parametrize("logits", [2**24, 97 * 5])
def test_equals_a_naive_computation(name, logits, monkeypatch):
    monkeypatch.setattr(measure, "LOGITS", logits)
    base = build_model(name)
    tuned = moved(base)
    result = loki.drift(base, tuned, texts())
    wide = [copy.deepcopy(model).double() for model in (base, tuned)]
    kl, before, after = naive(*wide, texts())
    got = result.token_kl.double()
    torch.testing.assert_close(got.sort().values, torch.cat(kl).sort().values, atol=1e-5, rtol=1e-5)
    assert result.overall.tokens == sum(LENGTHS)
    assert result.overall.kl == pytest.approx(float(torch.cat(kl).mean()), abs=1e-5)
    for perplexity, nll in (
        (result.overall.perplexity_before, before),
        (result.overall.perplexity_after, after),
    ):
        assert perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    of_b = torch.cat([kl[1], kl[3]])
    assert {g.name: g.kl for g in result.domains}["b"] == pytest.approx(float(of_b.mean()), 1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "HyperCLOVAXForCausalLM",  # multiplies by logits_scaling
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        "MiniCPM3ForCausalLM",  # divides what enters the head
        "GraniteForCausalLM",  # divides
    ],
)
def test_logits_are_scaled_as_the_family_does_it(name, monkeypatch):
    """The config says by how much and not how; with the right scale the head alone is enough."""
    if not hasattr(transformers, name):
        pytest.skip("this transformers does not have it")
    monkeypatch.setattr(meter, "compare_whole", None)
    base = build(name)
    tuned = moved(base)
    got = loki.drift(base, tuned, texts())
    kl, _, _ = naive(base, tuned, texts())
    torch.testing.assert_close(
        got.token_kl.sort().values, torch.cat(kl).sort().values.float(), rtol=1e-3, atol=1e-5
    )
    assert got.overall.kl > 1e-4


def naive_positions(base, tuned, records):
    """All of them, the one that moved most first, as `MovedPosition` tells of them."""
    found = []
    for record, kl in zip(records, naive(base, tuned, records)[0], strict=True):
        ids = record["input_ids"]
        with torch.no_grad():
            p, q = (m(ids.to(m.device)[None]).logits[0].softmax(-1).cpu() for m in (base, tuned))
        for i, distance in enumerate(kl.tolist()):
            target = int(ids[i + 1]) if i + 1 < len(ids) else None
            probabilities = [math.nan if target is None else float(x[i, target]) for x in (p, q)]
            found.append(
                {
                    "domain": record["domain"],
                    "context": " ".join(map(str, ids[: i + 1][-24:].tolist())),
                    "kl": distance,
                    "likeliest_before": str(int(p[i].argmax())),
                    "likeliest_after": str(int(q[i].argmax())),
                    "token": None if target is None else str(target),
                    "probability_before": probabilities[0],
                    "probability_after": probabilities[1],
                }
            )
    return sorted(found, key=lambda position: -position["kl"])


def test_what_moved_most_is_what_a_naive_computation_finds(monkeypatch):
    monkeypatch.setattr(forgetting_result, "_TOP", 40)
    base = build_model("gemma2")
    tuned = moved(base)
    records = texts()
    for number, record in enumerate(records):  # two that begin alike would tie
        record["input_ids"][0] = number
    result = loki.drift(base, tuned, records)
    wide = [copy.deepcopy(model).double() for model in (base, tuned)]
    want = naive_positions(*wide, records)
    assert len(result.positions) == 40
    for got, expected in zip(result.positions, want, strict=False):
        for name, value in expected.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-3, nan_ok=True)
            assert getattr(got, name) == value, name
    assert any(position.token is None for position in result.positions)
    assert any(p.likeliest_before != p.likeliest_after for p in result.positions)

    of_texts = [float(kl.mean()) for kl in naive(*wide, records)[0]]
    order = sorted(range(len(LENGTHS)), key=lambda i: -of_texts[i])
    assert [text.tokens for text in result.texts] == [LENGTHS[i] for i in order]
    assert [text.domain for text in result.texts] == ["ab"[i % 2] for i in order]
    assert [text.kl for text in result.texts] == pytest.approx([of_texts[i] for i in order], 1e-3)

    assert result.quantiles["1"] == float(result.token_kl.max())
    tokens = [position["kl"] for position in want]
    assert result.quantiles["0.5"] == pytest.approx(sorted(tokens)[len(tokens) // 2], rel=1e-3)
    assert list(result.quantiles.values()) == sorted(result.quantiles.values())


def test_the_errors_are_those_of_a_ratio_over_texts():
    base = build_model()
    result = loki.drift(base, moved(base), texts())
    sums = torch.tensor([float(x.sum()) for x in naive(base, moved(base), texts())[0]])
    counts = torch.tensor(LENGTHS, dtype=torch.float32)
    spread = (sums - sums.sum() / counts.sum() * counts).square().sum() * 5 / 4
    assert result.overall.kl_error == pytest.approx(float(spread.sqrt() / counts.sum()), rel=1e-3)
    assert math.isnan(loki.drift(base, moved(base), texts((9,))).overall.kl_error)


def test_bfloat16_is_as_near_as_plain_torch():
    base = build_model().double()
    tuned = moved(base)
    want = torch.cat(naive(base, tuned, texts())[0]).mean()
    small = [copy.deepcopy(model).bfloat16() for model in (base, tuned)]
    peer = torch.cat(naive(*small, texts())[0]).mean()
    got = loki.drift(*small, texts()).overall.kl
    assert abs(got - want) <= 2 * abs(peer - want) + 1e-3 * want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equal_models_have_not_moved_at_all(name, dtype):
    base = build_model(name, dtype)
    result = loki.drift(base, copy.deepcopy(base), texts())
    assert not result.token_kl.any()
    assert result.overall.perplexity_before == result.overall.perplexity_after


def test_chunks_of_a_long_text_predict_the_token_after_them():
    base = build_model()
    tuned = moved(base)
    long = torch.arange(23) * 7 % 97
    got = loki.drift(base, tuned, [{"input_ids": long}], length=10)
    parts = [{"input_ids": long[:10]}, {"input_ids": long[10:20]}, {"input_ids": long[20:]}]
    kl = torch.cat(naive(base, tuned, parts)[0])
    torch.testing.assert_close(got.token_kl.double(), kl.double(), atol=1e-5, rtol=1e-4)
    nll = []
    for part, following in zip(parts, (long[10:11], long[20:21], long[:0]), strict=True):
        log_p = base(part["input_ids"][None]).logits[0].double().log_softmax(-1)
        target = torch.cat([part["input_ids"][1:], following])
        nll.append(-log_p.detach()[: len(target)].gather(1, target[:, None]))
    want = float(torch.cat(nll).mean().exp())
    assert got.overall.perplexity_before == pytest.approx(want, rel=1e-4)


def test_every_chunk_begins_as_the_tokenizer_begins_a_text():
    """Gemma knows no text without it. Of token ids, and of other texts, there is no telling."""
    base = build_model()
    tuned = moved(base)
    words = [f"w{7 * i % 90 + 3}" for i in range(22)]
    one, two = bos_tokenizer(), " ".join(words)
    ids = torch.tensor([1, *(int(word[1:]) for word in words)])
    got = loki.drift(base, tuned, [two], tokenizer=one, length=10)
    parts = [ids[:10], torch.cat([ids[:1], ids[10:19]]), torch.cat([ids[:1], ids[19:]])]
    first, *others = naive(base, tuned, [{"input_ids": part} for part in parts])[0]
    want = torch.cat([first, *(kl[1:] for kl in others)])
    torch.testing.assert_close(got.token_kl.double(), want.double(), atol=1e-5, rtol=1e-4)
    bare = loki.drift(base, tuned, [{"input_ids": ids[1:]}], tokenizer=one, length=10)
    kl = naive(base, tuned, [{"input_ids": part} for part in ids[1:].split(10)])[0]
    torch.testing.assert_close(bare.token_kl.double(), torch.cat(kl).double(), atol=1e-5, rtol=1e-4)


def test_what_all_texts_begin_with_is_read_and_not_measured():
    base = build_model()
    tuned = moved(base)
    start, ends = [7, 8, 9, 10, 11], ([20, 21], [30, 31, 32], [20, 40])
    records = [{"input_ids": torch.tensor(start + end)} for end in ends]
    kl = naive(base, tuned, records)[0]
    want = torch.cat([values[5:] for values in kl])
    got = loki.drift(base, tuned, records)
    torch.testing.assert_close(got.token_kl.double(), want, atol=1e-5, rtol=1e-4)
    assert got.texts[0].tokens in (2, 3)
    assert {text.excerpt for text in got.texts} == {"20 21", "30 31 32", "20 40"}
    assert {token.context for token in got.positions} >= {"20", "30 31"}
    chunked = loki.drift(base, tuned, records, length=4)  # the first chunk is not read at all
    assert [text.tokens for text in chunked.texts].count(2) == 2
    assert loki.drift(base, tuned, [*records, records[0]], tokens=19).left_out == 2
    twice = loki.drift(base, tuned, [records[0], records[0]])  # one text alone has it measured
    assert twice.overall.tokens == 14


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_text(side):
    """As ``tokenizer(text, padding="max_length")`` leaves it in a data set."""
    base = build_model()
    tuned, records = moved(base), texts()
    longest = max(len(record["input_ids"]) for record in records)
    padded = []
    for record in records:
        missing = longest - len(record["input_ids"])
        width = (missing, 0) if side == "left" else (0, missing)
        mask = torch.ones_like(record["input_ids"])
        beside = {"input_ids": record["input_ids"], "attention_mask": mask}
        pads = {name: torch.nn.functional.pad(x, width) for name, x in beside.items()}
        padded.append({**record, **pads})
    want, got = (loki.drift(base, tuned, given).token_kl for given in (records, padded))
    assert torch.equal(got, want)


def test_other_columns_of_a_data_set_are_passed_over():
    """As TRL leaves them, in torch's format."""
    base = build_model()
    tuned, records = moved(base), texts()
    beside = [
        {**r, "completion_mask": torch.ones_like(r["input_ids"]), "idx": torch.tensor(3)}
        for r in records
    ]
    want, got = (loki.drift(base, tuned, given).token_kl for given in (records, beside))
    assert torch.equal(got, want)


def test_images_are_refused():
    record = {"input_ids": [1, 2, 3], "pixel_values": torch.ones(1, 3, 4, 4)}
    with pytest.raises(ValueError, match="text 0 has images or sounds"):
        loki.drift(build_model(), build_model(), [record])


def test_what_a_chat_shows_is_not_fetched():
    """By a processor, which opens any address and path that a file of texts names."""
    shown = {"type": "image", "url": "http://10.0.0.1/x"}
    chat = [{"role": "user", "content": [shown, {"type": "text", "text": "w1"}]}]
    processor = SimpleNamespace(
        tokenizer=WordTokenizer(), apply_chat_template=lambda *_, **__: pytest.fail("it opens")
    )
    with pytest.raises(ValueError, match="text 0 has images or sounds"):
        loki.drift(build_model(), build_model(), [chat], tokenizer=processor)
    with pytest.raises(ValueError, match="has images or sounds"):
        loki.estimate_protection(build_model(), [chat], tokenizer=processor)


def test_a_limit_of_tokens_takes_domains_in_turn():
    base = build_model()
    result = loki.drift(base, moved(base), texts((5, 5, 5, 5)), tokens=12)
    assert [group.texts for group in sorted(result.domains, key=lambda g: g.name)] == [2, 1]
    assert result.overall.tokens == 12
    assert result.left_out == 1


def test_one_long_text_leaves_room_for_the_other_domains():
    base = build_model()
    records = texts((50, 6, 50))
    records[2]["domain"] = "c"
    result = loki.drift(base, moved(base), records, tokens=24, length=4)
    assert {group.name: group.tokens for group in result.domains} == {"a": 8, "b": 6, "c": 8}
    result = loki.drift(base, moved(base), records, tokens=24, length=16)  # no less than a chunk
    assert {group.name: group.tokens for group in result.domains} == {"a": 16, "b": 6, "c": 2}


def test_no_more_than_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(measure, "LOGITS", 97 * 4)
    base = build_model()
    seen = []
    linear = torch.nn.functional.linear

    def watch(x, weight, bias=None):
        if len(weight) == 97:
            seen.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    loki.drift(base, moved(base), texts((11, 30)))
    assert max(seen) == 4


def test_models_in_memory_are_left_as_they_are():
    base, tuned = build_model().train(), moved(build_model())
    tuned.model.layers[1].train()
    before = snapshot(base), snapshot(tuned)
    loki.drift(base, tuned, texts())
    assert_unchanged(base, before[0])
    assert_unchanged(tuned, before[1])


@pytest.mark.parametrize("rank", [None, 2])
def test_a_patched_model_from_its_own_base(rank):
    base = build_model()
    tuned = copy.deepcopy(base)
    handle = loki.patch(tuned, ROWS, rank=rank)
    train(tuned)
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    got = loki.drift(handle, texts=texts())
    assert torch.equal(got.token_kl, loki.drift(base, handle, texts()).token_kl)
    assert got.token_kl.any()
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="is not patched"):
        loki.drift(base, texts=texts())


def test_a_named_base_is_gone_before_the_second_is_loaded(base_folder, tmp_path, monkeypatch):
    moved(load_model(base_folder)).save_pretrained(tmp_path)
    opened, alive, real = [], [], meter.open_model

    def opening(model, *options):
        alive.append([reference() is not None for reference in opened])
        loaded = real(model, *options)
        opened.append(weakref.ref(loaded.model))  # all but the head, which is kept
        return loaded

    monkeypatch.setattr(meter, "open_model", opening)
    loki.drift(base_folder, tmp_path, texts())
    assert alive == [[], [False]]


@pytest.mark.parametrize("way", ["patch", "peft"])
def test_an_update_is_formed_once_a_measurement(way, monkeypatch, tmp_path):
    """And not at every pass: of all protected rows at 8B that takes as long as the pass."""
    model = build_model()
    ids = [record["input_ids"].tolist() for record in texts()]
    protection = loki.estimate_protection(model, ids, share=0.7)
    if way == "patch":
        model = loki.patch(model, ROWS, protect=protection).model
    else:
        protection.save(tmp_path / "p.safetensors")
        config = LokiConfig(rows=ROWS, protect=str(tmp_path / "p.safetensors"))
        model = peft.get_peft_model(model, config)
    train(model)
    want = loki.drift(model, texts=texts()).overall.kl
    monkeypatch.setattr(measure, "FORWARD", 1)  # a text a pass
    formed = []
    module = rows_module if way == "patch" else layer_module
    name = "leave_out" if way == "patch" else "acting_factors"
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: formed.append(1) or real(*given))
    assert loki.drift(model, texts=texts()).overall.kl == pytest.approx(want, rel=1e-4)
    assert len(formed) == (6 if way == "patch" else 3)  # of three layers, the base's zero too


@pytest.mark.parametrize("rank", [None, 2])
def test_an_interrupted_measurement_leaves_the_update(rank):
    tuned = build_model()
    handle = loki.patch(tuned, ROWS, rank=rank)
    train(tuned)
    before = snapshot(tuned)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = tuned.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):  # where the base is read, which is first
        loki.drift(handle, texts=texts())
    hook.remove()
    assert_unchanged(tuned, before)


def test_what_an_adapter_trains_is_none_of_its_base():
    """Whatever PEFT holds it in."""
    linears = {"target_modules": ["q_proj", "down_proj"], "init_weights": False}
    causal = {"task_type": "CAUSAL_LM"}
    for config in (
        peft_config("lora"), peft_config("whole"), peft_config("prompt"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(r=2, target_parameters=["down_proj.weight"]),
        peft.VBLoRAConfig(num_vectors=4, vector_length=8, target_modules=["q_proj"]),
        peft.VeraConfig(r=2, target_modules=["q_proj"]), peft.IA3Config(**causal),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
        peft.PrefixTuningConfig(num_virtual_tokens=3, **causal),
        peft.PromptEncoderConfig(num_virtual_tokens=3, **causal),
        peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **causal),
        peft.LoHaConfig(r=2, **linears), LokiConfig(rows=ROWS),
    ):  # fmt: skip
        around = peft.get_peft_model(build_model(), config)
        assert any(parameter.requires_grad for parameter in around.parameters())
        assert loki.drift(around, texts=texts((5,))) is not None, config
        norm = around.get_submodule("base_model.model.model.norm" if hasattr(
            around.base_model, "model") and hasattr(around.base_model.model, "model"
        ) else "base_model.model.norm")  # fmt: skip
        norm.requires_grad_()
        with pytest.raises(ValueError, match=r"norm.weight is trained beside the adapter"):
            loki.drift(around, texts=texts((5,)))


def peft_config(kind):
    return {
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        "whole": peft.LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
        ),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]


@pytest.mark.parametrize("kind", ["lora", "whole", "prompt"])
def test_pefts_adapters_of_any_method(kind, tmp_path):
    base = build_model()
    torch.manual_seed(1)
    around = peft.get_peft_model(copy.deepcopy(base), peft_config(kind))
    with torch.no_grad():
        for parameter in around.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    want = loki.drift(base, around, texts())
    assert want.token_kl.mean() > 1e-3
    torch.testing.assert_close(loki.drift(around, texts=texts()).token_kl, want.token_kl)
    around.save_pretrained(tmp_path)
    before = snapshot(base)
    torch.testing.assert_close(loki.drift(base, tmp_path, texts()).token_kl, want.token_kl)
    assert_unchanged(base, before)
    if kind != "prompt":
        kl = torch.cat(naive(base, around, texts())[0]).mean()
        assert want.overall.kl == pytest.approx(float(kl), rel=1e-3)


def test_an_adapter_with_other_embeddings_does_not_stay_in_a_base_in_memory(tmp_path):
    """PEFT writes what its file has of the base's own, and takes it out of nothing."""
    base = build_model()
    around = peft.get_peft_model(copy.deepcopy(base), peft_config("lora"))
    head = around.base_model.model.lm_head.base_layer
    with torch.no_grad():
        head.weight[5] += 1
    around.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    base.save_pretrained(tmp_path / "base")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"changes values of its base .*lm_head\.weight"):
        loki.drift(base, tmp_path / "adapter", texts())
    assert_unchanged(base, before)
    want = loki.drift(base, around, texts())
    got = loki.drift(tmp_path / "base", tmp_path / "adapter", texts())
    torch.testing.assert_close(got.token_kl, want.token_kl)


def test_a_prompt_is_compared_with_its_base_after_mixed_precision(tmp_path):
    """PEFT takes it away by another forward pass, in place of what accelerate has wrapped."""
    base = build_model()
    around = peft.get_peft_model(copy.deepcopy(base), peft_config("prompt"))
    tiny_trainer(around, tmp_path, 1, bf16=True).train()
    assert "_original_forward" in vars(around)
    want = loki.drift(base, around, texts())
    assert want.token_kl.mean() > 1e-3
    torch.testing.assert_close(loki.drift(around, texts=texts()).token_kl, want.token_kl)


@pytest.mark.parametrize(
    ("attention", "dtype", "kept"),
    [
        ("flash_attention_2", torch.float32, True),
        ("flash_attention_2", torch.bfloat16, False),
        ("sdpa", torch.float32, False),
    ],
)
def test_attention_of_16_bits_keeps_the_autocast_of_float32_weights(attention, dtype, kept):
    """FlashAttention refuses float32; the model alone is told its name, and runs as it was."""
    model = build_model(dtype=dtype)
    handle = loki.patch(model, ROWS)
    model.config = copy.deepcopy(model.config)
    model.config._attn_implementation_internal = attention
    own, calls = model.forward, []

    def wrapped(*args, **options):
        calls.append(own)
        return own(*args, **options)

    model._original_forward, model.forward = own, wrapped
    loki.drift(handle, texts=texts())
    assert bool(calls) == kept


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "mica", "kasa_config": None}, None),
    ],
)
def test_what_of_an_adapters_config_changes_its_base(config, want):
    """KaSA truncates it, replicated layers stay in it; MiCA starts its own factors at zero."""
    assert models._writes_to_base(SimpleNamespace(**config)) == want


def test_a_merged_adapter_is_not_taken_out_of_its_base():
    """PEFT would, and leave it so."""
    around = peft.get_peft_model(build_model(), peft_config("lora"))
    around.merge_adapter()
    before = snapshot(around)
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        loki.drift(around, texts=texts())
    assert_unchanged(around, before)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "lora_only"}])
def test_adapters_that_write_to_their_base_need_one_of_their_own(options, tmp_path):
    """PEFT does not take back what PiSSA subtracts, nor biases that were trained."""
    torch.manual_seed(1)
    base = build_model("qwen2")  # whose projections have biases
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    around = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in around.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    want = loki.drift(base, around, texts())
    around.save_pretrained(tmp_path / "adapter")
    before = snapshot(base)
    with pytest.raises(ValueError, match="name the base too"):
        loki.drift(base, tmp_path / "adapter", texts())
    assert_unchanged(base, before)
    named = loki.drift(tmp_path / "base", tmp_path / "adapter", texts())
    torch.testing.assert_close(named.token_kl, want.token_kl, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="is not its base"):
        loki.drift(around, texts=texts())


@pytest.mark.parametrize("kind", ["lora", "loki"])
def test_an_adapter_that_is_put_on_draws_no_random_number(kind, tmp_path):
    """A training that measures adapters on its way goes on as it would have."""
    base = build_model()
    if kind == "lora":
        peft.get_peft_model(build_model(), peft_config(kind)).save_pretrained(tmp_path)
    else:
        loki.save_adapter(loki.patch(build_model(), ROWS, rank=2).model, tmp_path)
    state = torch.random.get_rng_state()
    loki.drift(base, tmp_path, texts())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_base_forgets_the_adapter(tmp_path):
    base = build_model()
    peft.get_peft_model(build_model(), peft_config("lora")).save_pretrained(tmp_path)
    loki.drift(base, tmp_path, texts())
    assert not hasattr(base, "peft_config")


def test_two_precisions_are_named(base_folder, tmp_path, caplog):
    load_model(base_folder).to(torch.bfloat16).save_pretrained(tmp_path)
    loki.drift(base_folder, tmp_path, texts())
    assert "rounding counts as drift" in caplog.text
    caplog.clear()
    loki.drift(base_folder, tmp_path, texts(), dtype="float32")
    assert not caplog.text
    in_memory = load_model(base_folder).to(torch.bfloat16)
    loki.drift(base_folder, in_memory, texts(), dtype="float32")
    assert "rounding counts as drift" in caplog.text


def test_an_adapter_of_another_base_is_named(base_folder, tmp_path, caplog):
    """Whose weights fit, as those of a base and of what was tuned to chat do."""
    peft.get_peft_model(load_model(base_folder), peft_config("lora")).save_pretrained(tmp_path)
    loki.drift(base_folder, tmp_path, texts())
    loki.drift(f"{base_folder}/", tmp_path, texts())
    nameless = load_model(base_folder)
    nameless.name_or_path = ""
    loki.drift(nameless, tmp_path, texts())
    assert not caplog.text
    other = load_model(base_folder)
    other.name_or_path = "someone/another"
    loki.drift(other, tmp_path, texts())
    assert f"was trained on {base_folder.name}, and is measured on someone/another" in caplog.text


def test_our_adapter_by_its_name_on_the_hub(base_folder, tmp_path, monkeypatch):
    """Its config is fetched to know it, and then its weights; its protection is not."""
    model = load_model(base_folder)
    loki.patch(model, ROWS)
    folder = loki.save_adapter(train(model), tmp_path / "snapshot")
    fetched = []

    def fetch(name, allow_patterns):
        fetched.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(
        models, "find_adapter_config_file",
        lambda name: str(folder / "adapter_config.json") if name == "user/rows" else None,
    )  # fmt: skip
    monkeypatch.setattr(adapter_file, "snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it has no tokenizer
    assert loki.drift(base_folder, "user/rows", texts()).overall.kl > 0
    wanted = ["adapter_config.json", "adapter_model.safetensors", "loki_rows.update"]
    assert fetched == [("user/rows", wanted)] * 2


def test_an_adapter_that_does_not_fit_leaves_the_base(tmp_path):
    """PEFT puts its layers in before it finds out."""
    base, other = build_model(), build_model()
    peft.get_peft_model(other, peft_config("lora")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    wide = {name: torch.cat([t, t], -1) for name, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(wide, path)
    before = snapshot(base)
    with pytest.raises(ValueError, match="does not fit"):
        loki.drift(base, tmp_path, texts())
    assert_unchanged(base, before)


def test_an_adapter_of_other_modules_is_no_update(tmp_path):
    """PEFT warns and goes on with what it drew."""
    base = build_model()
    peft.get_peft_model(build_model(), peft_config("lora")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    names = {n: n.replace("model.layers", "model.language_model.layers") for n in tensors}
    safetensors.torch.save_file({names[n]: t for n, t in tensors.items()}, path)
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"does not fit.*missing adapter keys"):
        loki.drift(base, tmp_path, texts())
    assert_unchanged(base, before)


def test_our_adapter_of_a_whole_multimodal_model(tmp_path):
    """Whose text model transformers loads by the auto class for text, with other names."""
    model = build("Qwen3_5ForConditionalGeneration")
    model.save_pretrained(tmp_path / "base")
    loki.patch(model, [[1], [2], [3], [0]])
    move(model)
    loki.save_adapter(model, tmp_path / "adapter")
    assert loki.drift(tmp_path / "base", tmp_path / "adapter", texts()).overall.kl > 0


def test_a_head_that_accelerate_has_placed(tmp_path):
    """Its weights come in for its own forward pass, and its hooks go with a copy of it."""
    base = build_model()
    tuned = moved(base)
    want = loki.drift(base, tuned, texts()).token_kl
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers"]
    places = dict.fromkeys(parts, "cpu") | {"model.embed_tokens": "disk", "lm_head": "disk"}
    placed = dispatch_model(base, places, offload_dir=tmp_path, force_hooks=True)
    assert placed.lm_head.weight.is_meta
    torch.testing.assert_close(loki.drift(placed, tuned, texts()).token_kl, want)
    assert not hasattr(measure.Readout.of(placed, kept=True).head, "_hf_hook")


@pytest.mark.skipif(
    not hasattr(transformers, "DoryForCausalLM"), reason="this transformers has no Dory"
)
def test_a_placed_head_with_a_factor_of_its_own_is_not_taken_for_a_linear_one():
    """Dory learns a factor of each token; without it the base's logits would be others."""
    base = build("DoryForCausalLM")
    tuned = moved(base)
    want = loki.drift(base, tuned, texts()).token_kl
    placed = dispatch_model(base, {"": "cpu"}, force_hooks=True)
    with pytest.raises(measure.UnreadableHeadError, match="besides weight and bias: logit_scale"):
        measure.Readout.of(placed, kept=True)
    torch.testing.assert_close(loki.drift(placed, tuned, texts()).token_kl, want)


def test_a_scaled_head():
    """Falcon-H1 multiplies what its head gives, as its config says."""
    model = falcon_h1()
    base = copy.deepcopy(model)
    handle = loki.patch(model, [[0, 5]] * len(model.model.layers))
    move(model)
    got = loki.drift(handle, texts=texts())
    kl = torch.cat(naive(base, model, texts())[0]).mean()
    assert got.overall.kl == pytest.approx(float(kl), rel=1e-3)


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.jsonl"
    lines = [
        {"text": " ".join(f"w{i * k}" for i in range(9)), "domain": f"by {k}"} for k in (1, 2, 3)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_our_adapter_from_the_command_line(base_folder, words, tmp_path, capsys):
    model = load_model(base_folder)
    loki.patch(model, ROWS)
    train(model)
    loki.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "full")
    out, picture = tmp_path / "drift.json", tmp_path / "drift.png"
    command = ["drift", str(base_folder), str(tmp_path / "adapter"), "--texts", str(words)]
    assert main([*command, "--out", str(out), "--plot", str(picture), "--dtype", "float32"]) == 0
    table = capsys.readouterr().out
    assert "KL, nats a token" in table
    assert "by 3" in table
    content = json.loads(out.read_text())
    assert content["overall"]["texts"] == 3
    assert content["domains"][0]["kl"] >= content["domains"][-1]["kl"]
    assert content["domains"][0]["kl_error"] is None  # one text
    assert len(content["positions"]) == 10
    assert content["positions"][0]["token"].startswith("w")
    assert picture.stat().st_size > 10_000
    checkpoint = loki.drift(base_folder, tmp_path / "full", words)
    assert content["overall"]["kl"] == pytest.approx(checkpoint.overall.kl, rel=1e-4)


def test_pefts_adapter_by_name_and_the_bundled_questions(base_folder, tmp_path):
    around = peft.get_peft_model(load_model(base_folder), peft_config("lora"))
    around.save_pretrained(tmp_path)
    base = loki.drift(base_folder, tmp_path, tokens=1500)
    assert len(base.domains) > 20
    assert base.left_out > 0
    assert "were left out" in str(base)
    assert "domains that moved less" in str(base)


def test_paragraphs_are_texts(base_folder, tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("w1 w2 w3\nw4\n\n\nw5 w6 w7\n")
    result = loki.drift(base_folder, moved(load_model(base_folder)), path)
    assert [(g.name, g.texts, g.tokens) for g in result.domains] == [("some", 2, 7)]
    assert str(result).count("some") > 1


def test_a_list_may_name_files(words, tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("w1 w2 w3\nw4\n\n\nw5 w6 w7\n")
    beside = {"text": "w3", "tools": "hammer, saw"}  # which are a chat's alone
    found = read_texts([str(path), words, beside, "w1 w2", "no.txt"])
    assert [text.domain for text in found] == [
        "some", "some", "by 1", "by 2", "by 3", "texts", "texts", "texts"
    ]  # fmt: skip
    assert [text.content for text in found[-2:]] == ["w1 w2", "no.txt"]


def test_questions_are_texts_of_their_subjects():
    """The held-out of those that come with the package, on which rows were chosen."""
    held_out = loki.load_questions(2, skip=3)[:3]
    assert [text.domain for text in read_texts(held_out)] == [q.subject for q in held_out]


def test_chats_go_through_the_template(base_folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    chat = {"messages": [{"role": "user", "content": "w1 w2"}], "domain": "chat"}
    base = load_model(base_folder)
    with pytest.raises(ValueError, match="no chat template"):
        loki.drift(base, moved(base), [chat], tokenizer=tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w8{% endif %}"
    )
    result = loki.drift(base, moved(base), [chat], tokenizer=tokenizer)
    assert result.overall.tokens == 4
    moved(base).save_pretrained(tmp_path / "tuned")  # the base alone has no template
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert loki.drift(base_folder, tmp_path / "tuned", [chat]).overall.tokens == 4


@pytest.mark.parametrize("spelled", [list, json.dumps])
def test_what_a_chat_has_beside_its_messages_reaches_the_template(spelled):
    """In the columns that TRL trains on."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}w3 {{ tool['name'] }} {% endfor %}"
        "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
        "{% if thinking is false %}w8{% endif %}"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    chat = {"messages": [{"role": "user", "content": "w1 w2"}]}
    calls = chat | {"tools": spelled([{"name": "w4"}, {"name": "w6"}])}
    plain = chat | {"chat_template_kwargs": {"thinking": False}, "tools": None}
    records = [chat, calls, plain, calls | plain | {"tools": calls["tools"]}]
    found = [encode(text, tokenizer).tolist() for text in read_texts(records)]
    assert found == [[9, 1, 2], [3, 4, 3, 6, 9, 1, 2], [9, 1, 2, 8], [3, 4, 3, 6, 9, 1, 2, 8]]
    tokens = tokenize_prompts([calls], tokenizer, 97, {"thinking": False})
    assert next(tokens).ids.tolist() == [3, 4, 3, 6, 9, 1, 2, 8]  # those of all chats too


class Doubled(transformers.LlamaForCausalLM):
    """Does something with its logits that its config does not say."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_head_that_cannot_be_read_runs_side_by_side(tmp_path):
    base = build_model()
    base.__class__ = Doubled
    tuned = moved(base)
    result = loki.drift(base, tuned, texts())
    kl = torch.cat(naive(base, tuned, texts())[0])
    torch.testing.assert_close(result.token_kl.sort().values, kl.sort().values.float())
    loki.patch(base, ROWS)
    with pytest.raises(UnsupportedModelError, match="Give two models"):
        loki.drift(base, texts=texts())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ("[1, 2]", "is no text"),
        ("{", "line 1 is not JSON"),
        ('{"text": " "}', "line 1 is blank"),
        ('{"words": "a"}', "is no text"),
        ('{"input_ids": null}', "is no text"),
        ('{"input_ids": {"a": 1}}', "line 1 is no tensor"),
        ('{"input_ids": [[1], [2, 3]]}', "line 1 is no tensor"),
        ('{"input_ids": [1.5]}', "must be integers"),
        ('{"input_ids": "abc"}', "line 1 is no tensor"),
        ('{"input_ids": [-1]}', "line 1 holds token id -1"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "{"}', "line 1: tools is a"),
        (
            '{"messages": [{"role": "user"}], "chat_template_kwargs": {"tokenize": false}}',
            "line 1: chat_template_kwargs names tokenize",
        ),
        ('{"messages": [{"role": "user"}], "chat_template_kwargs": [1]}', "is a list, and no"),
        ('{"input_ids": [[1, 2], [3, 4]]}', "line 1 is a batch of 2 texts"),
        ('{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}', "line 1 has holes"),
    ],
)
def test_bad_texts_are_refused_before_a_model_is_loaded(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_: pytest.fail("it loaded")
    )
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        loki.drift("base", "tuned", tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match=message):
        loki.DriftCallback(tiny_trainer(build_model(), tmp_path, 1), tmp_path / "texts.jsonl")


def test_bad_input_leaves_nothing_behind(base_folder, words, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.iterdir())
    base, other = str(base_folder), str(tmp_path / "no")
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ([base, base, "--texts", "no.txt"], "No such file"),
        ([base, base, "--texts", "no.csv"], "read from .txt or .jsonl"),
        ([base, base, "--out", "drift.txt"], "must end in .json"),
        ([base, base, "--plot", "drift.jpg"], "must end in .png"),
        ([base, base, "--texts", str(words), "--dtype", "nn"], "not a torch dtype"),
        ([base, base, "--texts", str(words), "--tokens", "0"], "tokens must be positive"),
        ([base, base, "--texts", str(words), "--device", "cuda:99"], "device cuda:99"),
        ([base, other, "--texts", str(words), "--out", "drift.json"], "does not exist"),
    ):
        assert main(["drift", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_models_that_cannot_be_compared(base_folder, words, tmp_path):
    base = build_model()
    with pytest.raises(ValueError, match="one model in memory"):
        loki.drift(base, base, texts())
    with pytest.raises(ValueError, match="name a second model"):
        loki.drift(base_folder, texts=words)
    with pytest.raises(TypeError, match="tokenizer is needed"):
        loki.drift(base, moved(base), ["w1"])
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"its rows, texts\.to_dict"):
        loki.drift(base, moved(base), pandas.DataFrame({"text": ["w1"]}))
    with pytest.raises(ValueError, match="outside the base's vocabulary"):
        loki.drift(base, moved(base), [{"input_ids": [99]}])
    with (
        loki.patch(base, ROWS) as handle,
        pytest.raises(ValueError, match="outside the base's vocabulary"),
    ):
        loki.limit_drift(handle, 0.1, [{"input_ids": [5, 99]}])
    bigger = copy.deepcopy(base)
    bigger.resize_token_embeddings(101)
    with pytest.raises(ValueError, match="vocabulary of 97 tokens"):
        loki.drift(base, bigger, texts())
    with torch.no_grad():
        bigger = moved(base)
        bigger.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"model.norm.weight is not finite"):
        loki.drift(base, bigger, texts())
    folder = tmp_path / "other"
    folder.mkdir()
    save_base(folder)
    path = folder / "tokenizer.json"
    tokens = path.read_text()
    path.write_text(tokens.replace('"w3"', '"x3"'))  # as one that gives a reserved token a name
    loki.drift(base_folder, folder, words)
    path.write_text(tokens.replace('"w3"', '"w"').replace('"w4"', '"w3"').replace('"w"', '"w4"'))
    with pytest.raises(ValueError, match="number tokens differently"):
        loki.drift(base_folder, folder, words)


def make_trained(kind, model):
    if kind == "rows":
        loki.patch(model, ROWS)
    elif kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize("kind", ["rows", "lora", "full"])
def test_the_callback_logs_what_drift_says(kind, tmp_path):
    base = build_model()
    model = make_trained(kind, copy.deepcopy(base))
    reported = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            reported.append((state.global_step, logs))

    trainer = tiny_trainer(model, tmp_path, 3, [Reporter()], logging_steps=2)
    trainer.add_callback(loki.DriftCallback(trainer, texts(), every=2))
    lines, log = [], trainer.log
    trainer.log = lambda logs, *rest: (lines.append(set(logs)), log(logs, *rest))  # as TRL's
    trainer.train()
    logged = {e["step"]: e for e in trainer.state.log_history if "drift/kl" in e}
    assert list(logged) == [0, 2, 3]
    assert logged[0]["drift/kl"] == 0
    want = loki.drift(base, model, texts())
    assert logged[3]["drift/kl"] == pytest.approx(want.overall.kl, rel=1e-6)
    assert logged[3]["drift/perplexity"] == pytest.approx(want.overall.perplexity_after, rel=1e-6)
    for domain in want.domains:
        assert logged[3][f"drift/kl/{domain.name}"] == pytest.approx(domain.kl, rel=1e-6)
    assert [step for step, logs in reported if "drift/kl" in logs] == [0, 2, 3]
    assert [step for step, logs in reported if "loss" in logs] == [2]
    assert not any("drift/kl" in line for line in lines)
    assert all("epoch" in logs for _, logs in reported)
    assert model.training


def test_the_callback_reads_as_much_as_it_is_told(tmp_path):
    """Words by a tokenizer of its own, where the Trainer has none."""
    base, model = build_model(), build_model()
    loki.patch(model, ROWS)
    trainer = tiny_trainer(model, tmp_path, 2)
    assert trainer.processing_class is None
    words = [" ".join(f"w{i * k}" for i in range(1, 30)) for k in (1, 2, 3)]
    options = {"tokenizer": WordTokenizer(), "tokens": 40, "length": 9}
    trainer.add_callback(loki.DriftCallback(trainer, words, every=2, **options))
    trainer.train()
    logged = trainer.state.log_history
    (last,) = (entry["drift/kl"] for entry in logged if "drift/kl" in entry and entry["step"] == 2)
    want = loki.drift(base, model, words, **options)
    assert want.overall.tokens == 40
    assert last == pytest.approx(want.overall.kl, rel=1e-6)
    for name in ("tokens", "length"):
        other = loki.drift(base, model, words, **options | {name: None if name == "tokens" else 30})
        assert last != pytest.approx(other.overall.kl, rel=1e-3)


def test_a_model_that_has_moved_is_measured_from_its_base(tmp_path):
    """As in a notebook whose cell is run again, or a run that goes on from a checkpoint."""
    base, model = build_model(), build_model()
    loki.patch(model, ROWS)
    train(model)
    trainer = tiny_trainer(model, tmp_path, 1)
    trainer.add_callback(loki.DriftCallback(trainer, texts()))
    trainer.train()
    first, last = (e["drift/kl"] for e in trainer.state.log_history if "drift/kl" in e)
    assert first > 0.01
    assert last == pytest.approx(loki.drift(base, model, texts()).overall.kl, rel=1e-6)


def test_the_callback_changes_no_training_and_follows_evaluations(tmp_path):
    trained = []
    for name in ("with", "without"):
        model = build_model()
        loki.patch(model, ROWS)
        options = {"eval_strategy": "steps", "eval_steps": 2}
        trainer = tiny_trainer(model, tmp_path / name, 5, [], **options)
        if name == "with":
            trainer.add_callback(loki.DriftCallback(trainer, texts()))
        trainer.train()
        trained.append(model.state_dict())
        if name == "with":
            logged = [e["step"] for e in trainer.state.log_history if "drift/kl" in e]
            assert logged == [0, 2, 4, 5]
    for key, value in trained[0].items():
        assert torch.equal(value, trained[1][key]), key


@pytest.mark.parametrize(("best", "want"), [(False, [0, 3]), (True, [0])])
def test_a_run_that_stops_early_is_measured(tmp_path, best, want):
    class Stop(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            control.should_training_stop = True

    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps"}
    trainer = tiny_trainer(
        build_model(), tmp_path, 5, [Stop()], **steps, load_best_model_at_end=best
    )
    trainer.add_callback(loki.DriftCallback(trainer, texts(), every=9))
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "drift/kl" in e] == want


def test_a_head_that_is_unfrozen_on_the_way_is_measured_from_what_it_was(tmp_path):
    base = build_model("qwen2")
    model = copy.deepcopy(base)
    head = model.get_output_embeddings().requires_grad_(False)

    class Unfreeze(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            head.requires_grad_(True)

    trainer = tiny_trainer(model, tmp_path, 2, [Unfreeze()])
    trainer.create_optimizer()
    trainer.optimizer.add_param_group({"params": list(head.parameters())})
    trainer.add_callback(loki.DriftCallback(trainer, texts(), every=2))
    trainer.train()
    assert not torch.equal(head.weight, base.get_output_embeddings().weight)
    last = [e["drift/kl"] for e in trainer.state.log_history if "drift/kl" in e][-1]
    assert last == pytest.approx(loki.drift(base, model, texts()).overall.kl, rel=1e-6)


def test_a_run_that_starts_anew_with_smaller_batches_is_measured_from_its_base(
    tmp_path, monkeypatch
):
    """`auto_find_batch_size` goes on from weights that have moved."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # a second in a process of so many imports
    base = build_model()
    model = copy.deepcopy(base)
    sizes = []

    def run_out_of_memory(_, inputs):
        if model.training:
            sizes.append(len(inputs[0]))
        if model.training and sizes == [2, 2]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.layers[1].register_forward_pre_hook(run_out_of_memory)
    trainer = tiny_trainer(model, tmp_path, 2, auto_find_batch_size=True)
    trainer.add_callback(loki.DriftCallback(trainer, texts(), every=2))
    trainer.train()
    assert sizes == [2, 2, 1, 1]
    logged = {e["step"]: e["drift/kl"] for e in trainer.state.log_history if "drift/kl" in e}
    assert logged[0] > 1e-3
    assert logged[2] == pytest.approx(loki.drift(base, model, texts()).overall.kl, rel=1e-6)


def test_a_resumed_run_is_measured_from_the_base(tmp_path):
    def run(steps, kind="rows", **options):
        model = build_model()
        callbacks = [loki.patch(model, ROWS).trainer_callback()] if kind == "rows" else []
        trainer = tiny_trainer(model, tmp_path / kind, steps, callbacks)
        trainer.add_callback(loki.DriftCallback(trainer, texts(), every=6))
        trainer.train(**options)
        return [e["drift/kl"] for e in trainer.state.log_history if "drift/kl" in e]

    whole = run(6)[-1]
    resumed = run(6, resume_from_checkpoint=str(tmp_path / "rows" / "checkpoint-3"))[-1]
    assert resumed == pytest.approx(whole, rel=1e-6)
    run(3, "full")
    with pytest.raises(ValueError, match="a resumed run does not start from the base"):
        run(6, "full", resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-3"))


def test_the_callback_refuses_bad_input_at_once(tmp_path):
    trainer = tiny_trainer(build_model(), tmp_path, 1, [])
    with pytest.raises(ValueError, match="every must be positive"):
        loki.DriftCallback(trainer, texts(), every=0)
    with pytest.raises(TypeError, match="a tokenizer is needed"):
        loki.DriftCallback(trainer)
    with pytest.raises(FileNotFoundError):
        loki.DriftCallback(trainer, "no.txt")


def test_the_bundled_questions_are_logged_together(tmp_path):
    model = build_model()
    loki.patch(model, ROWS)
    trainer = tiny_trainer(model, tmp_path, 1)
    trainer.add_callback(loki.DriftCallback(trainer, tokenizer=WordTokenizer(), tokens=300))
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry if "drift" in key}
    assert keys == {"drift/kl", "drift/perplexity"}


def test_sharded_weights(one_process, monkeypatch):
    from torch.distributed.fsdp import fully_shard

    from loki_kernels.forgetting.texts import read_texts, tokenize

    base = build_model()
    want = loki.drift(base, moved(base), texts())
    corpus = tokenize(read_texts(texts()), None, 512, None)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = copy.deepcopy(base)
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mesh=mesh)
    kept = measure.record(sharded, corpus)
    assert not measure.compare(kept, sharded).kl.any()
    with torch.no_grad():
        for parameter, value in zip(sharded.parameters(), moved(base).parameters(), strict=True):
            parameter.to_local().copy_(value)
    got = measure.compare(kept, sharded)
    torch.testing.assert_close(got.kl, want.token_kl)
    # of weights that wait on the host too, where the base's logits would take minutes
    monkeypatch.setattr(sharded._get_fsdp_state(), "_device", torch.device("meta"))
    assert measure._device(sharded).type == "meta"


def test_what_is_frozen_of_an_adapter_stays_frozen():
    """PEFT enables all of an active adapter when it turns it on again."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(build_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:  # as LoRA-FA trains it
            parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert True in flags.values()
    loki.drift(model, texts=texts())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


# What JSON may hold, and objects with the names that texts have.
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
text_records = st.fixed_dictionaries(
    {},
    optional={
        "text": st.sampled_from(["", " ", "a text"]) | json_values,
        "messages": json_values,
        "domain": json_values,
        "input_ids": st.lists(st.none() | st.integers(-3, 2**70), max_size=4),
    },
)
jsonl = st.lists(text_records | json_values, max_size=3).map(
    lambda found: "\n".join(map(json.dumps, found)).encode()
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["words.txt", "words.jsonl"]),
    content=jsonl | st.binary() | st.text().map(lambda text: text.encode(errors="replace")),
)
def test_any_content_is_texts_or_an_error_that_names_the_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        found = read_texts(path)
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert found
        assert all(name in text.where for text in found)
        assert all(len(text.content) for text in found)
