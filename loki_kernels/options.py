"""The words and defaults that functions, files and the command line share; imports nothing."""

from __future__ import annotations

from typing import Literal

# What "lowest" means: of the scores, or of their absolute values.
Criterion = Literal["signed", "magnitude"]
Strategy = Literal[
    "layer_balanced", "layer_balanced_highest", "global_lowest", "global_highest", "random"
]
# Which of `DEFINITIONS` an attribution starts from.
DefinitionName = Literal["published", "paper", "captum"]
# Where nodes are: the output of `down_proj`, or what enters it.
Site = Literal["down_proj", "ffn_neurons"]
# How an attribution runs the path points: see `attribute`.
EngineName = Literal["staircase", "decode", "reforward"]
# What `attribute` keeps of the scores.
Keep = Literal["scores", "counts"]

DEFAULT_DEFINITION: DefinitionName = "published"
DEFAULT_STEPS = 7  # path points
DEFAULT_QUOTA = 10.0  # percent
DEFAULT_SAMPLES = 192  # that a protection is estimated from, or more (`samples_to_draw`)
# Tokens of a chunk of text that `drift` reads, and of all chunks.
DEFAULT_LENGTH = 512
DEFAULT_TOKENS = 20_000
# Of SmolLM2-135M's rows the 10 % magnitude-lowest are missed less than random ones, the
# signed-lowest far more: perplexity 42, 63 and 770,314 without them, 28 before
# (benchmarks/forgetting).
DEFAULT_CRITERION: Criterion = "magnitude"
