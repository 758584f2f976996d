"""What an attribution will take, from the model's config and the prompts alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from .attribution.attribute import attribute
from .attribution.definitions import PathIntegral
from .attribution.fitting import points_that_fit
from .attribution.plan import BatchLimits, rotary_border, windows
from .attribution.prompts import WINDOW, tokenize_prompts
from .cut import Cut
from .discovery import find_structure
from .inspection import build_model, dtype_named, dtype_of
from .memory import weights_size
from .mixture import experts_per_token
from .options import DEFAULT_DEFINITION, DEFAULT_STEPS, DefinitionName, EngineName
from .placement import device_to_use
from .questions import load_questions
from .structure import Structure, text_config
from .team import share_out
from .tokenizing import load_tokenizer

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
        outputs: of those, of one token, about.
        queries: heads times their width.
        prefix: keys and values of one token in one layer.
        head: weights of the output head.
    """

    layers: int
    weights: int
    outputs: int
    queries: int
    prefix: int
    head: int

    @classmethod
    def of(cls, structure: Structure) -> Shape:
        config = text_config(structure.causal_lm)
        chosen = experts_per_token(config)
        matrices = sum(
            # of the experts, those that a token passes
            p.numel() if p.ndim == 2 else p.numel() // len(p) * min(chosen, len(p))
            for layer in structure.layers
            for p in layer.parameters()
            if p.ndim in (2, 3)
        )
        count = len(structure.layers)
        view = getattr(config, "per_layer_config", None)  # Gemma 4's heads have two widths
        sizes = [_attention_sizes(config if view is None else view[i]) for i in range(count)]
        return cls(
            layers=count,
            weights=matrices // count,
            outputs=matrices // (count * structure.hidden_size),
            queries=sum(queries for queries, _ in sizes) // count,
            prefix=sum(prefix for _, prefix in sizes) // count,
            head=structure.hidden_size * structure.vocab_size,
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

    def kept(
        self, prompts: int, tokens: int, integral: PathIntegral, engine: EngineName = "staircase"
    ) -> int:
        """Numbers that a layer keeps of one batch, padded to ``tokens``: which batch is largest.

        Of a point twice what half of the layers put out (`points_that_fit`), of a token its keys
        and values, on the sequence path once a point. In the decode engine a prompt runs after the
        other.
        """
        points, copies = self.layers * len(integral.alphas), 1
        if integral.definition.path == "sequence":  # a layer at a time
            points = copies = len(integral.alphas)
        together = prompts if engine == "staircase" else min(prompts, 1)
        return together * (points * self.outputs + copies * tokens * self.prefix)


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
    definition: DefinitionName = DEFAULT_DEFINITION,
    steps: int = DEFAULT_STEPS,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
) -> Estimate:
    """What `attribute` will take, without the model's weights.

    Operations are counted on the meta device. Time and memory come from attributing the prompts of
    one batch, on ``device``, with two random models of a few of the layers.

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
    device = torch.device(device_to_use(device))
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    own = dtype_of(config) or torch.float32
    chosen = own if dtype == "auto" else dtype_named(dtype)
    model = build_model(config, torch.device("meta"), chosen)
    structure = find_structure(model)
    integral = PathIntegral.resolve(definition, {}, steps)
    weights = weights_size(model)
    room = points_that_fit(structure, device, beside=weights)
    cut = Cut.find(config)
    engine = _engine(build_model(cut.of(config, cut.timed[0]), device, chosen).eval(), definition)
    limits = BatchLimits.of(device, batch_size, gpus, room, rotary_border(model)).of_engine(engine)
    shape, points = Shape.of(structure), len(structure.layers) * len(integral.alphas)
    prompts = load_questions() if prompts is None else prompts
    tokenizer = load_tokenizer(name)
    sequences = tokenize_prompts(prompts, tokenizer, structure.vocab_size)
    costs, loads = [Cost(0.0, 0.0)] * gpus, [0.0] * gpus
    tokens = count = batches = 0
    largest = (0, 0)
    for window in windows(sequences, None if isinstance(prompts, (list, tuple)) else WINDOW):
        plan = window.batches(batches, limits, points)
        batches, count = batches + len(plan), window.end
        tokens += sum(planned.tokens for planned in plan)
        sizes = [(len(planned.members), planned.longest) for planned in plan]
        largest = max(largest, *sizes, key=lambda x: shape.kept(x[0], x[1], integral, engine))
        owners = share_out([planned.cost(points) for planned in plan], loads)
        for (members, longest), owner in zip(sizes, owners, strict=True):
            costs[owner] += shape.cost(members, longest, integral, engine)
    speed = _Speed.measure(config, cut, device, chosen, shape, largest, definition, steps, engine)
    return Estimate(
        prompts=count,
        tokens=tokens,
        batches=batches,
        cost=sum(costs, Cost(0.0, 0.0)),
        weights=weights,
        activations=speed.memory,
        seconds=max(map(speed.seconds, costs)),
        gpus=gpus,
        device=_name_of(device),
        engine=engine,
    )


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this {device.type.upper()}"


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
        cut: Cut,
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
        for layers in cut.timed:
            model = build_model(cut.of(config, layers), device, dtype).eval()
            _engine(model, definition)  # what trying it takes is none of the batch's
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
        prefix = shape.prefix * prompts * tokens * dtype.itemsize
        return cls(of_layers, of_head, _whole_peak(peaks, cut.timed, shape.layers, prefix))


def _attention_sizes(config: Any) -> tuple[int, int]:
    """``queries`` and ``prefix`` of a `Shape`, of one layer's config."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    return heads * width, 2 * pairs * width


def _engine(model: nn.Module, definition: DefinitionName) -> EngineName:
    """Which engine attributes a model, which is tried once."""
    prompt = [{"input_ids": torch.arange(1, 9) % text_config(model).vocab_size}]
    # captum's trapezoid has two ends
    result = attribute(model, prompt, definition=definition, steps=2, share=False, progress=False)
    engine: EngineName = result.run["engine"]
    return engine


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


def _whole_peak(peaks: list[int], timed: tuple[int, int], layers: int, prefix: int) -> float:
    """That of all layers, from those of the timed ones, which have as many points.

    The points of layer l are kept in every layer from l on, but for the lowest, below which nothing
    is differentiated; keys and values of the prompts, ``prefix`` bytes, are kept in every one.
    """

    def kept(count: int) -> float:
        """How often each point is kept, on average."""
        return (count + 1) / 2 - 1 / count

    few, many = (peak - count * prefix for peak, count in zip(peaks, timed, strict=True))
    each = (many - few) / (kept(timed[1]) - kept(timed[0]))
    return few + each * (kept(layers) - kept(timed[0])) + layers * prefix
