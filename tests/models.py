"""Small random models of every architecture, and what must not change about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

# Where models are built and their inputs belong; `--device` sets it before tests are collected.
DEVICE = torch.device("cpu")

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
GQA = TINY | {"num_key_value_heads": 2}


def _config(kind: type, **options: object) -> transformers.PreTrainedConfig:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return kind(**(special | options))


ARCHITECTURES = {
    "llama": lambda: _config(transformers.LlamaConfig, **GQA),
    "llama_mlp_bias": lambda: _config(
        transformers.LlamaConfig, **GQA, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen2": lambda: _config(transformers.Qwen2Config, **GQA),
    "qwen3": lambda: _config(transformers.Qwen3Config, **GQA, head_dim=16),
    "mistral": lambda: _config(transformers.MistralConfig, **GQA, sliding_window=5),
    "gemma2": lambda: _config(
        transformers.Gemma2Config,
        **GQA,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "phi3": lambda: _config(transformers.Phi3Config, **GQA),
    "olmo2": lambda: _config(transformers.Olmo2Config, **GQA),
    "gpt_neox": lambda: _config(
        transformers.GPTNeoXConfig, **(TINY | {"hidden_act": "gelu"}), rotary_pct=0.5
    ),
    "granite": lambda: _config(
        transformers.GraniteConfig, **GQA, logits_scaling=3.0, residual_multiplier=0.7
    ),
    "cohere": lambda: _config(transformers.CohereConfig, **GQA, logit_scale=0.5),
}


def _naive_attention(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores + attention_mask).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights


transformers.AttentionInterface.register("naive", _naive_attention)
transformers.AttentionMaskInterface.register("naive", transformers.masking_utils.eager_mask)


def set_device(device: torch.device | str) -> None:
    """Make `build_model` and `to_device` use another device than the CPU."""
    global DEVICE
    DEVICE = torch.device(device)


def to_device(value: Any) -> Any:
    """A tensor, or tensors in lists, tuples and dicts, on `DEVICE`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_device, value))
    return value


def build_model(
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> transformers.PreTrainedModel:
    """A small random model, the same on any device; norms and biases are off their defaults."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[name]()
    # eager attention's softmax is float32 even in a float64 model, and SDPA lacks soft-capping
    attention = "naive" if name == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE if device is None else device, dtype).eval()


def snapshot(model: torch.nn.Module) -> dict[str, object]:
    """Everything a caller could see changed: weights, flags, hooks, modules and config."""
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "required": {k: p.requires_grad for k, p in model.named_parameters()},
        "identity": {k: id(p) for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "types": {k: type(m) for k, m in model.named_modules()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()
        },
        "attention": model.config._attn_implementation,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "grads": {k: p.grad is None for k, p in model.named_parameters()},
    }


def assert_unchanged(model: torch.nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    weights = before["weights"]
    assert after["weights"].keys() == weights.keys()
    for name, tensor in after["weights"].items():
        assert torch.equal(tensor, weights[name]), name
    for key in set(before) - {"weights"}:
        assert after[key] == before[key], key


def save_base(folder: Path) -> Path:
    """Write a tiny Llama and a tokenizer of the words w0 to w89."""
    words = {f"w{i}": i for i in range(90)} | {"[UNK]": 90, "</s>": 91, "<s>": 92}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = GQA | {"hidden_size": 64, "intermediate_size": 128}
    model = transformers.AutoModelForCausalLM.from_config(
        _config(transformers.LlamaConfig, **sizes)
    )
    model.save_pretrained(folder)
    return folder


def changed_rows(folder: Path | str, base_folder: Path) -> list[int]:
    """Of the first down-projection, in a checkpoint that must be an ordinary one."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    weight, before = (m.model.layers[0].mlp.down_proj.weight for m in (model, load(base_folder)))
    return (weight != before.to(weight.dtype)).any(1).nonzero().flatten().tolist()
