"""A class of each kind; ``python -m tests.zoo`` checks them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from .check import TRIALS, check

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
def test_is_exact_or_refused_as_the_documentation_says(name: str) -> None:
    """A model that was exact and is refused is a loss, though nothing is wrong of it."""
    outcome = check(name)
    assert outcome.not_built is None
    assert not outcome.failures, str(outcome)
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    said = [cell.split()[0] for cell in line.split("|")[2:5]]
    found = [verdict.kind.split()[0] for _, verdict in outcome.verdicts]
    if f"transformers {transformers.__version__}," not in text:
        # Another version may have made a class exact that was refused.
        wanted = list(TRIALS.values())
        said = [
            word if word == best else now
            for word, best, now in zip(said, wanted, found, strict=True)
        ]
    assert found == said, str(outcome)
