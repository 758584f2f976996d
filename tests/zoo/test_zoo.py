"""A class of each kind; ``python -m tests.zoo`` checks them all."""

from __future__ import annotations

import pytest

from .check import check

KINDS = (
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "PaliGemmaForConditionalGeneration",  # a prefix that is not causal
    "LlavaForConditionalGeneration",
    "InternVLForConditionalGeneration",  # towers of equal depth
    "Qwen3VLForConditionalGeneration",
    "Glm4MoeForCausalLM",  # experts and a shared one, dense first layers
    "DeepseekV3ForCausalLM",  # latent attention
    "Llama4ForCausalLM",  # its own experts, transposed
    "Qwen3NextForCausalLM",
    "GraniteMoeHybridForCausalLM",  # two branches summed in the layer
    "MixtralForCausalLM",
    "GptOssForCausalLM",  # attention sinks
    "MambaForCausalLM",  # no FFN
    "FalconMambaForCausalLM",
    "FalconH1ForCausalLM",  # a multiplier at the head
    "RecurrentGemmaForCausalLM",
    "NemotronHForCausalLM",  # one mixer a layer, the FFN being one
    "Lfm2ForCausalLM",
    "Qwen3_5ForCausalLM",
    "Gemma4ForCausalLM",
    "OPTForCausalLM",  # fc2 in the layer
    "MptForCausalLM",
    "BloomForCausalLM",  # its MLP adds the residual
    "GPT2LMHeadModel",  # transposed weights
    "GPTNeoForCausalLM",
    "BertLMHeadModel",
    "HrmTextForCausalLM",  # layers run repeatedly
    "ZambaForCausalLM",  # layers are shared
    "T5Gemma2ForConditionalGeneration",  # an encoder beside the decoder
)


@pytest.mark.parametrize("name", KINDS)
def test_is_exact_or_refused(name: str) -> None:
    outcome = check(name)
    assert outcome.not_built is None
    assert not outcome.failures, str(outcome)
