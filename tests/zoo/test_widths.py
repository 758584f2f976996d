"""Every class at the widths and with the kinds of layers that its config has by default."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loki_kernels as loki
from loki_kernels.discovery import find_structure

from .build import config_class
from .sizes import OVERRIDES

# Deep enough for layers that come at intervals, as Inkling-2's sixth and Zamba-2's seventh.
DEPTH = 8

# What a config lacks by default and its model needs; checkpoints have it.
_COMPASS = OVERRIDES["CohereCompassForCausalLM"]
_QWEN4_EXP = OVERRIDES["Qwen4ExpForCausalLM"] | {"indexer_head_dim": 256}
VALUES: dict[str, dict[str, Any]] = {
    "CohereCompassForCausalLM": _COMPASS,
    "CohereCompassForConditionalGeneration": {"text_config": _COMPASS},
    "DbrxForCausalLM": {"attn_config": OVERRIDES["DbrxForCausalLM"]["attn_config"]},
    "Dots1ForCausalLM": {"n_routed_experts": 128, "n_shared_experts": 2},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 128},
    "HunYuanVLForConditionalGeneration": {"text_config": {"head_dim": 128}},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16},
    "MinistralForCausalLM": {"head_dim": 128},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "Qwen4ExpForCausalLM": _QWEN4_EXP,
    "Qwen4ExpForConditionalGeneration": {"text_config": _QWEN4_EXP},
    "Qwen3OmniMoeForConditionalGeneration": {"enable_audio_output": False},
}
# Others of transformers 5.24 that are not built from the defaults of their config.
NOT_BUILT = {
    "AyaVisionForConditionalGeneration": "1152 is not divisible by 14 heads",
    "ChameleonForConditionalGeneration": "vocabulary_map is None",
    "DeepseekOcr2ForConditionalGeneration": "mlp_layer_types is None",
    "DiffusionGemmaForBlockDiffusion": "num_experts is None",
    "Emu3ForConditionalGeneration": "vocabulary_map is None",
    "FastVlmForConditionalGeneration": "needs timm",
    "Gemma3nForConditionalGeneration": "needs timm",
    "Gemma4AssistantForCausalLM": "its own check refuses its defaults",
    "Granite4VisionForConditionalGeneration": "deepstack_layer_map is None",
    "PerceptionLMForConditionalGeneration": "needs timm",
}


def shorten(config: Any) -> None:
    """Leave the first layers of a text config, in every list that has an entry for each."""
    text = config.get_text_config(decoder=True)
    names = ("num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "decoder_layers")
    name = next((name for name in names if isinstance(getattr(text, name, None), int)), None)
    if name is None:
        return
    depth = getattr(text, name)
    for key, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, key, value[:DEPTH])
    setattr(text, name, min(depth, DEPTH))
    if getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = 0  # as many as there are layers, or more
    text.is_decoder = True  # Reformer asks for it


def said_of_training() -> dict[str, str]:
    """Class -> what docs/models.md says of its training; nothing of another transformers' table."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in text:
        return {}
    rows = re.findall(r"^\| (\w+) \| [^|]* \| (trained|refused) \|", text, re.MULTILINE)
    return {name: said for name, said in rows if name not in NOT_BUILT}


SAID = said_of_training()


@pytest.mark.parametrize("name", SAID)
def test_is_found_at_its_own_widths_if_its_tiny_model_is(name: str) -> None:
    """Structure is told by widths, of which one may be a multiple of another by chance."""
    config = config_class(name)(**copy.deepcopy(VALUES.get(name, {})))
    shorten(config)
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    if SAID[name] == "trained":
        find_structure(model)
        return
    with pytest.raises(loki.UnsupportedModelError):
        find_structure(model)
