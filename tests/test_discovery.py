"""What a model is taken for: the text decoder's FFNs, or a refusal that names the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import loki_kernels as loki
from loki_kernels.cli import main
from loki_kernels.discovery import find_structure, is_mixer
from tests.models import GQA, TINY, assert_unchanged, build_model, snapshot

PROMPT = [{"input_ids": [5, 6, 7, 8, 9, 10]}]
VISION = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def built(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) == 0:
                parameter.normal_(0, 0.1)
    return model


def mixtral():
    config = transformers.MixtralConfig(**GQA, num_local_experts=2)
    return built(transformers.MixtralForCausalLM, config)


def glm_moe():
    config = transformers.Glm4MoeConfig(
        **GQA, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, head_dim=12,
    )  # fmt: skip
    return built(transformers.Glm4MoeForCausalLM, config)


def internvl():
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", **GQA},
        image_token_id=90,
    )
    return built(transformers.InternVLForConditionalGeneration, config)


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "projection_dim": 48},
        text_config={"model_type": "gemma", **GQA, "head_dim": 12},
        projection_dim=48,
        image_token_index=90,
    )
    return built(transformers.PaliGemmaForConditionalGeneration, config)


def mamba():
    config = transformers.MambaConfig(
        vocab_size=97, hidden_size=48, state_size=8, num_hidden_layers=3, time_step_rank=4
    )
    return built(transformers.MambaForCausalLM, config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=32)
    return built(transformers.GPT2LMHeadModel, config)


def falcon():
    config = transformers.FalconConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    return built(transformers.FalconForCausalLM, config)


def lfm2():
    config = transformers.Lfm2Config(
        **GQA, layer_types=["full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False, pad_token_id=0,
    )  # fmt: skip
    return built(transformers.Lfm2ForCausalLM, config)


def falcon_h1():
    config = transformers.FalconH1Config(
        **GQA, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=8, lm_head_multiplier=1.5, mlp_multipliers=[1.3, 0.7], pad_token_id=0,
    )  # fmt: skip
    return built(transformers.FalconH1ForCausalLM, config)


def test_the_text_tower_is_patched_beside_a_vision_tower_of_equal_depth():
    model = internvl()
    names = [down_proj.name for _, down_proj in find_structure(model).trainable()]
    assert names == [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(3)]
    with loki.patch(model, [[1, 5], [0], [7]]) as handle:
        assert list(handle.report.patched) == names
        model(**{k: torch.tensor([v]) for k, v in PROMPT[0].items()}).logits.sum().backward()
        assert all(layer.update.grad.abs().sum() > 0 for _, layer in handle.named_layers())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (mixtral, r"layers\.0\.mlp \(MixtralSparseMoeBlock\) holds .*mixtures of experts"),
        (glm_moe, r"layers\.1\.mlp \(Glm4MoeMoE\) holds .*mixtures of experts"),
        (mamba, "no decoder layer of MambaForCausalLM has an FFN"),
        (gpt2, r"h\.0\.mlp \(GPT2MLP\) holds .*Conv1D"),
        (falcon, "FalconLinear"),
    ],
)
def test_what_is_not_one_linear_is_refused_before_anything_changes(build, reason):
    model = build()
    before = snapshot(model)
    for use in (
        lambda: loki.patch(model, [[1]] * 3),
        lambda: loki.suppress(model, [[1]] * 3).__enter__(),
    ):
        with pytest.raises(loki.UnsupportedModelError, match=reason):
            use()
    with pytest.raises(loki.UnsupportedModelError):
        loki.attribute(model, PROMPT)
    assert_unchanged(model, before)


@pytest.mark.parametrize("build", [lfm2, falcon_h1])
def test_hybrids_train_from_given_rows(build):
    model = build()
    ids = torch.tensor([PROMPT[0]["input_ids"]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = loki.patch(model, [[1, 5], [0], [7]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.state_dict()
    changed = {n: (trained[n] != t).nonzero()[:, :1].unique().tolist() for n, t in before.items()}
    assert {n: rows for n, rows in changed.items() if rows} == {
        f"{name}.weight": rows
        for name, rows in zip(handle.report.patched, [[1, 5], [0], [7]], strict=True)
    }


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (paligemma, "earlier tokens see later ones"),
        (lfm2, "keeps another state|keeps no keys and values"),
        (falcon_h1, "keeps another state|changes what its down-projection gives"),
    ],
)
def test_attribution_that_would_be_wrong_is_refused(build, reason):
    model = build()
    before = snapshot(model)
    with pytest.raises(loki.UnsupportedModelError, match=reason):
        loki.attribute(model, PROMPT)
    assert_unchanged(model, before)


def test_a_capped_head_that_the_config_names_otherwise_is_refused(model):
    """A soft-cap shows only in large logits, which a small model's prompts do not have."""
    model.lm_head.register_forward_hook(lambda _m, _a, y: 30 * torch.tanh(y / 30))
    with pytest.raises(loki.UnsupportedModelError, match="output head"):
        loki.attribute(model, PROMPT)


def test_layers_run_twice_are_refused(model):
    decoder = model.model
    layer = decoder.layers[1]
    forward = layer.forward

    def twice(hidden_states, **options):
        return layer.forward_once(layer.forward_once(hidden_states, **options), **options)

    layer.forward_once = forward
    layer.forward = twice
    down_proj = layer.mlp.down_proj
    calls = []
    down_proj.register_forward_hook(lambda *_: calls.append(0))
    with pytest.raises(loki.UnsupportedModelError):
        loki.attribute(model, PROMPT)
    assert calls


def test_a_shared_down_projection_is_refused(model):
    model.model.layers[2].mlp.down_proj = model.model.layers[0].mlp.down_proj
    with pytest.raises(loki.UnsupportedModelError, match="share one FFN"):
        loki.patch(model, [[1]] * 3)


def test_a_shared_weight_is_refused(model):
    """Two layers would each write their own rows into it."""
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(loki.UnsupportedModelError, match="share one FFN's weight"):
        loki.patch(model, [[1]] * 3)


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_ff=112, num_layers=2, num_heads=4, d_kv=12
    )
    with pytest.raises(loki.UnsupportedModelError, match="encoder-decoder"):
        loki.patch(built(transformers.T5ForConditionalGeneration, config), [[1]] * 2)


def test_mixers_are_known_by_what_they_take():
    model = build_model()
    layer = model.model.layers[0]
    assert is_mixer(layer.self_attn)
    assert not is_mixer(layer.mlp)
    assert not is_mixer(layer.input_layernorm)
    assert not is_mixer(nn.Linear(2, 2))


def test_inspect_reads_the_config_alone(tmp_path, capsys):
    transformers.LlamaConfig(**TINY).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM: 3 decoder layers, hidden_size 48" in text
    assert "layer 0-2" in text
    assert "mlp.down_proj.weight [48, 112]: its rows (axis 0) are trained" in text
    glm_moe().config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "layer 1-2      refused: mlp (Glm4MoeMoE) holds" in text
