"""What a model is taken for: the text decoder's FFNs, or a refusal that names the reason."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import nn

import loki_kernels as loki
from loki_kernels.attribution.definitions import DEFINITIONS
from loki_kernels.attribution.reference import attribute_reference
from loki_kernels.cli import main
from loki_kernels.discovery import find_structure, is_mixer
from tests.architectures import (
    PROMPT,
    built,
    falcon_h1,
    glm_moe,
    internvl,
    lfm2,
    mamba,
    nemotron_latent,
)
from tests.models import TINY, assert_unchanged, build_model, snapshot
from tests.tiny_training import train


def test_the_text_tower_is_patched_beside_a_vision_tower_of_equal_depth():
    model = internvl()
    names = [down_proj.name for down_proj in find_structure(model).projections()]
    assert names == [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(3)]
    with loki.patch(model, [[1, 5], [0], [7]]) as handle:
        assert list(handle.report.patched) == names
        model(**{k: torch.tensor([v]) for k, v in PROMPT[0].items()}).logits.sum().backward()
        assert all(layer.update.grad.abs().sum() > 0 for _, layer in handle.named_layers())


def test_models_without_an_ffn_are_refused_before_anything_changes():
    model = mamba()
    before = snapshot(model)
    for use in (
        lambda: loki.patch(model, [[1]] * 3),
        lambda: loki.suppress(model, [[1]] * 3).__enter__(),
        lambda: loki.attribute(model, PROMPT),
    ):
        with pytest.raises(loki.UnsupportedModelError, match="no decoder layer of Mamba"):
            use()
    assert_unchanged(model, before)


def test_latent_experts_end_in_what_leads_out_of_them():
    """It is narrower than the shared expert's, and a part of the FFN like it."""
    model = nemotron_latent()
    ffns = find_structure(model).ffns
    assert ffns[1] is None
    blocks = [model.model.layers[i].mixer for i in (2, 3)]
    assert [ffn.nodes for ffn in ffns[2:]] == [(block,) for block in blocks]
    for ffn in ffns[2:]:
        names = [down.name.rpartition("mixer.")[2] for down in ffn.projections]
        assert names == ["shared_experts.down_proj", "fc2_latent_proj"]
    ids = torch.tensor([PROMPT[0]["input_ids"]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loki.patch(model, [[1, 5], [], [0], [7]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = model.state_dict()
    changed = {n: (trained[n] != t).nonzero()[:, :1].unique().tolist() for n, t in before.items()}
    assert {n.partition("layers.")[2]: rows for n, rows in changed.items() if rows} == {
        "0.mixer.down_proj.weight": [1, 5],
        "2.mixer.fc2_latent_proj.weight": [0],
        "2.mixer.shared_experts.down_proj.weight": [0],
        "3.mixer.fc2_latent_proj.weight": [7],
        "3.mixer.shared_experts.down_proj.weight": [7],
    }


def test_latent_experts_may_have_the_models_width_by_chance():
    """Muse Spark's gate and up projections have 8192 rows together, and the model that width."""
    model = nemotron_latent()
    for layer in model.model.layers[2:]:
        layer.mixer.experts.up_proj = nn.Parameter(torch.zeros(4, 48, 20))
    for ffn in find_structure(model).ffns[2:]:
        names = [down.name.rpartition("mixer.")[2] for down in ffn.projections]
        assert names == ["shared_experts.down_proj", "fc2_latent_proj"]


def test_experts_that_write_the_models_width_in_an_unknown_way_are_refused():
    """Beside a shared expert, which would be a part of the FFN."""
    model = glm_moe()
    for layer in model.model.layers[1:]:
        experts = layer.mlp.experts
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:, :-1].detach().clone())
    with pytest.raises(loki.UnsupportedModelError, match="no experts' down-projection"):
        find_structure(model)


@pytest.mark.parametrize("build", [lfm2, falcon_h1])
def test_hybrids_train_from_given_rows(build):
    model = build()
    ids = torch.tensor([PROMPT[0]["input_ids"]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = loki.patch(model, [[1, 5], [0], [7]])
    train(model, steps=2, input_ids=ids, labels=ids)
    trained = model.state_dict()
    changed = {n: (trained[n] != t).nonzero()[:, :1].unique().tolist() for n, t in before.items()}
    assert {n: rows for n, rows in changed.items() if rows} == {
        f"{name}.weight": rows
        for name, rows in zip(handle.report.patched, [[1, 5], [0], [7]], strict=True)
    }


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
    assert "mlp.down_proj.weight [48, 112], rows along axis 0" in text
    assert "GB in float32" in text
    glm_moe().config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "layer 1-2      mlp.experts.down_proj [4, 48, 24], rows along axis 1; " in text
    assert "mlp.shared_experts.down_proj.weight [48, 24], rows along axis 0" in text


def test_inspect_counts_the_memory_of_training(tmp_path, capsys):
    """Of an 8B model, as docs/concepts.md has it."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=128256, num_key_value_heads=8, dtype=torch.bfloat16
    )
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "weights: 16.1 GB in bfloat16" in text
    assert "34.8 GB for all rows, protected; 4.3 GB with quota=10, protect=True; 3.4 GB" in text


def test_a_quantized_checkpoint_is_named(tmp_path, capsys):
    config = transformers.LlamaConfig(**TINY)
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "quantized (fp8): what follows is of the model without" in capsys.readouterr().out


def of_equal_widths():
    """gate_proj and up_proj have the shape of down_proj."""
    config = transformers.LlamaConfig(**(TINY | {"intermediate_size": TINY["hidden_size"]}))
    return built(transformers.LlamaForCausalLM, config)


@pytest.mark.parametrize("fuse_mlp", [False, True])
def test_among_linears_of_one_shape_the_down_projection_is_what_ends_the_mlp(fuse_mlp):
    model = of_equal_widths()
    names = [down_proj.name for down_proj in find_structure(model.train()).projections()]
    assert names == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    ids = torch.tensor([PROMPT[0]["input_ids"]])
    scores = loki.attribute(model.eval(), PROMPT, definition="published").scores[0]
    want = attribute_reference(model, ids[0], definition=DEFINITIONS["published"])
    torch.testing.assert_close(scores.double(), want.double(), rtol=1e-4, atol=1e-6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loki.patch(model, [[1, 5], [0], [7]], fuse_mlp=fuse_mlp)
    assert [down_proj.name for down_proj in find_structure(model).projections()] == names
    train(model, steps=2, input_ids=ids, labels=ids)
    trained = model.state_dict()
    changed = {n: (trained[n] != t).nonzero()[:, :1].unique().tolist() for n, t in before.items()}
    assert {n: rows for n, rows in changed.items() if rows} == {
        f"{name}.weight": rows for name, rows in zip(names, [[1, 5], [0], [7]], strict=True)
    }


def test_neither_adapters_nor_offloaded_weights_hide_what_ends_an_mlp():
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    options = {"r": 2, "target_modules": ["gate_proj", "down_proj"]}
    wrapped = peft.get_peft_model(of_equal_widths(), peft.LoraConfig(**options))
    assert [down_proj.name for down_proj in find_structure(wrapped).projections()] == names
    placed = cpu_offload(of_equal_widths())
    assert [down_proj.name for down_proj in find_structure(placed).projections()] == names
    assert all(parameter.is_meta for parameter in placed.parameters())


def test_a_layer_whose_down_projection_cannot_be_told_is_refused():
    """Where the MLP does not end in a linear, or its code takes more than hidden states."""
    for forward in (lambda self, x: 2 * self.down_proj(x), lambda self, x, y: self.down_proj(x)):
        model = of_equal_widths()
        mlp = model.model.layers[1].mlp
        mlp.__class__ = type("MLP", (type(mlp),), {"forward": forward})
        before = snapshot(model)
        with pytest.raises(loki.UnsupportedModelError, match=r"layers.1.*could be the FFN's"):
            loki.patch(model, [[1]] * 3)
        assert_unchanged(model, before)


def test_a_raw_matrix_is_a_part_of_an_ffn_if_another_has_its_inner_width():
    """Inkling-2's three queries over earlier layers are none, DBRX's experts are."""
    model = build_model()
    layer = model.model.layers[1]
    layer.residual = nn.Module()
    layer.residual.query = nn.Parameter(torch.zeros(3, 48))
    assert len(list(find_structure(model).projections())) == 3
    for feeding in (190, 380):
        layer.experts = nn.Module()
        layer.experts.up = nn.Parameter(torch.zeros(feeding, 48))
        layer.experts.down = nn.Parameter(torch.zeros(190, 48))
        with pytest.raises(loki.UnsupportedModelError, match=r"experts.up .*neither a linear"):
            find_structure(model)


def test_trained_tokens_of_an_adapter_hide_no_embedding():
    """PEFT's wrapper of them gives another weight at every access."""
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}
    wrapped = peft.get_peft_model(build_model(), peft.LoraConfig(**options))
    names = [down_proj.name for down_proj in find_structure(wrapped).projections()]
    assert names == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]


@pytest.mark.parametrize(
    "parameters", [["experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj"]]
)
def test_experts_inside_lora_of_their_parameters(parameters):
    """Beside a shared expert, whose width says nothing of theirs; one wrapper in another, too."""
    config = transformers.Qwen2MoeConfig(
        **TINY | {"num_hidden_layers": 2, "num_key_value_heads": 4},
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    names = [down_proj.name for down_proj in find_structure(model).projections()]
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters)
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = find_structure(adapted)
    assert [down_proj.name for down_proj in found.projections()] == names
    assert names[0] == "model.layers.0.mlp.experts"
    with pytest.raises(ValueError, match="PEFT adapter"):
        loki.patch(adapted, [[1]] * 2, protect=False)
    read = [[5, 6, 7, 8, 9, 10]]
    scores = loki.attribute(adapted, PROMPT, steps=4).scores
    totals = loki.estimate_protection(adapted, read).totals
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(scores, loki.attribute(merged, PROMPT, steps=4).scores)
    assert totals == pytest.approx(loki.estimate_protection(merged, read).totals)
