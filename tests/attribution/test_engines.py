"""The engines for models that are no plain stack of attention, against naive re-forwards."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import loki_kernels as loki
from loki_kernels.attribution import copies, integration, job, staircase
from loki_kernels.attribution import engine as choosing
from loki_kernels.attribution.definitions import PathIntegral
from loki_kernels.attribution.prefill import Batch
from loki_kernels.attribution.reference import attribute_reference
from loki_kernels.attribution.scores import Scores
from tests.architectures import (
    deepseek,
    falcon,
    falcon_h1,
    gemma4,
    gemma4_moe,
    glm_moe,
    gpt2,
    granite_moe_hybrid,
    lfm2,
    llava,
    mixtral,
    nemotron_latent,
    paligemma,
    qwen_vl,
)
from tests.models import assert_unchanged, build_model, snapshot

PROMPTS = [{"input_ids": [5, 6, 7, 8, 9, 10]}, {"input_ids": [11, 12]}, {"input_ids": [13]}]
ENGINES = {
    mixtral: "staircase",
    glm_moe: "staircase",
    deepseek: "staircase",
    gemma4: "staircase",
    gpt2: "decode",
    falcon: "decode",
    lfm2: "decode",
    falcon_h1: "decode",
    granite_moe_hybrid: "decode",
    nemotron_latent: "decode",
}


def assert_exact(model, result, tolerance=1e-4, prompts=PROMPTS, **options):
    without = result.run.get("without_ffn", [])
    present = [layer for layer in range(result.scores.shape[1]) if layer not in without]
    for scores, prompt in zip(result.scores[:, present], prompts, strict=True):
        want = attribute_reference(model, torch.tensor(prompt["input_ids"]), **options)
        error = (scores - want).norm(dim=-1) / want.norm(dim=-1)
        assert error.max() <= tolerance


@pytest.mark.parametrize("build", ENGINES)
def test_equals_naive_reforward(build):
    model = build()
    before = snapshot(model)
    result = loki.attribute(model, PROMPTS)
    assert_unchanged(model, before)
    assert result.run["engine"] == ENGINES[build]
    assert_exact(model, result)


@pytest.mark.parametrize("engine", ["decode", "reforward"])
@pytest.mark.parametrize("definition", ["published", "paper"])
def test_engines_by_name_equal_the_staircase(engine, definition):
    model = build_model("qwen3")
    want = loki.attribute(model, PROMPTS, definition=definition)
    got = loki.attribute(model, PROMPTS, definition=definition, engine=engine)
    assert got.run["engine"] == engine
    assert torch.equal(got.targets, want.targets)
    for name in ("scores", "value", "change", "completeness"):
        wanted, found = getattr(want, name), getattr(got, name)
        if wanted is not None:
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize(
    ("build", "site"),
    [(build_model, "down_proj"), (build_model, "ffn_neurons"), (gemma4, "down_proj")],
)
def test_reforward_takes_the_sequence_path(build, site):
    model = build()
    options = {
        "definition": "captum",
        "site": site,
        "batch_size": 1,
    }  # Gemma-4's own inputs a layer
    want = loki.attribute(model, PROMPTS, **options)
    got = loki.attribute(model, PROMPTS, **options, engine="reforward")
    assert torch.allclose(got.scores, want.scores, rtol=1e-4, atol=1e-6)
    with pytest.raises(loki.UnsupportedModelError, match="in the cache"):
        loki.attribute(model, PROMPTS, definition="captum", engine="decode")


@pytest.mark.parametrize("build", [lfm2, deepseek])
def test_a_baseline_of_another_prompt(build):
    model = build()
    got = loki.attribute(model, PROMPTS, baseline="token_zero", rule="midpoint", steps=3)
    options = {"baseline": "token_zero", "rule": "midpoint"}
    definition = PathIntegral.resolve("published", options, 3).definition
    assert_exact(model, got, definition=definition, steps=3)


@pytest.mark.parametrize("engine", ["decode", "reforward"])
def test_a_few_layers_at_a_time(engine, monkeypatch):
    model, copied = lfm2(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: copied.append(len(args[0])))
    want = loki.attribute(model, PROMPTS)
    loki.attribute(model, PROMPTS, engine=engine)
    assert max(copied) == 1 + 7 * len(model.model.layers)
    copied.clear()
    monkeypatch.setattr(copies, "_BYTES_UNTOLD", 1)
    got = loki.attribute(model, PROMPTS, engine=engine)
    assert max(copied) == 1 + 7
    assert torch.allclose(got.scores, want.scores, rtol=1e-3, atol=1e-7)


def test_a_prefix_that_is_not_causal_takes_reforward():
    model = paligemma()
    before = snapshot(model)
    with pytest.raises(loki.UnsupportedModelError, match=r"later ones.*decode: .*engine='refor"):
        loki.attribute(model, PROMPTS[:1])
    assert_unchanged(model, before)


def test_targets_that_are_given():
    got = loki.attribute(lfm2(), PROMPTS, target=[3, 4, 5])
    assert got.targets.tolist() == [3, 4, 5]
    other = loki.attribute(lfm2(), PROMPTS, target=[3, 4, 6])
    assert torch.equal(got.scores[:2], other.scores[:2])
    assert not torch.allclose(got.scores[2], other.scores[2])


def test_layers_run_twice_are_refused():
    model = build_model()
    layer = model.model.layers[1]
    once = layer.forward
    layer.forward = lambda x, **options: once(once(x, **options), **options)
    for engine in (None, "decode", "reforward"):
        with pytest.raises(loki.UnsupportedModelError, match=r"runs? .*times"):
            loki.attribute(model, PROMPTS, engine=engine)


def test_a_mixer_that_drops_the_gradient_is_noticed():
    model = build_model()
    attention = model.model.layers[2].self_attn
    attention.register_forward_hook(lambda _m, _a, output: (output[0].detach(), *output[1:]))
    with pytest.raises(loki.UnsupportedModelError, match="gives no gradient"):
        loki.attribute(model, PROMPTS, engine="decode")


def loud(dtype):
    """A convolution that counts: of random weights it is a tenth of what goes past it."""
    model = lfm2()
    with torch.no_grad():
        model.model.layers[1].conv.out_proj.weight.mul_(4)
    return model.to(dtype)


def gate_alone(model):
    """Of lfm2's convolution one token has the gradient of its gate alone, as a fused kernel's."""

    def drop(_module, _args, output):
        if output.shape[1] > 1:
            return output
        before, gate, inner = output.chunk(3, dim=-1)
        return torch.cat([before.detach(), gate, inner.detach()], dim=-1)

    model.model.layers[1].conv.in_proj.register_forward_hook(drop)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mixer_that_drops_a_part_of_the_gradient_is_noticed(dtype):
    model = gate_alone(loud(dtype))
    for engine in (None, "decode"):
        with pytest.raises(loki.UnsupportedModelError, match=r"fused kernel .*uninstall it"):
            loki.attribute(model, PROMPTS, engine=engine)
    got = loki.attribute(model, PROMPTS[:1], engine="reforward")
    want = loki.attribute(loud(dtype), PROMPTS[:1], engine="reforward")
    assert torch.equal(got.scores, want.scores)


def test_where_whole_prompts_are_refused_the_gradient_is_not_compared(monkeypatch):
    """Then nothing says what it should be."""
    run = copies.Copies.attribute

    def refuse(engine, batch):
        if engine.name == "reforward":
            raise loki.UnsupportedModelError("no whole prompts")
        return run(engine, batch)

    monkeypatch.setattr(copies.Copies, "attribute", refuse)
    assert loki.attribute(lfm2(), PROMPTS).run["engine"] == "decode"


def test_blocks_that_a_layer_does_not_just_add_up_are_refused():
    """The sum's place in the model is none, and no engine helps."""
    model = gemma4_moe()
    before = snapshot(model)
    for engine in (None, "decode", "reforward"):
        with pytest.raises(loki.UnsupportedModelError, match="more than add up") as raised:
            loki.attribute(model, PROMPTS, engine=engine)
        assert "hundred times" not in str(raised.value)
    with pytest.raises(loki.UnsupportedModelError, match="more than add up"):
        loki.mean_activations(model, PROMPTS)
    assert_unchanged(model, before)


@pytest.fixture
def refused(monkeypatch):
    """The staircase refuses batches with token 42, as bfloat16 may a mixture's."""
    tried, own = [], staircase.Staircase._guard

    def guard(self, *args):
        ids = self.batch.input_ids
        tried.append(len(ids))
        if (ids == 42).any():
            raise loki.UnsupportedModelError("rounding has routed a token elsewhere")
        own(self, *args)

    monkeypatch.setattr(staircase.Staircase, "_guard", guard)
    return tried


def test_a_prompt_that_the_staircase_refuses_takes_decode(refused, caplog):
    caplog.set_level("INFO")
    model = build_model()
    odd = {"input_ids": [42, 43, 44]}
    got = loki.attribute(model, [*PROMPTS, odd], batch_size=4)
    assert refused[1:] == [4, 2, 1, 1, 2]
    assert got.run["engine"] == "staircase"
    assert "prompt 3 is attributed by the decode engine (rounding has" in caplog.text
    assert caplog.text.count("by the decode engine") == 1
    assert "the staircase refused 1 of 4 prompts, number 3 first" in caplog.text
    assert_exact(model, got, prompts=[*PROMPTS, odd])
    with pytest.raises(loki.UnsupportedModelError, match="rounding"):
        loki.attribute(model, [*PROMPTS, odd], engine="staircase")


def test_a_prompt_that_decode_refuses_too_takes_whole_prompts(refused, caplog, monkeypatch):
    """One token over a cache may be routed otherwise as well; captum decode cannot compute."""
    caplog.set_level("INFO")
    model, odd = build_model(), {"input_ids": [42, 43, 44]}
    got = loki.attribute(model, [*PROMPTS, odd], definition="captum")
    assert "prompt 3 is attributed by the reforward engine (rounding has" in caplog.text
    assert_exact(model, got, prompts=[*PROMPTS, odd], definition="captum")
    monkeypatch.setattr(job, "choose_engine", refuses_all_but(job.choose_engine, "staircase"))
    with pytest.raises(loki.UnsupportedModelError, match="prompt 3, of 3 tokens: rounding"):
        loki.attribute(model, [*PROMPTS, odd])


def refuses_all_but(choose_engine, allowed):
    def choose(structure, prompts, integral, wanted):
        if wanted not in (None, allowed):
            raise loki.UnsupportedModelError("asked for")
        return choose_engine(structure, prompts, integral, wanted)

    return choose


def test_an_image_may_come_after_the_staircase_is_chosen(monkeypatch):
    """As in the second window of a stream; and an answer of several tokens."""
    module = sys.modules[loki.attribute.__module__]
    monkeypatch.setattr(module, "WINDOW", 2)
    model, image = llava(), with_image(llava)
    want = loki.attribute(model, [image]).scores[0]
    got = loki.attribute(model, iter([*PROMPTS[:2], PROMPTS[0], image]))
    assert got.run["engine"] == "staircase"
    torch.testing.assert_close(got.scores[3], want)
    torch.testing.assert_close(got.scores[2], got.scores[0])
    model = build_model()
    answers = [[3], [4], [5], [6, 7]]
    prompts = [*PROMPTS[:2], *PROMPTS[:2]]
    got = loki.attribute(model, iter(prompts), target=answers)
    assert got.run["engine"] == "staircase"
    want = loki.attribute(model, prompts, target=answers, engine="decode")
    assert torch.allclose(got.scores, want.scores, rtol=1e-4, atol=1e-6)


def test_what_was_chosen_before_sharding_is_chosen_anew(one_process, monkeypatch):
    """Of a process that attributed alone before, the others would wait for passes of the choice."""
    from torch.distributed.fsdp import fully_shard

    model, tried, candidates = build_model(device="cpu"), [], choosing._candidates

    def trying(*arguments, **options):
        tried.append(1)
        return candidates(*arguments, **options)

    monkeypatch.setattr(choosing, "_candidates", trying)
    for _ in range(2):
        loki.attribute(model, PROMPTS[:2], steps=2)
    assert tried == [1]
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    for _ in range(2):
        loki.attribute(model, PROMPTS[:2], steps=2)
    assert tried == [1, 1]


@pytest.mark.parametrize("kind", ["image", "answer"])
def test_few_prompts_of_another_kind_leave_the_others_to_the_staircase(kind, monkeypatch):
    """One among others, in a batch of its own."""
    if kind == "image":
        model, prompts, options = llava(), [PROMPTS[0], with_image(llava), *PROMPTS[1:]], {}
    else:
        model, prompts = build_model(), [PROMPTS[0], *PROMPTS]
        options = {"target": [[3], [6, 7], [4], [5]]}
    ran, compute = [], job.attribute_batch

    def recording(engine, batch):
        ran.append((engine.name, len(batch.lengths)))
        return compute(engine, batch)

    want = loki.attribute(model, prompts, engine="decode", **options)
    monkeypatch.setattr(job, "attribute_batch", recording)
    got = loki.attribute(model, prompts, batch_size=4, **options)
    assert ran == [("staircase", 3), ("staircase", 1), ("decode", 1)]
    assert got.run["engine"] == "staircase"
    assert torch.allclose(got.scores, want.scores, rtol=1e-3, atol=1e-6)


def test_few_long_answers_to_a_hybrid_are_for_decode_as_all_are(caplog):
    caplog.set_level("INFO")
    got = loki.attribute(lfm2(), PROMPTS, target=[[3], [6, 7], [4]])
    assert got.run["engine"] == "decode"
    assert "refused" not in caplog.text


def test_layers_without_an_ffn_have_no_rows():
    model = build_model()
    model.model.layers[1].mlp = torch.nn.Identity()
    result = loki.attribute(model, PROMPTS)
    assert result.run["without_ffn"] == [1]
    assert not result.scores[:, 1].any()
    assert result.scores[:, 0].any()
    for strategy in ("layer_balanced", "global_lowest", "random"):
        rows = loki.select(result, quota=10, strategy=strategy)
        assert len(rows[1]) == 0
        assert sum(map(len, rows)) == 2 * 4
    counts = loki.attribute(model, PROMPTS, keep="counts")
    assert [len(rows) for rows in loki.select(counts)] == [4, 0, 4]


@pytest.mark.parametrize("contrast", [False, True])
def test_scores_of_every_engine_are_in_one_place(contrast):
    """The staircase's are made with the head, decode's with the logits: of a model on two GPUs a
    batch of one and a batch of the other are counted together. Another device stands in for one."""
    made = Scores(torch.ones(1, 3, 4), torch.ones(1, 3), torch.ones(1), torch.ones(1).long())
    structure = SimpleNamespace(device=torch.device("meta"))
    engine = SimpleNamespace(structure=structure, attribute=lambda _batch: made)
    ids, answers = torch.ones(1, 2).long(), [torch.ones(1).long()]
    batch = Batch(ids, ids[0], answers, [{}], contrast=answers if contrast else None)
    found = job.attribute_batch(engine, batch)
    assert {x.device.type for x in vars(found).values()} == {"meta"}


def test_unknown_engine():
    with pytest.raises(ValueError, match="engine"):
        loki.attribute(build_model(), PROMPTS, engine="fast")


class QwenProcessor(transformers.Qwen2_5_VLProcessor):
    """Without its reader of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, *_):
        pass


def processor(build):
    """The model's own, on a tokenizer of words w0 to w79."""
    special = {"<image>": 90} if build is llava else {
        "<|image_pad|>": 90, "<|vision_start|>": 91, "<|vision_end|>": 92, "<|video_pad|>": 93,
    }  # fmt: skip
    words = {f"w{i}": i for i in range(80)} | {"[UNK]": 80} | special
    tokens = Tokenizer(WordLevel(words, "[UNK]"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="[UNK]", extra_special_tokens=list(special)
    )
    image = "<image>" if build is llava else "<|vision_start|> <|image_pad|> <|vision_end|>"
    template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}" + image + " "
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}w7"
        "{% endif %}"
    )

    def images(name, **sizes):
        kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        return kind(**sizes)

    if build is llava:
        reader = images(
            "CLIPImageProcessor", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
        return transformers.LlavaProcessor(
            reader, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    reader = images("Qwen2VLImageProcessor", size=sizes)
    return QwenProcessor(reader, tokenizer, chat_template=template)


def chat_with_image():
    pixels = torch.randint(256, (40, 60, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    content = [
        {"type": "text", "text": "w5"}, {"type": "image", "image": image},
        {"type": "text", "text": "w6"},
    ]  # fmt: skip
    return [{"role": "user", "content": content}]


def with_image(build):
    """What the processor makes of that chat."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = processor(build).apply_chat_template(
        chat_with_image(), add_generation_prompt=True, **options
    )
    return dict(made)


@pytest.mark.parametrize("build", [llava, qwen_vl])
def test_images_are_in_the_prefill(build):
    """Also where positions are counted in three dimensions (Qwen-VL)."""
    model, prompt = build(), with_image(build)
    if build is qwen_vl and not hasattr(model.model, "compute_3d_position_ids"):
        pytest.skip(
            "transformers 5.0 cannot decode copies of an image: it repeats a wrong dimension"
        )
    result = loki.attribute(model, [prompt, PROMPTS[0]])
    assert result.run["engine"] == "decode"
    chats = loki.attribute(model, [chat_with_image(), PROMPTS[0]], tokenizer=processor(build))
    assert torch.equal(chats.scores, result.scores)
    nodes = [layer.mlp.down_proj for layer in model.model.language_model.layers]
    inputs = {name: tensor for name, tensor in prompt.items() if name != "input_ids"}
    ids = prompt["input_ids"]
    assert (ids == 90).sum() > 1

    def last_logits(layer, z):
        def replace(_module, _args, output):
            return torch.cat([output[:, :-1], z[None, None]], dim=1)

        hook = nodes[layer].register_forward_hook(replace)
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]
        hook.remove()
        return logits

    for layer, node in enumerate(nodes):
        ends = []
        hook = node.register_forward_hook(lambda _m, _a, y, ends=ends: ends.append(y[0, -1]))
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]
        hook.remove()
        token, gradients = int(logits.argmax()), []
        for k in range(7):
            z = (k / 7 * ends[0].detach()).requires_grad_()
            last_logits(layer, z).softmax(-1)[token].backward()
            gradients.append(z.grad)
        want = torch.stack(gradients).mean(0) * ends[0].detach()
        assert (result.scores[0, layer] - want).norm() <= 1e-4 * want.norm()
    alone = loki.attribute(model, PROMPTS[:1])
    assert torch.allclose(result.scores[1], alone.scores[0], rtol=1e-3, atol=1e-7)
    again = loki.attribute(model, [prompt, PROMPTS[0]], engine="reforward")
    assert torch.allclose(again.scores, result.scores, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["lists", "arrays"])
@pytest.mark.parametrize("build", [llava, qwen_vl])
def test_images_of_a_data_set(build, kind):
    """Rows of ``dataset.map(processor)`` hold lists or arrays; Qwen's say which tokens are images'.

    Without that its positions count an image's tokens as a text's.
    """
    prompt, model = with_image(build), build()
    convert = {"lists": torch.Tensor.tolist, "arrays": torch.Tensor.numpy}[kind]
    row = {name: convert(x) for name, x in prompt.items()} | {"image": "a.png", "labels": [1]}
    want = loki.attribute(model, [prompt])
    assert torch.equal(loki.attribute(model, [row]).scores, want.scores)
    of_tokens = [name for name in row if name in ("input_ids", "mm_token_type_ids")]
    flat = row | {name: convert(prompt[name][0]) for name in of_tokens}
    flat.pop("attention_mask", None)
    assert torch.equal(loki.attribute(model, [flat]).scores, want.scores)
    with pytest.raises(ValueError, match="images or sounds"):
        loki.mean_activations(model, [row])


def test_a_processors_batch_of_text_is_no_image():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    batch = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    got = loki.attribute(qwen_vl(), [batch])
    want = loki.attribute(qwen_vl(), [{"input_ids": ids}])
    assert got.run["engine"] == want.run["engine"]
    assert torch.equal(got.scores, want.scores)


@pytest.mark.parametrize("engine", ["decode", "reforward"])
def test_logits_that_are_wider_than_the_model(engine, monkeypatch):
    """Nemotron-H's are float32 in bfloat16 too, and agree as bfloat16's do."""
    model = lfm2().to(torch.bfloat16)
    prompts = [{"input_ids": torch.arange(20) % 90}]
    want = loki.attribute(model, prompts, engine=engine)
    monkeypatch.setitem(integration._GUARD_TOLERANCE, torch.float32, -1.0)  # which nothing meets
    own = type(model.lm_head).forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: own(model.lm_head, x).float())
    got = loki.attribute(model, prompts, engine=engine)
    assert (got.scores - want.scores).norm() <= 0.05 * want.scores.norm()


def test_decode_asks_for_no_logits_of_the_prompt():
    model, sizes = mixtral(), []
    model.lm_head.register_forward_hook(lambda _m, _a, y: sizes.append(y.shape[1]))
    loki.attribute(model, [{"input_ids": torch.arange(30)}], engine="decode")
    assert max(sizes) < 29  # the trial of the engine is shorter


def test_images_have_to_come_before_the_staircase_is_chosen():
    with pytest.raises(loki.UnsupportedModelError, match="images or sounds"):
        loki.attribute(llava(), [with_image(llava)], engine="staircase")
    batch = {
        "input_ids": torch.tensor([[5, 90], [5, 90]]),
        "pixel_values": torch.ones(2, 3, 28, 28),
    }
    with pytest.raises(ValueError, match="by itself"):
        loki.attribute(llava(), [batch])


def test_a_chat_with_an_image_needs_a_processor_that_reads_it():
    with pytest.raises(TypeError, match="processor"):
        loki.attribute(llava(), [chat_with_image()], tokenizer=processor(llava).tokenizer)
    broken = [{"role": "user", "content": [{"type": "image", "image": 3}]}]
    with pytest.raises(ValueError, match="refused by the processor"):
        loki.attribute(llava(), [broken], tokenizer=processor(llava))


def test_what_is_saved_and_then_written_has_its_own_gradient():
    """torch's own context takes tensors for others that lie where earlier ones were freed."""
    state = SimpleNamespace(layers=[None])  # none that is known to be left as it is
    want = sum(2.0 * scale**2 for scale in range(1, 31))
    for _ in range(20):
        leaf = torch.ones(64, requires_grad=True)
        with copies._mutable(state):
            total = torch.zeros(())
            for scale in range(1, 31):
                scaled = leaf * scale
                product = scaled * scaled
                scaled.mul_(0)
                total = total + product.sum()
                del scaled, product
            (gradient,) = torch.autograd.grad(total, leaf)
        assert torch.equal(gradient, torch.full_like(gradient, want))
