"""Answers of several tokens, differences of two, baselines that are given; by naive re-forwards."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence

import loki_kernels as loki
from loki_kernels.attribution.prompts import Tokens
from tests import models
from tests.architectures import lfm2, mixtral
from tests.tiny_tokenizers import BOS, CHAT, A, B, tokenizer

# on the CPU, as the definition's own tensors are
build_model = functools.partial(models.build_model, device="cpu")
IDS = [5, 6, 7, 8, 9]
PROMPT = {"input_ids": IDS}
STEPS = 5


def naive(model, ids, answer, *, objective="probability", start=None):
    """The scores ``[L, D]`` of one answer by the left rule, and F(z) - F(start) of each layer."""
    whole = torch.tensor([[*ids, *answer[:-1]]])
    last = len(ids) - 1
    nodes = [
        getattr(layer, "mlp", getattr(layer, "feed_forward", None)) for layer in model.model.layers
    ]
    scores, changes = [], []
    for i, node in enumerate(nodes):
        ends = []

        def value(z=None, node=node, ends=ends):
            def hook(_module, _args, y):
                ends.append(y[0, last].detach())
                if z is None:
                    return y
                return torch.cat([y[:, :last], z[None, None], y[:, last + 1 :]], dim=1)

            handle = node.register_forward_hook(hook)
            logits = model(input_ids=whole, use_cache=False).logits[0, last:]
            handle.remove()
            index = torch.tensor(answer)[:, None]
            if objective == "logit":
                return logits.gather(1, index).sum()
            log_p = logits.log_softmax(-1).gather(1, index).sum()
            return log_p.exp() if objective == "probability" else log_p

        with torch.no_grad():
            whole_value = value()
        z, base = ends[0], torch.zeros(()) if start is None else start[i]
        gradients = []
        for k in range(STEPS):
            point = (base + k / STEPS * (z - base)).requires_grad_()
            value(point).backward()
            gradients.append(point.grad)
        scores.append(torch.stack(gradients).mean(0) * (z - base))
        with torch.no_grad():
            changes.append(whole_value - value(base.expand_as(z)))
    return torch.stack(scores), torch.stack(changes)


def close(got, want, tolerance=1e-4):
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("objective", ["probability", "log_probability"])
@pytest.mark.parametrize("build", [build_model, mixtral, lfm2])
def test_an_answer_of_several_tokens(build, objective):
    model, answer = build(), [11, 12, 13] if build is not lfm2 else [11]
    options = {"steps": STEPS, "objective": objective}
    got = loki.attribute(model, [PROMPT], target=[answer], **options)
    want, changes = naive(model, IDS, answer, objective=objective)
    for layer in range(len(want)):
        close(got.scores[0, layer], want[layer])
    close(got.change[0], changes)
    assert got.targets.tolist() == [11]
    assert got.run["engine"] == ("decode" if len(answer) > 1 or build is lfm2 else "staircase")
    again = loki.attribute(model, [PROMPT], target=[answer], engine="reforward", **options)
    close(again.scores, got.scores)


def test_answers_of_one_token_take_the_staircase():
    model = build_model()
    got = loki.attribute(model, [PROMPT, PROMPT], target=[[3], [4]])
    assert got.run["engine"] == "staircase"
    assert torch.equal(got.scores, loki.attribute(model, [PROMPT, PROMPT], target=[3, 4]).scores)


def test_answers_of_several_lengths_in_a_batch():
    model = build_model()
    answers = [[11], [11, 12, 13], [14, 15]]
    got = loki.attribute(model, [PROMPT] * 3, target=answers, steps=STEPS)
    for scores, answer in zip(got.scores, answers, strict=True):
        close(scores, naive(model, IDS, answer)[0])


def test_an_answer_as_text():
    def tokenizer(text, **options):
        assert options == {"add_special_tokens": False}
        return {"input_ids": [len(word) for word in text.split()]}

    model = build_model()
    got = loki.attribute(model, [PROMPT], tokenizer=tokenizer, target=["aaa bb"])
    assert torch.equal(got.scores, loki.attribute(model, [PROMPT], target=[[3, 2]]).scores)


@pytest.mark.parametrize(
    ("answer", "ids"),
    [(" b", [4]), ("b", [4]), (" b c", [4, 5]), ("bc", [4, 6]), ("\nb", [2, 7])],
)
def test_a_space_is_put_before_a_text_once(answer, ids):
    """As Llama-2's tokenizer, which makes of " b" the two tokens "▁" and "▁b"."""
    vocabulary = {"<unk>": 0, "▁▁": 1, "\n": 2, "▁": 3, "▁b": 4, "▁c": 5, "c": 6, "b": 7}
    words = Tokenizer(BPE(vocabulary, [("▁", "b"), ("▁", "c")], unk_token="<unk>"))
    words.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    processor = SimpleNamespace(tokenizer=tokenizer)
    model = build_model()
    want = loki.attribute(model, [PROMPT], target=[ids]).scores
    for given in (tokenizer, processor):
        got = loki.attribute(model, [PROMPT], tokenizer=given, target=[answer])
        assert torch.equal(got.scores, want)


@pytest.mark.parametrize("objective", ["probability", "log_probability", "logit"])
def test_the_difference_of_two_answers(objective):
    model = build_model()
    options = {"objective": objective, "steps": STEPS}
    got = loki.attribute(model, [PROMPT], target=[11], contrast=[12], **options)
    one, up = naive(model, IDS, [11], objective=objective)
    two, down = naive(model, IDS, [12], objective=objective)
    close(got.scores[0], one - two, 1e-3)
    close(got.change[0], up - down, 1e-3)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0, -1]
    values = {"logit": logits, "log_probability": logits.log_softmax(-1)}
    value = values.get(objective, logits.softmax(-1))
    torch.testing.assert_close(got.value[0], value[11] - value[12], rtol=1e-4, atol=1e-6)
    error = got.scores.sum(-1) - got.change
    assert torch.allclose(got.completeness, error, atol=1e-6)
    if objective != "logit":
        answers = loki.attribute(model, [PROMPT], target=[[11]], contrast=[[12, 13]], **options)
        close(answers.scores[0], one - naive(model, IDS, [12, 13], objective=objective)[0], 1e-3)


@pytest.mark.parametrize("engine", ["staircase", "decode"])
def test_a_baseline_of_mean_activations(engine):
    model = build_model()
    texts = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7, 8]}]
    mean = loki.mean_activations(model, texts, batch_size=2)
    for layer, decoder_layer in enumerate(model.model.layers):
        kept = []
        handle = decoder_layer.mlp.register_forward_hook(
            lambda _m, _a, y, kept=kept: kept.append(y[0])
        )
        for text in texts:
            model(input_ids=torch.tensor([text["input_ids"]]))
        handle.remove()
        assert torch.allclose(mean[layer], torch.cat(kept).mean(0), atol=1e-6)
    got = loki.attribute(model, [PROMPT], target=[11], baseline=mean, steps=STEPS, engine=engine)
    want, changes = naive(model, IDS, [11], start=mean)
    for layer in range(len(want)):
        close(got.scores[0, layer], want[layer])
    close(got.change[0], changes, 1e-3)
    assert got.run["baseline"] == "given"
    assert len(got.run["baseline_values"]) == 64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": [[11, 12]], "objective": "logit"}, ValueError, "has no logit"),
        ({"target": [[11, 12]], "definition": "captum"}, ValueError, "path='last_token'"),
        ({"target": [[]]}, ValueError, "target 0 is empty"),
        ({"target": [[1, 97]]}, ValueError, "outside the vocabulary"),
        ({"target": [[1], [2]]}, ValueError, "one token id for each of the 1 prompts"),
        ({"target": [["a"]]}, ValueError, "no list of token ids"),
        ({"target": ["a"]}, TypeError, "tokenizer is needed"),
        ({"target": "a"}, TypeError, "not one text"),
        ({"contrast": [3]}, ValueError, "give target"),
        ({"target": [3], "contrast": [3, 4]}, ValueError, "one token id for each"),
        ({"baseline": torch.zeros(2, 3)}, ValueError, r"\[layers, nodes\] = \[3, 48\]"),
        ({"baseline": "given"}, ValueError, "mean_activations"),
    ],
)
def test_bad_answers(options, error, message):
    with pytest.raises(error, match=message):
        loki.attribute(build_model(), [PROMPT], **options)


@pytest.mark.parametrize("engine", ["decode", "reforward"])
def test_an_answer_from_the_activations_of_token_zero(engine):
    """The path starts at the prompt's last token, not at one of the answer's."""
    model = build_model()
    kept = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _m, _a, y: kept.append(y[0, -1].detach()))
        for layer in model.model.layers
    ]
    model(input_ids=torch.zeros(1, len(IDS), dtype=torch.long))
    for hook in hooks:
        hook.remove()
    answer = [11, 12, 13]
    got = loki.attribute(
        model, [PROMPT], target=[answer], baseline="token_zero", steps=STEPS, engine=engine
    )
    want, changes = naive(model, IDS, answer, start=kept)
    for layer in range(len(want)):
        close(got.scores[0, layer], want[layer])
    close(got.change[0], changes, 1e-3)


def test_everything_of_a_prompt_is_in_its_hash():
    ids = np.array(IDS)
    one, two = np.array([1, 2]), np.array([1, 3])
    media = [{"pixel_values": torch.full((1, 2), value)} for value in (0.0, 1.0)]
    prompts = [
        Tokens(ids), Tokens(ids[:-1]), Tokens(ids, answer=one), Tokens(ids, answer=two),
        Tokens(ids, contrast=one), Tokens(ids, answer=one, contrast=one),
        Tokens(ids, answer=one, contrast=two), Tokens(ids, media[0]), Tokens(ids, media[1]),
    ]  # fmt: skip
    assert len({prompt.content() for prompt in prompts}) == len(prompts)
    assert Tokens(ids.copy(), dict(media[0])).content() == prompts[7].content()


def test_mean_activations_read_what_a_chat_ends_with():
    model, words = build_model(), tokenizer(chat_template=CHAT)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b a"}]
    mean = loki.mean_activations(model, [chat], tokenizer=words)
    same = loki.mean_activations(model, [{"input_ids": [BOS, A, B, A]}])
    assert torch.equal(mean, same)


def test_mean_activations_of_another_site():
    with pytest.raises(ValueError, match="site='down-proj' is unknown"):
        loki.mean_activations(build_model(), [{"input_ids": [1, 2]}], site="down-proj")


def test_a_baseline_of_the_neurons_mean_activations():
    """Of the inputs of the down-projections."""
    model = build_model()
    texts = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7, 8]}]
    mean = loki.mean_activations(model, texts, site="ffn_neurons", batch_size=2)
    assert mean.shape == (3, 112)
    for layer in range(3):
        kept = []
        handle = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
            lambda _m, args, kept=kept: kept.append(args[0][0])
        )
        for text in texts:
            model(input_ids=torch.tensor([text["input_ids"]]))
        handle.remove()
        assert torch.allclose(mean[layer], torch.cat(kept).mean(0), atol=1e-6)
    got = loki.attribute(model, [PROMPT], site="ffn_neurons", baseline=mean, steps=40)
    assert (got.completeness.abs() < 0.1 * got.change.abs().clamp_min(1e-4)).all()
