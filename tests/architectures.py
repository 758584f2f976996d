"""Tiny random models of families that are no plain stack of attention and one linear FFN."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.models import GQA

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


def granite_moe_hybrid():
    config = transformers.GraniteMoeHybridConfig(
        **GQA, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64,
        layer_types=["attention", "mamba", "attention"], mamba_n_heads=8, mamba_d_head=12,
        mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, pad_token_id=0,
    )  # fmt: skip
    return built(transformers.GraniteMoeHybridForCausalLM, config)


def llava():
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 48},
        text_config={"model_type": "llama", **GQA},
        image_token_id=90,
    )
    return built(transformers.LlavaForConditionalGeneration, config)


def qwen_vl():
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 48, "intermediate_size": 112, "depth": 2, "num_heads": 4,
            "out_hidden_size": 48, "patch_size": 14, "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **GQA,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2],
            },
        },
        image_token_id=90, vision_start_token_id=91, vision_end_token_id=92, video_token_id=93,
    )  # fmt: skip
    return built(transformers.Qwen2_5_VLForConditionalGeneration, config)


def deepseek():
    """Latent attention: queries and keys of 24, values of 16, of one latent vector a token."""
    config = transformers.DeepseekV3Config(
        **(GQA | {"num_key_value_heads": 4}), moe_intermediate_size=24, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
        topk_group=1, q_lora_rank=16, kv_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, pad_token_id=0,
    )  # fmt: skip
    return built(transformers.DeepseekV3ForCausalLM, config)


def nemotron_latent():
    """Experts between 48 and 20 dimensions, of which ``fc2_latent_proj`` leads back."""
    config = transformers.NemotronHConfig(
        **(GQA | {"num_hidden_layers": 4}), layers_block_type=["mlp", "attention", "moe", "moe"],
        head_dim=12, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=32, n_group=1, topk_group=1, pad_token_id=0,
    )  # fmt: skip
    if not hasattr(config, "moe_latent_size"):
        pytest.skip("this transformers has no latent experts")
    config.moe_latent_size = 20
    return built(transformers.NemotronHForCausalLM, config)


def gemma4_moe():
    """Each of a layer's two blocks has a norm of its own before they are added up."""
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this transformers has no Gemma4")
    config = transformers.Gemma4TextConfig(
        **(GQA | {"num_hidden_layers": 2}), head_dim=12, global_head_dim=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=24,
    )  # fmt: skip
    return built(transformers.Gemma4ForCausalLM, config)


def gemma4():
    """The last two of four layers attend to the keys and values of the two before."""
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this transformers has no Gemma4")
    config = transformers.Gemma4TextConfig(
        **(GQA | {"num_hidden_layers": 4}), head_dim=12, global_head_dim=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
    )  # fmt: skip
    return built(transformers.Gemma4ForCausalLM, config)
