"""estimate_protection: the directions are those of the inputs, and its file is what it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing

import loki_kernels as loki
from loki_kernels.attribution.prompts import tokenize_prompts
from loki_kernels.discovery import find_structure
from loki_kernels.files import write_safetensors
from loki_kernels.ops._directions import leave_out
from loki_kernels.protection import Protection, estimate, moments, samples
from loki_kernels.questions import Question
from tests.models import DEVICE, assert_unchanged, build_model, snapshot, to_device
from tests.test_placement import Packed
from tests.tiny_tokenizers import CHAT, bos_tokenizer, chat_tokenizer, word_tokenizer
from tests.tiny_tokenizers import tokenizer as prompts_tokenizer

NAME = "model.layers.1.mlp.down_proj"
ALL = 10**6  # more directions than there are


def texts(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [2 + int(n) for n in torch.randint(0, 40, (count,), generator=generator)]
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def inputs_of(model, name, windows):
    """The layer's inputs on each text by itself, first tokens left out."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0][0, 1:])
    )
    with torch.no_grad():
        for window in windows:
            model(input_ids=torch.tensor([window], device=DEVICE))
    hook.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_directions_are_the_inputs_eigenvectors(name, batch_size):
    model = build_model(name)
    before = snapshot(model)
    protection = loki.estimate_protection(
        model, texts(), share=0.8, max_directions=ALL, batch_size=batch_size
    )
    assert_unchanged(model, before)
    for layer, directions in protection.directions.items():
        x = inputs_of(model, layer, texts())
        moment = (x.T @ x / len(x)).cpu()
        values, vectors = torch.linalg.eigh(moment)
        count = directions.shape[1]
        torch.testing.assert_close(
            directions @ directions.T,
            (vectors[:, -count:] @ vectors[:, -count:].T).float(),
            rtol=0,
            atol=1e-4,
        )
        held = float(values[-count:].sum() / values.sum())
        assert held >= 0.8 > float(values[-count + 1 :].sum() / values.sum()) or count == 1
        assert protection.shares()[layer] == pytest.approx(held, rel=1e-4)
        assert protection.totals[layer] == pytest.approx(float(moment.trace()), rel=1e-4)


def test_layers_at_a_time_and_windows_change_nothing(monkeypatch):
    model, passes = build_model(), []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    want = loki.estimate_protection(model, texts())
    assert len(passes) == 1
    monkeypatch.setattr(moments, "_room", lambda device: 1)
    got = loki.estimate_protection(model, iter(texts()))
    assert len(passes) == 1 + 3
    for name in want.directions:
        assert torch.equal(got.directions[name], want.directions[name])
    monkeypatch.setattr(estimate, "_WINDOW", 16)
    long = [list(range(3, 43))]
    cut = [long[0][:16], long[0][16:32], long[0][32:]]
    a, b = (loki.estimate_protection(model, t).directions[NAME] for t in (long, cut))
    assert torch.equal(a, b)


def test_each_device_has_room_for_its_own_layers(monkeypatch):
    """Of a device_map the first device is often another one than the rest."""

    def layer(device):
        weight = SimpleNamespace(device=torch.device(device))
        return SimpleNamespace(weight=weight, in_features=16, experts=())

    layers = [layer(device) for device in ("cuda:0", "cuda:1", "cuda:1", "cuda:1", "cuda:0")]
    size = 4 * 16**2  # and as much is left for the eigenvectors
    monkeypatch.setattr(moments, "_room", lambda device: size * (10, 3)[device.index])
    groups = list(moments.layers_at_a_time(layers))
    assert [len(group) for group in groups] == [3, 2]
    assert [layer for group in groups for layer in group] == layers


def test_a_container_s_memory_is_heeded(monkeypatch, tmp_path):
    """Half of what its limit leaves, where files that were read take none of it."""
    here = ((str(tmp_path), "memory.max", "memory.current", ""),)
    monkeypatch.setattr(moments, "_CONTAINER", here)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("active_file 100000\ninactive_file 50000\n")
    assert moments._room(torch.device("cpu")) == 375_000
    (tmp_path / "memory.max").write_text("max\n")
    assert moments._room(torch.device("cpu")) > 375_000


def test_subspace_iteration_finds_what_all_eigenvectors_do(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(150, 150, generator=generator))[0]
    moment = (basis * (0.8 ** torch.arange(150))) @ basis.T
    want = moments.top_eigenvectors(moment, 0.95, 30)
    monkeypatch.setattr(moments, "_EXACT", 100)
    ran, subspace = [], moments._subspace
    monkeypatch.setattr(moments, "_subspace", lambda *given: ran.append(1) or subspace(*given))
    got = moments.top_eigenvectors(moment, 0.95, 30)
    assert ran
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=0)
    assert (got[0].T @ want[0]).square().sum() == pytest.approx(want[0].shape[1], abs=1e-2)


def test_subspace_iteration_on_a_spectrum_that_falls_slowly(monkeypatch):
    """As activations' do: eigenvalues next to the cut differ by little."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(600, 600, generator=generator))[0]
    moment = (basis / (1 + torch.arange(600))) @ basis.T
    monkeypatch.setattr(moments, "_EXACT", 100)
    found = moments.top_eigenvectors(moment, None, 40)[0]
    held = (found * (moment @ found)).sum() / (1 / (1 + torch.arange(40))).sum()
    assert held > 0.9995  # after one iteration .976, without more vectors than are wanted .994


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (8, {}),
        (2, {"max_directions": 2}),
        (2, {"share": 0.99, "max_directions": 2}),
        (1, {"share": 0.01}),
        (1, {"share": 0.01, "max_directions": 2}),
        (None, {"share": 0.99}),
    ],
)
def test_a_fourteenth_of_the_features_is_left_alone(count, options):
    """Or as many as hold a share of the energy, or as are allowed, or the fewer of both."""
    protection = loki.estimate_protection(build_model(), texts(), **options)
    for name, directions in protection.directions.items():
        if count is not None:
            assert directions.shape == (112, count)
        else:
            held = protection.energies[name].cumsum(0) / protection.totals[name]
            assert directions.shape[1] > 8
            assert held[-2] < 0.99 <= held[-1] * (1 + 1e-6)


@pytest.mark.parametrize(("first", "count"), [(95.0, 1), (5.0, 8)])
def test_fewer_directions_where_fewer_hold_90_percent(first, count):
    """A fourteenth of 100 features is 8, rounded up."""
    moment = torch.diag(torch.tensor([first] + [0.05] * 99))
    directions, energies, total = moments.top_eigenvectors(moment, None, None)
    assert directions.shape == (100, count)
    assert energies[0] == pytest.approx(first)
    assert total == pytest.approx(first + 0.05 * 99)


def test_the_seed_is_the_samples(monkeypatch):
    asked = []

    def draw(*_, **options):
        asked.append(options)
        return [[5, 6, 7, 8, 9], [11, 12, 13]]

    monkeypatch.setattr(estimate, "draw_samples", draw)
    protection = loki.estimate_protection(build_model(), tokenizer=object(), samples=3, seed=7)
    assert {k: asked[0][k] for k in ("seed", "count")} == {"seed": 7, "count": 3}
    assert protection.info["seed"] == 7


def test_few_tokens_are_said(caplog):
    loki.estimate_protection(build_model(), texts())
    assert "fewer than two for each of the 112 inputs" in caplog.text
    caplog.clear()
    loki.estimate_protection(build_model(), texts(20))
    assert not caplog.text


def test_an_earlier_protection_is_added():
    model = build_model()
    first, second = texts(seed=1), texts(seed=2)
    earlier = loki.estimate_protection(model, first, share=0.9999, max_directions=ALL)
    both = loki.estimate_protection(model, second, share=0.8, max_directions=ALL, earlier=earlier)
    parts = [inputs_of(model, NAME, t).cpu() for t in (first, second)]
    moment = sum(x.T @ x / len(x) for x in parts)
    _, vectors = torch.linalg.eigh(moment)
    count = both.directions[NAME].shape[1]
    overlap = (both.directions[NAME].T.double() @ vectors[:, -count:]).square().sum()
    assert overlap == pytest.approx(count, abs=0.05 * count)
    assert both.info["earlier"] == earlier.fingerprint
    other = build_model("gpt_neox")
    with pytest.raises(ValueError, match="of another model"):
        loki.estimate_protection(other, second, earlier=earlier)


@pytest.mark.parametrize("text", ["w3 w4 w6 w7 w8 w9", [1, 3, 4, 6, 7, 8, 9]])
def test_every_window_begins_as_the_tokenizer_begins_a_text(monkeypatch, text):
    """Of token ids too, which the command line makes of its texts."""
    monkeypatch.setattr(estimate, "_WINDOW", 5)
    model, tokenizer = build_model(), bos_tokenizer()
    one = loki.estimate_protection(model, [text], tokenizer=tokenizer)
    other = loki.estimate_protection(model, [[1, 3, 4, 6, 7], [1, 8, 9]])
    assert one.fingerprint == other.fingerprint


def test_windows_of_ids_that_begin_otherwise_go_on(monkeypatch):
    monkeypatch.setattr(estimate, "_WINDOW", 5)
    model = build_model()
    one = loki.estimate_protection(model, [[3, 4, 6, 7, 8, 9, 5]], tokenizer=bos_tokenizer())
    other = loki.estimate_protection(model, [[3, 4, 6, 7, 8], [9, 5]])
    assert one.fingerprint == other.fingerprint


def test_a_processors_tokenizer_is_asked():
    model, tokenizer = build_model(), word_tokenizer()

    class Processor:  # has no method of a tokenizer's
        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, images=None, text=None):
            raise AssertionError

    one, other = (
        loki.estimate_protection(model, ["w3 w4 w5"] * 2, tokenizer=given)
        for given in (tokenizer, Processor())
    )
    assert one.fingerprint == other.fingerprint


def test_samples_are_drawn_from_the_model():
    model, tokenizer = build_model(), chat_tokenizer()
    state = torch.random.get_rng_state()
    drawn = samples.draw_samples(model, tokenizer, 5, 12)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(drawn) == 5
    assert all(1 < len(sample) <= 12 for sample in drawn)
    assert [sample[0] for sample in drawn] == [96, 96, 96, 7, 7]  # a document's start, a turn's
    assert drawn == samples.draw_samples(model, tokenizer, 5, 12)
    assert drawn != samples.draw_samples(model, tokenizer, 5, 12, seed=1)


def test_a_users_turn_of_parts_and_of_a_processors_template(caplog):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w7{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    assert samples.openings_of(tokenizer) == [([96], 96), ([7], 96)]
    several = chat_tokenizer()
    several.chat_template = dict.fromkeys(("default", "tool_use"), tokenizer.chat_template)
    assert samples.openings_of(several) == [([96], 96), ([7], 96)]
    processor = SimpleNamespace(tokenizer=chat_tokenizer(), chat_template=tokenizer.chat_template)
    processor.tokenizer.chat_template = None
    assert samples.openings_of(processor) == [([96], 96), ([7], 96)]
    assert not caplog.records
    tokenizer.chat_template = "w7{% for m in messages %}w8{% endfor %}"
    samples.draw_samples(build_model(), tokenizer, 2, 8)
    assert "shows no user's turn by itself, so no sample is a chat" in caplog.text


def test_samples_do_not_heed_how_the_model_generates():
    model, tokenizer = build_model(), chat_tokenizer()
    drawn = samples.draw_samples(model, tokenizer, 5, 12)
    own = model.generation_config
    own.min_p, own.num_return_sequences, own.suppress_tokens = 0.9, 2, list(range(3, 90))
    assert samples.draw_samples(model, tokenizer, 5, 12) == drawn
    assert model.generation_config is own


def test_samples_are_drawn_by_one_process_alone_beside_zero_3(monkeypatch):
    """By default generate waits for the others at each token, also of a model that is not split."""
    model = build_model()
    want = samples.draw_samples(model, chat_tokenizer(), 2, 8)
    synced = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *a, **k: synced.append(k["synced_gpus"]) or generate(*a, **k)
    )
    assert samples.draw_samples(model, chat_tokenizer(), 2, 8) == want
    assert synced
    assert not any(synced)


def test_samples_end_where_the_model_ends_them_and_are_of_all_tokens():
    """Of one distribution everywhere: the end has a third of it, all other tokens much the same."""
    model, tokenizer = build_model("gpt_neox"), chat_tokenizer()
    norm, end = model.gpt_neox.final_layer_norm, 96
    with torch.no_grad():
        norm.weight.zero_()
        model.get_output_embeddings().weight[end] = 3.87 * norm.bias / norm.bias.square().sum()
    drawn = samples.draw_samples(model, tokenizer, 200, 12)
    assert sum(len(sample) < 12 and sample[-1] == end for sample in drawn) > 100
    assert not any(end in sample[1:-1] for sample in drawn)
    assert len({token for sample in drawn for token in sample}) > 60
    later = [token for sample in drawn for token in sample[1:]]  # at temperature 1
    assert later.count(end) / len(later) == pytest.approx(1 / 3, abs=0.05)


def test_texts_that_begin_with_the_first_token_have_it_once():
    """As a chat template writes them: a second one would be an attention sink that counts."""
    model, begins = build_model(), prompts_tokenizer()
    plain, marked = (
        loki.estimate_protection(model, [f"{start}a b a b b", f"{start}b a"], tokenizer=begins)
        for start in ("", "<s> ")
    )
    assert torch.equal(plain.directions[NAME], marked.directions[NAME])
    assert plain.info["tokens"] == marked.info["tokens"] == 7


def test_layers_that_were_compiled_in_place_are_read():
    model = build_model()
    want = loki.estimate_protection(model, texts())
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    model(input_ids=to_device(torch.tensor(texts()[:1])))
    got = loki.estimate_protection(model, texts())
    torch.testing.assert_close(got.totals, want.totals)


def test_fewer_samples_at_a_time_where_memory_is_short(monkeypatch):
    model, tokenizer, sizes = build_model(), chat_tokenizer(), []
    generate = samples._generate

    def short(model, opening, count, length, ends):
        sizes.append(count)
        if count > 2:
            raise torch.OutOfMemoryError
        return generate(model, opening, count, length, ends)

    monkeypatch.setattr(samples, "_generate", short)
    assert len(samples.draw_samples(model, tokenizer, 16, 12)) == 16
    assert sizes == [8, 4, *[2] * 8]
    monkeypatch.setattr(samples, "_generate", lambda *_: exec("raise torch.OutOfMemoryError"))
    with pytest.raises(torch.OutOfMemoryError):
        samples.draw_samples(model, tokenizer, 16, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype, monkeypatch):
    """Lightning makes its precision the default while a model is configured."""
    monkeypatch.setattr(moments, "_EXACT", 16)
    model = build_model()
    want = loki.estimate_protection(model, texts())
    torch.set_default_dtype(dtype)
    try:
        got = loki.estimate_protection(model, texts())
        update = loki.patch(model, [[1], [2], [3]], rank=2).named_layers()[0][1].delta_b
    finally:
        torch.set_default_dtype(torch.float32)
    assert update.dtype == torch.float32
    for name in want.directions:
        assert torch.equal(got.directions[name], want.directions[name])


@pytest.mark.parametrize("number", [-1, 97])
def test_tokens_that_the_model_has_not(number):
    with pytest.raises(ValueError, match=f"token id {number}, outside the model's vocabulary"):
        loki.estimate_protection(build_model(), [[5, 6], [7, number]])


def test_offloaded_layers_are_refused():
    model = accelerate.cpu_offload(build_model(), execution_device="cpu")
    with pytest.raises(loki.UnsupportedModelError, match="load it without offloading"):
        loki.estimate_protection(model, texts())


def test_few_texts_beside_an_earlier_protection_are_no_mistake(caplog):
    model = build_model()
    earlier = loki.estimate_protection(model, texts(40))
    caplog.clear()
    loki.estimate_protection(model, texts(2), earlier=earlier)
    assert "fewer than two" not in caplog.text
    loki.estimate_protection(model, texts(2))
    assert "fewer than two" in caplog.text


def test_as_many_samples_as_asked_for(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        estimate,
        "draw_samples",
        lambda _m, _t, *, count, **_: drawn.append(count) or [[1, 2, 3]] * 9,
    )
    loki.estimate_protection(build_model(), tokenizer=chat_tokenizer(), samples=7)
    loki.estimate_protection(build_model(), tokenizer=chat_tokenizer())
    assert drawn == [7, 192]


@pytest.mark.parametrize(
    ("features", "experts", "passed", "count"),
    [
        (1536, (), None, 192),  # SmolLM2-135M, 447 tokens a direction
        (14336, (), None, 448),  # an 8B model
        (768, (128,), 8, 385),  # Qwen3-30B-A3B: a sixteenth of the tokens reach an expert
        (14336, (8,), 2, 1792),  # Mixtral-8x7B
        (3072, (64,), [8, 8], 770),  # HunYuan-A13B, whose layers may differ
        (14336, (64,), 1, 2048),
    ],
)
def test_wide_layers_and_experts_have_tokens_for_their_directions(features, experts, passed, count):
    down_proj = SimpleNamespace(in_features=features, experts=experts)
    config = SimpleNamespace(num_experts_per_tok=passed)
    structure = SimpleNamespace(
        causal_lm=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda **_: config)),
        projections=lambda: iter([SimpleNamespace(in_features=48, experts=()), down_proj]),
    )
    assert estimate.samples_to_draw(structure) == count
    assert estimate.samples_to_draw(structure, most=1) == 192


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
ONE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    "<u>{{ messages[0]['content'] }}"
)
LAST_DIFFERS = (
    "{% for m in messages %}<u>{% if loop.last %}<think>{% endif %}{{ m['content'] }}{% endfor %}"
)
OTHER_END = (
    "It is w8"
    "{% for m in messages %}<s>{{ m['role'] }}<m>{{ m['content'] }}"
    "{{ '<return>' if loop.last and m['role'] == 'assistant' else '<end>' }}{% endfor %}"
)
INSTRUCT = (
    "w1{% for m in messages %}{{ '[INST] ' if m['role'] == 'user' else '' }}{{ m['content'] }}"
    "{{ '[/INST]' if m['role'] == 'user' else 'w2' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (CHATML, "<|im_start|>user\n"),
        (INSTRUCT, "w1[INST] "),  # after what begins every text
        (ONE_TURN, "<u>"),
        (LAST_DIFFERS, "<u><think>"),
        (OTHER_END, "<s>user<m>"),
        (
            OTHER_END.replace("<end>", " w4 "),
            "It is w8<s>user<m>",
        ),  # no token of its own: the first
        ("nothing", ""),
    ],
)
def test_a_users_turn_opens_without_a_system_prompt(template, want):
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<s>", "<m>", "<end>", "<return>"]})
    tokenizer.chat_template = template
    assert samples._user_turn(tokenizer, template) == want


def test_texts_begin_as_the_model_knows_them():
    """Where every text begins with a token, also under a template that was made for another."""
    tokenizer = chat_tokenizer()
    assert [opening for opening, _ in samples.openings_of(tokenizer)] == [[96], [7]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w1 $A", special_tokens=[("w1", 1)]
    )
    assert [opening for opening, _ in samples.openings_of(tokenizer)] == [[1], [1, 7]]
    tokenizer.chat_template = "w1 " + tokenizer.chat_template
    assert samples.openings_of(tokenizer)[1][0].count(1) == 1
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w3 w4 $A w2", special_tokens=[("w2", 2), ("w3", 3), ("w4", 4)]
    )
    assert [opening[:2] for opening, _ in samples.openings_of(tokenizer)] == [[3, 4]] * 2


def test_a_turn_ends_before_the_blank_that_its_first_word_takes():
    """SentencePiece's blank is a part of the word after it; alone, digits and other scripts are."""
    words = ["[UNK]", "<s>", "</s>", "▁[INST]", "▁[/INST]", "▁", "▁hello"]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    model.pre_tokenizer = Metaspace()
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    (_, _), (opening, _) = samples.openings_of(tokenizer)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(opening) == ["<s>", "▁[INST]"]
    assert tokenizer.convert_ids_to_tokens(said[len(opening)]) == "▁hello"
    assert said[: len(opening)] == opening


def one_of(model, tokens):
    """The model says each of these as often as the others, and nothing else."""
    norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings()
    with torch.no_grad():
        norm.weight.zero_()
        head.weight.zero_()
        head.weight[tokens] = 50 * norm.bias / norm.bias.square().sum()


def test_samples_end_where_the_model_has_an_end_that_no_chat_contains_and_before_another_text():
    """Llama 3's EOS ends a turn, and its config names what ends a document."""
    tokenizer = bos_tokenizer()
    named = {"eos_token": "w2", "extra_special_tokens": ["w3"]}
    tokenizer.add_special_tokens(named)
    tokenizer.chat_template = "<s>{% for m in messages %}w7 {{ m['content'] }} w2 {% endfor %}"
    model = build_model("gpt_neox")
    model.generation_config.eos_token_id = [2, 3, 9]  # 9 is a word
    assert samples.stops_of(model, tokenizer) == [1, 3]
    one_of(model, [1, 2, 3, 9])
    drawn = samples.draw_samples(model, tokenizer, 80, 12)
    documents, chats = drawn[:40], drawn[40:]
    assert all(text[0] == 1 and 1 not in text[1:] for text in drawn)
    assert all(text[1] == 7 for text in chats)
    assert {text[-1] for text in documents} >= {2, 3, 9}
    assert not any({2, 3} & set(text[:-1]) for text in documents)
    assert any(2 in text[:-1] for text in chats)  # goes on after the end of a turn
    assert any(text[-1] == 3 for text in chats)
    assert not any(3 in text[:-1] for text in chats)


def test_a_chat_ends_at_an_eos_that_it_does_not_contain():
    """Gemma's; a tokenizer with another separator than its EOS has two ends."""
    model, tokenizer = build_model(), chat_tokenizer()
    model.generation_config.eos_token_id = 2
    assert samples.stops_of(model, tokenizer) == [2]
    structure = find_structure(model)
    ends = estimate._cache_file(structure, tokenizer)
    tokenizer.chat_template += "w2"
    assert samples.stops_of(model, tokenizer) == []
    assert estimate._cache_file(structure, tokenizer) != ends
    tokenizer.chat_template = None
    model.generation_config.eos_token_id = None
    assert samples.stops_of(model, tokenizer) == [2]


def test_what_is_not_finite_is_named():
    """On CUDA a draw from it is an assert of the device's, which ends all of the process's work."""
    model = build_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"logits are NaN; its parameter model\.layers\.1\.mlp\.up"
    ):
        loki.estimate_protection(model, tokenizer=chat_tokenizer(), samples=2)
    with pytest.raises(ValueError, match=rf"inputs of {NAME} are not finite.*bfloat16"):
        loki.estimate_protection(model, texts())


def test_layers_without_a_weight_are_refused():
    model = build_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    with pytest.raises(loki.UnsupportedModelError, match="is a Packed, which has no weight"):
        loki.estimate_protection(model, texts())


def test_a_device_whose_eigenvectors_do_not_converge(monkeypatch):
    model, eigh = build_model(), torch.linalg.eigh
    want = loki.estimate_protection(model, texts(), max_directions=3)

    def fails(moment):
        if moment.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(moment)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    got = loki.estimate_protection(model, texts(), max_directions=3)
    for name, own in want.directions.items():
        assert got.directions[name].dtype == got.energies[name].dtype == torch.float32
        torch.testing.assert_close(got.directions[name] @ got.directions[name].T, own @ own.T)


def test_the_file_holds_what_was_saved(tmp_path):
    protection = loki.estimate_protection(build_model(), texts())
    protection.save(tmp_path / "p.safetensors")
    again = Protection.load(tmp_path / "p.safetensors")
    assert again.fingerprint == protection.fingerprint
    assert again.totals == protection.totals
    assert again.info == protection.info
    assert "3 layers" in repr(again)
    halves = {n: d.bfloat16() for n, d in protection.directions.items()}
    assert Protection(halves, {}, {}).fingerprint == protection.fingerprint
    other = loki.estimate_protection(build_model(), texts(seed=3))
    assert other.fingerprint != protection.fingerprint


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 4000), byte=st.integers(0, 255))
def test_a_damaged_file_is_an_error(tmp_path_factory, cut, byte):
    path = tmp_path_factory.mktemp("p") / "p.safetensors"
    one = {"a": torch.eye(5)[:, :2].clone()}
    Protection(one, {"a": torch.ones(2)}, {"a": 3.0}).save(path)
    content = bytearray(path.read_bytes())
    cut %= len(content) - 1  # the last byte is a number's, of which every value is one
    content[cut] = byte
    path.write_bytes(content[: cut + 1])
    with pytest.raises(ValueError, match=r"p\.safetensors"):
        Protection.load(path)


def test_metadata_without_an_end_are_damage(tmp_path):
    path = tmp_path / "p.safetensors"
    tensors = {"directions:a": torch.eye(5)[:, :2].clone(), "energies:a": torch.ones(2)}
    metadata = {"format": "loki-kernels-protection", "totals": "[" * 10**5, "info": "{}"}
    write_safetensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"p\.safetensors is damaged"):
        Protection.load(path)


def test_a_copy_has_the_same_tensors():
    protection = loki.estimate_protection(build_model(), texts())
    copied = copy.deepcopy(protection)
    name = next(iter(protection.directions))
    assert copied.directions[name].data_ptr() == protection.directions[name].data_ptr()
    copied.directions[name] = torch.zeros_like(protection.directions[name])
    assert protection.directions[name].any()
    assert copied.fingerprint != protection.fingerprint


def test_chats_and_questions_are_texts():
    model, words = build_model(), prompts_tokenizer(chat_template=CHAT)
    chat = [{"role": "user", "content": "a b a"}, {"role": "assistant", "content": "b b"}]
    question = Question("b a", ("a", "b", "a", "b"), 1)
    whole = [t.ids.tolist() for t in tokenize_prompts([chat, question], words, 97, whole=True)]
    got = loki.estimate_protection(model, [chat, question, "a a b"], tokenizer=words)
    same = loki.estimate_protection(model, [*whole, "a a b"], tokenizer=words)
    assert got.fingerprint == same.fingerprint


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_directions": 3.0}, TypeError),  # of a quotient: it would fail at the eigenvectors
        ({"batch_size": 8.0}, TypeError),
        ({"samples": 8}, ValueError),  # beside texts
    ],
)
def test_counts_are_checked_before_anything_is_read(options, error, monkeypatch):
    monkeypatch.setattr(estimate, "find_structure", None)
    with pytest.raises(error):
        loki.estimate_protection(build_model(), texts(), **options)


def test_what_numpy_counts_can_be_saved(tmp_path):
    options = {"max_directions": np.int64(3), "share": np.float32(0.5), "seed": np.int64(1)}
    loki.estimate_protection(build_model(), texts(), **options).save(tmp_path / "p.safetensors")


def test_results_are_compared_by_what_they_are(tmp_path):
    """Of tensors there is no one truth, and `==` raised."""
    one, other = (loki.estimate_protection(build_model(), texts()) for _ in range(2))
    assert one != other
    assert one == one
    assert one.fingerprint == other.fingerprint
    assert len({one, other}) == 2


def test_records_are_what_is_in_them():
    model, tokenizer = build_model(), chat_tokenizer()
    chat = [{"role": "user", "content": "a b a b"}]
    given = ["a b a", chat, [5, 6, 7]]
    records = [{"text": "a b a", "id": 1}, {"messages": chat}, {"input_ids": [5, 6, 7]}]
    want, got = (loki.estimate_protection(model, x, tokenizer=tokenizer) for x in (given, records))
    assert got.directions.keys() == want.directions.keys()
    assert all(torch.equal(got.directions[name], want.directions[name]) for name in want.directions)
    loki.estimate_protection(model, records[2:])  # no tokenizer is asked for
    shown = {"input_ids": [5, 6], "pixel_values": torch.ones(1, 3, 4, 4)}
    with pytest.raises(ValueError, match="text 1 has images or sounds"):
        loki.estimate_protection(model, ["a b a", shown], tokenizer=tokenizer)
    batch = {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    with pytest.raises(ValueError, match="text 0 is a batch of 2 texts"):
        loki.estimate_protection(model, [batch])


def test_bad_input_is_refused():
    model = build_model()
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"texts\['text'\].tolist"):
        loki.estimate_protection(model, pandas.DataFrame({"text": ["a"]}))
    for options, message in (
        ({"share": 1.0}, "share"),
        ({"max_directions": 0}, "positive"),
        ({"batch_size": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            loki.estimate_protection(model, texts(), **options)
    with pytest.raises(TypeError, match="--texts FILE"):
        loki.estimate_protection(model, "texts.jsonl")
    encoded = transformers.BatchEncoding({"input_ids": texts(), "attention_mask": texts()})
    with pytest.raises(TypeError, match="is a BatchEncoding; give texts"):
        loki.estimate_protection(model, encoded, tokenizer=chat_tokenizer())
    with pytest.raises(ValueError, match="no text"):
        loki.estimate_protection(model, [[5]])
    with pytest.raises(ValueError, match="tokenizer"):
        loki.estimate_protection(model, ["a string"])


def test_leave_out_is_a_projection():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(9, 4, generator=generator))[0]
    delta = torch.randn(3, 9, generator=generator)
    left = leave_out(delta, directions)
    torch.testing.assert_close(left @ directions, torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(leave_out(left, directions), left, atol=1e-5, rtol=0)
    assert leave_out(delta, None) is delta
