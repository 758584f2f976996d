from __future__ import annotations

import copy
import errno
import math
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import transformers

import loki_kernels as loki
from loki_kernels.attribution import DEFINITIONS, attribute, plan, steering
from loki_kernels.attribution.definitions import path_rule
from loki_kernels.attribution.reference import attribute_reference
from loki_kernels.discovery import find_structure
from tests.architectures import gpt2
from tests.attribution.compiled import check_compiled
from tests.models import ARCHITECTURES, DEVICE, assert_unchanged, build_model, snapshot, to_device


def norm_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.cpu().double(), want.cpu().double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


@pytest.mark.parametrize("site", ["down_proj", "ffn_neurons"])
@pytest.mark.parametrize("definition", ["published", "paper", "captum"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_naive_reforward(name, definition, site, prompts):
    """Ragged batch against one-at-a-time, one-layer-at-a-time full forwards, two precisions."""
    for dtype, tolerance in ((torch.float64, 3e-7), (torch.float32, 1e-5)):
        model = build_model(name, dtype)
        result = attribute(model, prompts, definition=definition, site=site)
        for i, prompt in enumerate(prompts):
            want = attribute_reference(
                model,
                to_device(prompt["input_ids"]),
                definition=replace(DEFINITIONS[definition], site=site),
            )
            assert norm_error(result.scores[i], want) <= tolerance


def test_hooks_go_if_registering_one_fails(prompts):
    """Of the second layer: the first one's hook is there already."""
    model = build_model()
    before = snapshot(model)
    structure = find_structure(model)
    broken = structure.layers[1]
    broken.register_forward_pre_hook = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        attribute(model, prompts)
    del broken.register_forward_pre_hook
    assert_unchanged(model, before)


def test_two_attributions_through_one_config_are_an_error(prompts):
    model = build_model()
    entered = []

    def attribute_inside(*_):
        if not entered:
            entered.append(True)
            with pytest.raises(RuntimeError, match="another attribution of this model"):
                attribute(model, prompts)

    before = snapshot(model)
    hook = model.model.layers[2].register_forward_hook(
        lambda *_: attribute_inside() if hasattr(model.config, steering._ATTEND) else None
    )
    attribute(model, prompts)
    hook.remove()
    assert entered
    assert_unchanged(model, before)


def test_an_output_head_that_is_not_here_is_named(prompts):
    model = build_model()
    model.lm_head.to("meta")
    with pytest.raises(loki.UnsupportedModelError, match="is not in memory"):
        attribute(model, prompts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captum_definition_equals_captum(name, prompts):
    attr = pytest.importorskip("captum.attr")
    model = build_model(name, torch.float64)
    result = attribute(model, prompts, definition="captum")
    for i, prompt in enumerate(prompts):
        ids = to_device(prompt["input_ids"][None])

        def forward(ids):
            return model(ids, use_cache=False).logits[:, -1].softmax(-1)

        for layer, ffn in enumerate(find_structure(model).ffns):
            explainer = attr.LayerIntegratedGradients(forward, ffn.nodes[0])
            want = explainer.attribute(
                ids, target=int(result.targets[i]), n_steps=7, method="riemann_trapezoid"
            )
            assert norm_error(result.scores[i, layer], want[0, -1]) <= 1e-5


@pytest.mark.parametrize("rule", ["left", "right", "midpoint", "trapezoid", "gauss-legendre"])
@pytest.mark.parametrize("baseline", ["zero", "token_zero"])
@pytest.mark.parametrize("path", ["last_token", "sequence"])
@pytest.mark.parametrize("objective", ["probability", "logit", "log_probability"])
def test_every_override(rule, baseline, path, objective, prompts):
    model = build_model(dtype=torch.float64)
    options = {"rule": rule, "baseline": baseline, "path": path, "objective": objective}
    result = attribute(model, prompts[1:2], steps=5, **options)
    want = attribute_reference(
        model,
        to_device(prompts[1]["input_ids"]),
        definition=replace(DEFINITIONS["published"], **options),
        steps=5,
    )
    assert norm_error(result.scores[0], want) <= 3e-7


def test_completeness_shrinks_with_steps(prompts):
    """Σ score → F(z) − F(0) as m grows, and `change` is that difference, measured directly."""
    model = build_model(dtype=torch.float64)
    for baseline in ("zero", "token_zero"):
        options = {"baseline": baseline, "rule": "gauss-legendre"}
        coarse = attribute(model, prompts, steps=2, **options)
        fine = attribute(model, prompts, steps=40, **options)
        assert fine.completeness.abs().max() < 1e-5
        assert fine.completeness.abs().mean() < 0.2 * coarse.completeness.abs().mean()
    target = model.model.layers[1].mlp.down_proj
    ids = to_device(prompts[2]["input_ids"][None])

    def silence(_module, _args, output):
        output = output.clone()
        output[:, -1] = 0
        return output

    token = int(model(ids).logits[0, -1].argmax())
    whole = model(ids).logits[0, -1].softmax(-1)[token]
    handle = target.register_forward_hook(silence)
    without = model(ids).logits[0, -1].softmax(-1)[token]
    handle.remove()
    result = attribute(model, [prompts[2]])
    assert float(result.change[0, 1]) == pytest.approx(float(whole - without), rel=1e-5)
    assert float(result.value[0]) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("definition", ["paper", "captum"])
def test_definitions_without_completeness(model, prompts, definition):
    result = attribute(model, prompts, definition=definition)
    assert result.completeness is None
    assert result.change is None


def test_rules_integrate_polynomials():
    for rule in ("left", "right", "midpoint", "trapezoid", "gauss-legendre"):
        alphas, weights = path_rule(rule, 200)
        assert float(weights.sum()) == pytest.approx(1.0)
        assert float((weights * alphas**3).sum()) == pytest.approx(0.25, abs=3e-3)
    alphas, weights = path_rule("captum_trapezoid", 7)
    assert float(weights.sum()) == pytest.approx(6 / 7)
    assert alphas[0] == 0
    assert alphas[-1] == 1


def test_batching_and_padding_do_not_matter(prompts):
    model = build_model("mistral", torch.float64)
    alone = torch.cat([attribute(model, [p]).scores for p in prompts])
    together = attribute(model, prompts, batch_size=4).scores
    assert norm_error(together, alone) < 3e-7

    width = max(len(p["input_ids"]) for p in prompts)
    for side in ("left", "right"):
        ids = torch.full((len(prompts), width), 5)
        mask = torch.zeros_like(ids)
        for row, row_mask, p in zip(ids, mask, prompts, strict=True):
            n = len(p["input_ids"])
            part = slice(width - n, width) if side == "left" else slice(0, n)
            row[part], row_mask[part] = p["input_ids"], 1
        padded = attribute(model, [{"input_ids": ids, "attention_mask": mask}]).scores
        assert norm_error(padded, alone) < 3e-7


def test_target_is_attributed(model, prompts):
    free = attribute(model, prompts)
    same = attribute(model, prompts, target=free.targets)
    assert torch.equal(free.scores, same.scores)
    other = attribute(model, prompts, target=(free.targets + 1) % 97)
    assert norm_error(other.scores, free.scores) > 0.1
    want = attribute_reference(
        model, to_device(prompts[2]["input_ids"]), target=int((free.targets[2] + 1) % 97)
    )
    assert norm_error(other.scores[2], want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype, prompts):
    """Within twice the error of the naive procedure in the same dtype, on the same tokens."""
    exact_model = build_model()
    exact = attribute(exact_model, prompts)
    half_model = copy.deepcopy(exact_model).to(dtype)
    result = attribute(half_model, prompts, target=exact.targets)
    assert result.scores.dtype == torch.float32
    naive = torch.stack(
        [
            attribute_reference(half_model, to_device(p["input_ids"]), target=int(t)).cpu()
            for p, t in zip(prompts, exact.targets, strict=True)
        ]
    )
    ours = (result.scores - exact.scores).norm()
    theirs = (naive - exact.scores).norm()
    assert ours < 2 * theirs + 1e-6


@pytest.mark.parametrize("objective", ["probability", "log_probability"])
@pytest.mark.parametrize("engine", ["staircase", "decode"])
def test_float16_keeps_the_gradients_of_sure_tokens(engine, objective):
    """1 - p = 1e-6 of them is nothing there, and ties would go to the first rows."""
    ids = torch.tensor([5, 9, 3, 40, 22])
    model = build_model().double()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97, dtype=torch.float64, device=DEVICE))
    with torch.no_grad():
        logits = model(input_ids=to_device(ids)[None]).logits[0, -1]
        target = int(logits.argmax())
        others = logits.index_fill(0, to_device(torch.tensor([target])), -torch.inf)
        model.lm_head.bias[target] += others.logsumexp(0) - logits[target] - math.log(1e-6)
    options = {"target": [target], "engine": engine, "objective": objective}
    exact = loki.attribute(model, [{"input_ids": ids}], **options)
    half = loki.attribute(model.half(), [{"input_ids": ids}], **options)
    assert half.value[0] == pytest.approx(float(exact.value[0]), abs=2e-6)
    assert norm_error(half.scores, exact.scores) < 0.1


@pytest.mark.parametrize("objective", ["probability", "log_probability"])
def test_a_probability_that_vanishes_is_said(model, objective, caplog):
    """Of a long answer; its logarithm does not."""
    answer = list(range(3, 60))
    result = loki.attribute(model, [{"input_ids": [5, 9, 3]}], target=[answer], objective=objective)
    assert bool((result.value.abs() < 1e-30).all()) == (objective == "probability")
    assert ("objective='log_probability'" in caplog.text) == (objective == "probability")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_model_is_left_as_found(context, prompts):
    for name in ("llama", "gemma2"):
        model = build_model(name)
        model.train()
        model.model.layers[0].eval()
        model.lm_head.weight.requires_grad_(False)
        before = snapshot(model)
        want = attribute(model.eval(), prompts)
        model.train()
        model.model.layers[0].eval()
        with context():
            got = attribute(model, prompts)
        assert torch.equal(got.scores, want.scores)
        assert_unchanged(model, before)


def test_model_is_left_as_found_after_an_exception(model, prompts):
    model.train()
    before = snapshot(model)

    class Interrupt(BaseException):
        pass

    def interrupt(_module, _args):
        raise Interrupt

    handle = model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        attribute(model, prompts)
    handle.remove()
    assert_unchanged(model, before)
    attribute(model, prompts)


def test_peft_model(prompts):
    import peft

    model = build_model(dtype=torch.float64)
    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2),
    ).double()
    got = attribute(wrapped, prompts)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    want = attribute(merged, prompts)
    assert norm_error(got.scores, want.scores) < 1e-6
    assert norm_error(got.scores, attribute(model, prompts).scores) > 1e-2


def test_patched_model(model, prompts):
    want = attribute(model, prompts)
    with loki.patch(model, [[1, 5], [0], [3]]):
        assert norm_error(attribute(model, prompts).scores, want.scores) < 1e-5


def test_under_autocast_and_from_a_data_loader(model, prompts):
    want = attribute(model, prompts)
    loader = torch.utils.data.DataLoader([p["input_ids"] for p in prompts[1:2]], batch_size=1)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = attribute(model, ({"input_ids": ids} for ids in loader))
    assert norm_error(got.scores, want.scores[1:2]) < 1e-5


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_of_a_trainer_are_not_ours(model, prompts, precision):
    """A CPU with bfloat16 products takes them for "medium", a GPU TF32 for both."""
    want = loki.attribute(model, prompts)
    seen = set()
    model.model.norm.register_forward_hook(
        lambda *_: seen.add(torch.backends.cuda.matmul.fp32_precision)
    )
    torch.set_float32_matmul_precision(precision)
    try:
        got = loki.attribute(model, prompts)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"ieee"}
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-9)


def test_a_prompts_rotary_embedding_is_its_own():
    """LongRoPE takes its frequencies by the longest sequence of a batch."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8}
    config = ARCHITECTURES["phi3"]()
    config.rope_parameters = rope | factors
    config.original_max_position_embeddings = 8
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    prompts = [{"input_ids": torch.arange(n)} for n in (6, 10, 8, 9)]
    together = loki.attribute(model, prompts)
    alone = torch.cat([loki.attribute(model, [prompt]).scores for prompt in prompts])
    torch.testing.assert_close(together.scores, alone, rtol=1e-4, atol=1e-8)
    mean = loki.mean_activations(model, prompts)
    torch.testing.assert_close(mean, loki.mean_activations(model, prompts, batch_size=1))
    # the longer ones have the same frequencies, and are a batch
    assert plan.rotary_border(model) == (8, False)


@pytest.mark.parametrize("engine", ["staircase", "decode", "reforward"])
def test_a_dynamic_rotary_embedding_keeps_no_other_prompts_length(engine):
    """It has the frequencies of the longest prompt so far, of a batch or an earlier call."""
    config = ARCHITECTURES["llama"]()
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    prompts = [{"input_ids": torch.arange(n)} for n in (20, 40, 16, 20)]
    assert plan.rotary_border(model) == (16, True)
    alone = torch.cat(
        [attribute(copy.deepcopy(model), [p], engine=engine).scores for p in prompts]
    )  # fmt: skip
    for options in ({}, {"batch_size": 1}, {"batch_size": 4}):
        together = attribute(model, prompts, engine=engine, **options)
        assert norm_error(together.scores, alone) < 1e-4
    mean = loki.mean_activations(copy.deepcopy(model), prompts[:1])
    attribute(model, prompts[1:2], engine=engine)
    torch.testing.assert_close(loki.mean_activations(model, prompts[:1]), mean)


def opt():
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=48, eos_token_id=2,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).to(DEVICE).eval()


def roberta():
    """Of whose positions the first two are the padding's."""
    config = transformers.RobertaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=34, pad_token_id=1, is_decoder=True,
    )  # fmt: skip
    return transformers.RobertaForCausalLM(config).to(DEVICE).eval()


@pytest.mark.parametrize("build", [gpt2, opt, roberta])
def test_a_prompt_beyond_the_learned_positions_is_refused_before_any_work(build):
    """Each engine would fail there, and a GPU does nothing more for the process after it."""
    model = build()
    fits, over = ({"input_ids": torch.arange(3, 3 + n)} for n in (32, 33))
    assert len(attribute(model, [fits], steps=1).targets) == 1
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    table = r"(wpe|embed_positions|.*position_embeddings)"
    message = rf"prompt 1 has 33 tokens, and .* has 32 positions \({table}\)"
    with pytest.raises(ValueError, match=message):
        attribute(model, [fits, over])
    with pytest.raises(ValueError, match=message):
        loki.mean_activations(model, [fits, over])
    with pytest.raises(ValueError, match="prompt 0 has 33 tokens"):  # the last is no input
        attribute(model, [fits], target=[[3, 4]], objective="log_probability")


def test_prompts_beyond_a_rotary_embeddings_length_are_told_once(model, caplog):
    """They are attributed: what it predicts there is the model's affair."""
    assert model.config.max_position_embeddings == 64
    lengths = (64, 65, 66)
    prompts = [{"input_ids": torch.arange(n) % 97} for n in lengths]
    assert len(attribute(model, prompts, steps=1).targets) == 3
    assert caplog.text.count("max_position_embeddings") == 1
    assert "prompt 1 has 65 tokens, more than the 64" in caplog.text


def test_prompt_tuning_is_refused(model, prompts):
    """What it adds, the transformers model inside knows nothing of."""
    import peft

    tuned = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(loki.UnsupportedModelError, match="prompt-learning"):
        loki.attribute(tuned, prompts)
    loki.attribute(tuned.get_base_model(), prompts)


def test_out_leaves_no_file_after_an_exception(model, prompts, tmp_path):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite"):
        attribute(model, prompts, out=tmp_path / "scores.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("engine", [None, "decode", "reforward"])
def test_nan_is_named_whatever_the_models_code_makes_of_it(model, prompts, engine, raises):
    """Some code raises on NaN, once it meets the points."""
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")

    def refuse(module, args):
        if raises and torch.is_grad_enabled():
            assert not args[0].isnan().any(), "NaN"

    model.model.layers[2].mlp.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is not finite"):
        attribute(model, prompts, engine=engine)


def test_a_full_disk_is_an_os_error(model, prompts, tmp_path, monkeypatch):
    def full(_tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    result = attribute(model, prompts)
    (tmp_path / "a.safetensors").write_bytes(b"older")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written: .*No space left"):
        result.save(tmp_path / "a.safetensors")
    loki.patch(model, [[1], [2], [3]], rank=1)
    with pytest.raises(OSError, match="No space left"):
        loki.save_adapter(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"older"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_out_finds_a_full_disk_before_any_work(model, prompts, tmp_path, monkeypatch):
    def full(*_a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(OSError, match="No space left"):
        attribute(model, prompts, out=tmp_path / "scores.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_save_load_round_trip(model, prompts, tmp_path, suffix):
    result = attribute(model, prompts)
    path = tmp_path / f"a{suffix}"
    result.save(path)
    loaded = loki.Attribution.load(path)
    assert torch.equal(loaded.scores, result.scores)
    assert torch.equal(loaded.targets, result.targets)
    assert torch.equal(loaded.completeness, result.completeness)
    assert loaded.run == result.run
    assert loaded.run["definition"] == "published"
    assert loaded.run["versions"]["torch"] == torch.__version__


def test_authors_hdf5_layout(tmp_path):
    import h5py

    scores = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float16)
    with h5py.File(tmp_path / "log.h5", "w") as file:
        file["dataset"] = scores
    loaded = loki.Attribution.load(tmp_path / "log.h5")
    assert np.array_equal(loaded.scores.numpy(), scores.astype(np.float32))
    assert loki.select(loaded, 25).counts == [2, 2, 2]


def test_damaged_files(model, prompts, tmp_path):
    path = tmp_path / "a.safetensors"
    attribute(model, prompts).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        loki.Attribution.load(path)
    (tmp_path / "b.h5").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a whole HDF5"):
        loki.Attribution.load(tmp_path / "b.h5")
    with pytest.raises(FileNotFoundError):
        loki.Attribution.load(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="save to"):
        attribute(model, prompts).save(tmp_path / "a.pickle")


def test_heatmap(model, prompts, tmp_path):
    path = tmp_path / "map.png"
    attribute(model, prompts).heatmap(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png"):
        attribute(model, prompts).heatmap(tmp_path / "map.svg")


def ids(*values):
    return {"input_ids": list(values)}


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "prompts is empty"),
        ([ids()], {}, ValueError, "prompt 0 is empty"),
        ([ids(1), ids(1, 97)], {}, ValueError, "prompt 1 holds token id 97"),
        ([ids(1, -1)], {}, ValueError, "token id -1"),
        (
            [{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}],
            {},
            ValueError,
            "prompt 0 has holes",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [0, 0]}],
            {},
            ValueError,
            "prompt 0 is empty",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            {},
            ValueError,
            "differ in shape",
        ),
        ([{"tokens": [1]}], {}, ValueError, "no input_ids"),
        ([{"input_ids": [0.5]}], {}, ValueError, "must be integers"),
        (["text"], {}, TypeError, "tokenizer is needed"),
        ([3], {}, TypeError, "prompt 0 is a int"),
        ("text", {}, TypeError, "not one prompt"),
        ([ids(1)], {"definition": "mine"}, ValueError, "unknown"),
        ([ids(1)], {"rules": "left"}, ValueError, "unknown option rules"),
        ([ids(1)], {"rule": "simpson"}, ValueError, "rule='simpson'"),
        ([ids(1)], {"multiply": 1}, ValueError, "multiply"),
        ([ids(1)], {"steps": 0}, ValueError, "steps"),
        ([ids(1)], {"steps": 1, "rule": "trapezoid"}, ValueError, "steps >= 2"),
        ([ids(1)], {"batch_size": 0}, ValueError, "batch_size"),
        ([ids(1)], {"target": [1, 2]}, ValueError, "one token id for each"),
        ([ids(1)], {"target": [97]}, ValueError, "outside the vocabulary"),
        ([ids(1)], {"out": "scores.bin"}, ValueError, r"\.safetensors"),
        ([ids(1)], {"out": "/no/such/folder/a.safetensors"}, FileNotFoundError, "does not exist"),
    ],
)
def test_bad_input(model, prompts, options, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attribute(model, prompts, **options)
    assert_unchanged(model, before)


def test_unresolved_path_is_reported(prompts, caplog):
    """Norms after the FFN make the path through zero singular; the user is told."""
    attribute(build_model("llama"), prompts)
    assert not caplog.records
    attribute(build_model("olmo2"), prompts)
    assert "do not add up" in caplog.text


def test_guard_names_the_layer_that_mixes_tokens(model, prompts):
    def mix(_module, _args, output):
        return torch.cat([output[:, :1], output[:, 1:] + 0.5 * output[:, :-1]], dim=1)

    model.model.layers[1].post_attention_layernorm.register_forward_hook(mix)
    before = snapshot(model)
    with pytest.raises(loki.UnsupportedModelError, match="after layer 1"):
        attribute(model, prompts[2:3])
    assert_unchanged(model, before)


def test_a_head_that_is_not_what_the_config_says_is_left_to_decode(model, prompts):
    hook = model.lm_head.register_forward_hook(lambda _m, _a, output: 2 * output)
    with pytest.raises(loki.UnsupportedModelError, match="output head"):
        attribute(model, prompts, engine="staircase")
    result = attribute(model, prompts)
    assert result.run["engine"] == "decode"
    for scores, prompt in zip(result.scores, prompts, strict=True):
        want = attribute_reference(model, to_device(prompt["input_ids"]))
        assert norm_error(scores, want) <= 1e-5
    hook.remove()


def test_models_without_a_head_are_refused(prompts):
    decoder = build_model().model
    before = snapshot(decoder)
    with pytest.raises(loki.UnsupportedModelError, match="no linear output head"):
        attribute(decoder, prompts)
    assert_unchanged(decoder, before)


def test_models_without_a_config(prompts):
    with pytest.raises(loki.UnsupportedModelError, match="no transformers config"):
        attribute(torch.nn.Linear(3, 3), prompts)


def test_gradient_checkpointing_model(model, prompts):
    want = attribute(model, prompts)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(attribute(model, prompts).scores, want.scores)


def test_memory_does_not_grow_with_samples(tmp_path):
    """With out=, nothing of the scores' size is allocated; without it, it is."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=31,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    samples = 1000
    size = samples * 3 * 1024 * 4
    peaks = []
    for out in (tmp_path / "scores.safetensors", None):
        tracemalloc.start()  # numpy reports its arrays to it; torch's differ by batch alone
        result = loki.attribute(
            model, [{"input_ids": [1, 2]}] * samples, steps=1, batch_size=100, out=out
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result.scores.shape == (samples, 3, 1024)
    assert peaks[0] < size / 4
    assert peaks[1] > size


def test_staircase_compiles_whole():
    """The points forward and back to the leaves, every hook included, without a graph break."""
    check_compiled(build_model(), 7)


def test_weights_that_zero3_has_split_are_refused():
    model = build_model()
    before = snapshot(model)
    model.lm_head.weight.ds_id = 0  # as every parameter has then
    with pytest.raises(loki.UnsupportedModelError, match="ZeRO-3"):
        attribute(model, [{"input_ids": [1, 2, 3]}])
    del model.lm_head.weight.ds_id
    assert_unchanged(model, before)
