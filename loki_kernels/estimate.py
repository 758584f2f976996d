"""What an attribution will take, from the model's config and the prompts alone."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from .attribution.attribute import attribute
from .attribution.definitions import PathIntegral
from .attribution.fitting import points_that_fit
from .attribution.plan import BatchLimits, rotary_border, windows
from .attribution.prompts import WINDOW, tokenize_prompts
from .discovery import find_structure
from .inspection import build_model, dtype_named
from .options import DefinitionName, EngineName
from .questions import load_questions
from .structure import Structure, text_config
from .team import share_out

# Layers of the two random models that are timed: what one has more is what layers take.
_TIMED = (1, 3)
_ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiplication and an addition are two).

    Attributes:
        layers: in the decoder layers.
        head: in the output head.
    """

    layers: float
    head: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.layers + other.layers, self.head + other.head)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that costs depend on.

    Attributes:
        layers: how many.
        weights: of one layer's matrices.
        queries: heads times their width.
        prefix: keys and values of one token in one layer.
        head: weights of the output head.
        width: nodes of a layer.
    """

    layers: int
    weights: int
    queries: int
    prefix: int
    head: int
    width: int

    @classmethod
    def of(cls, structure: Structure) -> Shape:
        config = text_config(structure.causal_lm)
        chosen = _experts_per_token(config)
        matrices = (
            # of the experts, those that a token passes
            p.numel() if p.ndim == 2 else p.numel() // len(p) * min(chosen, len(p))
            for layer in structure.layers
            for p in layer.parameters()
            if p.ndim in (2, 3)
        )
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        pairs = getattr(config, "num_key_value_heads", None) or heads
        count = len(structure.layers)
        return cls(
            layers=count,
            weights=sum(matrices) // count,
            queries=heads * width,
            prefix=2 * pairs * width,
            head=structure.hidden_size * structure.vocab_size,
            width=structure.hidden_size,
        )

    def cost(
        self, prompts: int, tokens: int, integral: PathIntegral, engine: EngineName = "staircase"
    ) -> Cost:
        """Of one batch, padded to ``tokens``.

        A point of layer l runs through the layers from l on, in the decode engine through all. The
        backward pass runs through the points of all layers that have some below them, and the
        unperturbed one.
        """
        m, layers = len(integral.alphas), self.layers
        above = layers * (layers + 1) // 2
        prefill = tokens * layers * (2 if integral.definition.baseline == "token_zero" else 1)
        if integral.definition.path == "sequence":  # a layer at a time, after its scaled copies
            prefill += tokens * (layers**2 + m * above)
            points, heads = layers**2 + m * above, layers * (m + 1)
            back = (m + 1) * (above - layers)
        else:
            points, heads = layers + m * above, layers * m + 1
            back = layers - 1 + m * (above - 1)
        if engine == "decode":
            prefill += (tokens - 1) * layers
            points, back = layers * heads, (layers - 1) * heads
        products = 2 * self.weights * (prefill + points + back)
        attended = 2 * tokens * self.queries * (prefill + 2 * points + 4 * back)
        return Cost(prompts * (products + attended), prompts * 2 * self.head * (1 + 2 * heads))


@dataclass(frozen=True)
class Estimate:
    """What an attribution will take.

    Attributes:
        prompts, tokens, batches: how many.
        cost: of all prompts.
        weights: bytes of the model.
        activations: bytes beside it, for the largest batch.
        seconds: until the last of the devices is done.
        gpus: that share the prompts.
        device: what was timed.
        engine: that attributes such a model.
    """

    prompts: int
    tokens: int
    batches: int
    cost: Cost
    weights: int
    activations: float
    seconds: float
    gpus: int
    device: str
    engine: EngineName

    def __str__(self) -> str:
        total = self.cost.layers + self.cost.head
        where = self.device if self.gpus == 1 else f"{self.gpus} of {self.device}"
        return "\n".join(
            [
                f"prompts  {self.prompts:,}, {self.tokens:,} tokens, {self.batches:,} batches",
                f"work     {total:.3g} FLOPs, {self.cost.head / total:.0%} of them in the head, "
                f"by the {self.engine} engine",
                f"memory   {(self.weights + self.activations) / 1e9:.3g} GB a device: weights "
                f"{self.weights / 1e9:.3g}, the largest batch {self.activations / 1e9:.3g}",
                f"time     {_length(self.seconds)} on {where}",
            ]
        )


def _length(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds"


def estimate(
    name: str | os.PathLike[str],
    prompts: Iterable[Any] | None = None,
    *,
    gpus: int = 1,
    definition: DefinitionName = "published",
    steps: int = 7,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
) -> Estimate:
    """What `attribute` will take, without the model's weights.

    Operations are counted on the meta device. Time and memory come from attributing the prompts of
    one batch, on ``device``, with two random models of one and of three of the layers.

    Args:
        name: folder or hub name; its config and tokenizer are read.
        prompts: as `attribute` takes them; the bundled questions by default.
        gpus: processes with a device like this one that share the prompts.
        definition: as in `attribute`.
        steps: as in `attribute`.
        batch_size: as in `attribute`.
        device: cuda where there is one, by default.
        dtype: that of the checkpoint by default.

    Raises:
        OSError: if there is no config or tokenizer.
        UnsupportedModelError: if the model's layers cannot be treated exactly.
        ValueError: if transformers knows no language model of this config, or for what `attribute`
            refuses.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = AutoConfig.from_pretrained(name)
    own = getattr(config.get_text_config(), "dtype", None) or torch.float32
    chosen = own if dtype == "auto" else dtype_named(dtype)
    model = build_model(config, torch.device("meta"), chosen)
    structure = find_structure(model)
    integral = PathIntegral.resolve(definition, {}, steps)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = points_that_fit(structure, device, beside=weights)
    limits = BatchLimits.of(device, batch_size, gpus, room, rotary_border(model))
    engine = _engine(config, device, chosen)
    shape, points = Shape.of(structure), len(structure.layers) * len(integral.alphas)
    prompts = load_questions() if prompts is None else prompts
    tokenizer = AutoTokenizer.from_pretrained(name)
    sequences = tokenize_prompts(prompts, tokenizer, structure.vocab_size)
    costs, loads = [Cost(0.0, 0.0)] * gpus, [0.0] * gpus
    tokens = count = batches = 0
    largest = (0, 0)
    for window in windows(sequences, None if isinstance(prompts, (list, tuple)) else WINDOW):
        plan = window.batches(batches, limits, points)
        batches, count = batches + len(plan), window.end
        tokens += sum(planned.tokens for planned in plan)
        sizes = [(len(planned.members), planned.longest) for planned in plan]
        largest = max(largest, *sizes, key=math.prod)
        owners = share_out([planned.cost(points) for planned in plan], loads)
        for (members, longest), owner in zip(sizes, owners, strict=True):
            costs[owner] += shape.cost(members, longest, integral, engine)
    speed = _Speed.measure(config, device, chosen, shape, largest, definition, steps, engine)
    return Estimate(
        prompts=count,
        tokens=tokens,
        batches=batches,
        cost=sum(costs, Cost(0.0, 0.0)),
        weights=weights,
        activations=speed.memory,
        seconds=max(map(speed.seconds, costs)),
        gpus=gpus,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU",
        engine=engine,
    )


@dataclass(frozen=True)
class _Speed:
    """What was timed.

    Attributes:
        of_layers, of_head: seconds an operation.
        memory: bytes of activations of the largest batch, in the whole model.
    """

    of_layers: float
    of_head: float
    memory: float

    def seconds(self, cost: Cost) -> float:
        return self.of_layers * cost.layers + self.of_head * cost.head

    @classmethod
    def measure(
        cls,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        shape: Shape,
        batch: tuple[int, int],
        definition: DefinitionName,
        steps: int,
        engine: EngineName,
    ) -> _Speed:
        """Attribute one batch of the whole model's size with models of few layers.

        They have as many points a prompt as the whole model: more steps a layer.
        """
        prompts, tokens = batch
        times, costs, peaks = [], [], []
        for layers in _TIMED:
            model = build_model(_shortened(config, layers), device, dtype).eval()
            more = max(1, round(steps * shape.layers / layers))
            part = replace(shape, layers=layers)
            integral = PathIntegral.resolve(definition, {}, more)
            costs.append(part.cost(prompts, tokens, integral, engine))
            ids = torch.randint(0, text_config(model).vocab_size, (prompts, tokens))

            def run(model: nn.Module = model, ids: Tensor = ids, more: int = more) -> None:
                attribute(
                    model, [{"input_ids": ids}], definition=definition, steps=more,
                    batch_size=len(ids), share=False, progress=False,
                )  # fmt: skip

            peaks.append(_peak(run, model, device))
            times.append(min(_time(run) for _ in range(_ROUNDS)))
        (short, long), head = (cost.layers for cost in costs), costs[0].head
        of_layers = max(0.0, times[1] - times[0]) / (long - short)
        of_head = max(0.0, times[0] - of_layers * short) / head
        return cls(of_layers, of_head, _whole_peak(peaks, shape, prompts * tokens * dtype.itemsize))


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
    model = build_model(_shortened(config, 1), torch.device("meta"), dtype)
    structure = find_structure(model)
    shape, (ffn,) = Shape.of(structure), structure.present().values()
    layer = sum(p.nbytes for p in structure.layers[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - layer
    neurons = sum(
        down.in_features * (_experts_per_token(text) if down.of_experts else 1)
        for down in ffn.projections
    )
    # Of a token: the input of both norms, in float32; queries, keys, values and what attention
    # gives; gate, up and their product.
    inner = 8 * shape.width + size * (2 * shape.queries + shape.prefix + 3 * neurons)
    here = -(-count // devices) if way == "device_map" else count  # the last layers have the most
    top = 1 + steps * count
    passed = sum(1 + steps * (i + 1) for i in range(count - here, count))
    if way == "device_map":  # below the lowest layer's FFN nothing is differentiated
        points = (passed - (1 + steps if here == count else 0)) * inner
    else:  # a layer keeps its input, and one of them runs again
        points = passed * shape.width * size + top * inner
    points += top * shape.width * size  # the gradient that the head has computed
    whole = count * layer + outside
    weights, gathered = {
        "device_map": (here * layer + outside / min(devices, 2), 0),
        # this layer, the one that comes next, and what it is gathered in
        "fsdp2": (whole / devices, outside + 3 * layer),
        "offloaded": (0, layer + outside),
    }[way]
    prefix = prompts * tokens * here * shape.prefix * size
    return DeviceMemory(weights, gathered, prefix, prompts * points)


def _experts_per_token(config: Any) -> int:
    """How many experts a token passes; 1 where there are none, or the config says it otherwise."""
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 1


def _engine(config: Any, device: torch.device, dtype: torch.dtype) -> EngineName:
    """Which engine attributes such a model."""
    model = build_model(_shortened(config, _TIMED[-1]), device, dtype).eval()
    prompt = [{"input_ids": torch.arange(1, 9) % text_config(model).vocab_size}]
    result = attribute(model, prompt, steps=1, share=False, progress=False)
    engine: EngineName = result.run["engine"]
    return engine


def _shortened(config: Any, layers: int) -> Any:
    """A config of the first layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if vars(text).get(name):  # a few derive it
            setattr(text, name, getattr(text, name)[:layers])
    if getattr(text, "first_k_dense_replace", None):  # what most layers are
        text.first_k_dense_replace = 0
    return config


def _time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()  # ends with the scores on the CPU
    return time.perf_counter() - start


def _peak(run: Callable[[], None], model: nn.Module, device: torch.device) -> int:
    """Bytes that a run takes beside the weights; on a CPU, what it keeps for the backward pass."""
    if device.type == "cuda":
        run()  # what stays from a first time is none of the batch's
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def _whole_peak(peaks: list[int], shape: Shape, token_bytes: int) -> float:
    """That of all layers, from those of `_TIMED`, which have as many points.

    The points of layer l are kept in every layer from l on, but for the lowest, below which nothing
    is differentiated; keys and values of the prompts are kept in every one.
    """

    def kept(layers: int) -> float:
        """How often each point is kept, on average."""
        return (layers + 1) / 2 - 1 / layers

    prefix = shape.prefix * token_bytes
    few, many = (peak - layers * prefix for peak, layers in zip(peaks, _TIMED, strict=True))
    each = (many - few) / (kept(_TIMED[1]) - kept(_TIMED[0]))
    return few + each * (kept(shape.layers) - kept(_TIMED[0])) + shape.layers * prefix
