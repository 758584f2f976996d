"""Memory that attributing a large model takes, by count: the table of docs/analysis.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from loki_kernels.cut import Cut
from loki_kernels.discovery import find_structure
from loki_kernels.estimate import Shape
from loki_kernels.inspection import build_model
from loki_kernels.mixture import experts_per_token

Way = Literal["device_map", "fsdp2", "offloaded"]


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of the device that has the most, by count, as the staircase attributes a batch.

    Attributes:
        weights: that stay there.
        gathered: weights that are there for a time.
        prefix: the prompts' keys and values.
        points: what is kept for the backward pass.
    """

    weights: float
    gathered: float
    prefix: float
    points: float

    @property
    def total(self) -> float:
        return self.weights + self.gathered + self.prefix + self.points


def device_memory(
    config: Any,
    way: Way,
    devices: int = 1,
    *,
    prompts: int = 16,
    tokens: int = 128,
    steps: int = 7,
    dtype: torch.dtype = torch.bfloat16,
) -> DeviceMemory:
    """What a batch takes of a model of equal layers with gated FFNs, split in one of three ways.

    Args:
        config: transformers'.
        way: ``"device_map"``, whole layers on each device; ``"fsdp2"``, each process a batch of its
            own; ``"offloaded"`` to CPU or disk.
        devices: how many there are.
        prompts, tokens: of the batch.
        steps: path points of a layer.
        dtype: of weights and activations.
    """
    text, size = config.get_text_config(), dtype.itemsize
    count = text.num_hidden_layers
    model = build_model(Cut(0, 1).of(config, 1), torch.device("meta"), dtype)
    structure = find_structure(model)
    shape, (ffn,) = Shape.of(structure), structure.present().values()
    width = structure.hidden_size
    layer = sum(p.nbytes for p in structure.layers[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - layer
    neurons = sum(
        down.in_features * (experts_per_token(text) if down.of_experts else 1)
        for down in ffn.projections
    )
    # Of a token: the input of both norms, in float32; queries, keys, values and what attention
    # gives; gate, up and their product.
    inner = 8 * width + size * (2 * shape.queries + shape.prefix + 3 * neurons)
    here = -(-count // devices) if way == "device_map" else count  # the last layers have the most
    top = 1 + steps * count
    passed = sum(1 + steps * (i + 1) for i in range(count - here, count))
    if way == "device_map":  # below the lowest layer's FFN nothing is differentiated
        points = (passed - (1 + steps if here == count else 0)) * inner
    else:  # a layer keeps its input, and one of them runs again
        points = passed * width * size + top * inner
    points += top * width * size  # the gradient that the head has computed
    whole = count * layer + outside
    weights, gathered = {
        "device_map": (here * layer + outside / min(devices, 2), 0),
        # this layer, the one that comes next, and what it is gathered in
        "fsdp2": (whole / devices, outside + 3 * layer),
        "offloaded": (0, layer + outside),
    }[way]
    prefix = prompts * tokens * here * shape.prefix * size
    return DeviceMemory(weights, gathered, prefix, prompts * points)
