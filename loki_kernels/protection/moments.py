"""Second moments of the down-projections' inputs, and their top eigenvectors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import UnsupportedModelError
from ..mixture import routed_inputs, why_not_grouped
from ..ops._products import weight_gradient
from ..placement import free_bytes
from ..structure import DownProjection, Structure
from .result import Protection

# Directions that are left alone unless told otherwise, a fourteenth: 110 of SmolLM2-135M's 1,536
# features, and 1,024 of the 14,336 of an 8B model; fewer where fewer hold this share of the energy.
FEATURES_A_DIRECTION = 14
_SHARE = 0.9
# Above this width, a few eigenvectors are worth an iteration, but not half of them.
_EXACT = 4096
_MOST_ITERATED = 0.25
_ITERATIONS = 4
# A container's limit of memory and what it uses, and what its files in memory begin with, which are
# among it: in versions 2 and 1 of cgroups.
_CONTAINER = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def layers_at_a_time(layers: Sequence[DownProjection]) -> Iterator[list[DownProjection]]:
    """As many layers at a time as have room: at 14,336 features a layer takes .8 GB, and one at a
    time as much again for its eigenvectors."""
    group: list[DownProjection] = []
    widest = max(4 * down_proj.in_features**2 for down_proj in layers)
    # of a device_map's devices each holds its own layers' moments, beside what else it has
    room = {device: _room(device) for device in {layer.weight.device for layer in layers}}
    taken = dict.fromkeys(room, widest)
    for down_proj in layers:
        size = 4 * math.prod(down_proj.experts) * down_proj.in_features**2
        device = down_proj.weight.device
        if group and taken[device] + size > room[device]:
            yield group
            group, taken = [], dict.fromkeys(room, widest)
        group.append(down_proj)
        taken[device] += size
    yield group


def _room(device: torch.device) -> int:
    """Half of the bytes that are free."""
    free = free_bytes(device)
    if free is not None:
        return free // 2
    # Few pages are free where files have been read, a model's for one, and most are available.
    room = 16 * 10**9
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        room = int(available.split()[1]) * 1024
    for folder, limit, used, total in _CONTAINER:  # a container's own, which meminfo does not know
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            own = [int(Path(folder, name).read_text(encoding="ascii")) for name in (limit, used)]
            lines = Path(folder, "memory.stat").read_text(encoding="ascii").splitlines()
            stat = dict(line.split() for line in lines)
            files = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
            room = min(room, max(0, own[0] - own[1] + files))
    return room // 2


def default_directions(features: int) -> int:
    """How many directions of a layer's inputs are left alone at most, unless told otherwise."""
    return math.ceil(features / FEATURES_A_DIRECTION)


class Moment(NamedTuple):
    """Of a layer's inputs.

    Attributes:
        matrix: E[x x^T], float32 ``[in_features, in_features]``, and ``[E, ...]`` of E experts.
            What an expert reads counts by its share of the token, and E is over all tokens, as
            much in an expert that few of them reach.
        tokens: that were read, by each expert on average.
    """

    matrix: Tensor
    tokens: float


@torch.no_grad()
def second_moments(
    structure: Structure,
    layers: Sequence[DownProjection],
    windows: Sequence[list[int]],
    batch_size: int,
) -> dict[str, Moment]:
    """The second moments of these layers' inputs, first tokens of windows left out.

    Raises:
        UnsupportedModelError: if a layer is given inputs of other tokens.
        ValueError: if they are not finite.
    """
    sums: dict[str, Tensor] = {}
    read: dict[str, int] = {}
    kept = torch.zeros(0, dtype=torch.bool)

    def watch(down_proj: DownProjection) -> Any:
        name = down_proj.name
        read_inputs = _read_inputs_of_experts if down_proj.of_experts else _read_inputs

        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            for expert, x in read_inputs(module, kept.flatten(), *args, **kwargs):
                if name not in sums:
                    shape = *down_proj.experts, x.shape[1], x.shape[1]
                    sums[name] = x.new_zeros(shape, dtype=torch.float32)
                total = sums[name] if expert is None else sums[name][expert]
                if x.dtype == torch.float32:
                    total.addmm_(x.t(), x)
                else:
                    total += weight_gradient(x, x, torch.float32)
                read[name] = read.get(name, 0) + len(x)

        return hook

    device = structure.device
    ordered = sorted((w for w in windows if len(w) > 1), key=len)
    with contextlib.ExitStack() as hooks:
        # a layer that was compiled in place would not call hooks that come later
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for down_proj in layers:
            hook = down_proj.module.register_forward_pre_hook(watch(down_proj), with_kwargs=True)
            hooks.callback(hook.remove)
        for start in range(0, len(ordered), batch_size):
            batch = [torch.tensor(window) for window in ordered[start : start + batch_size]]
            ids = pad_sequence(batch, batch_first=True)
            mask = pad_sequence([torch.ones_like(x) for x in batch], batch_first=True)
            kept = mask.bool()
            kept[:, 0] = False  # where attention's sinks have inputs of another size
            structure.decoder(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            )
    count = sum(len(window) - 1 for window in ordered)
    found = {}
    for down_proj in layers:
        total = sums.get(down_proj.name)
        if total is None:  # text passes by: cross-attention's layers, experts of images
            shape = (*down_proj.experts, *2 * (down_proj.in_features,))
            total = torch.zeros(shape, dtype=torch.float32)
        if not total.diagonal(dim1=-2, dim2=-1).sum().isfinite():
            raise ValueError(
                f"the inputs of {down_proj.name} are not finite, as where float16 overflows or a "
                "weight is NaN; load the model in bfloat16 or float32."
            )
        tokens = read.get(down_proj.name, 0) / math.prod(down_proj.experts)
        found[down_proj.name] = Moment(total.div_(count), tokens)
    return found


_Inputs = Iterator[tuple[int | None, Tensor]]


def _read_inputs(module: nn.Module, kept: Tensor, x: Tensor) -> _Inputs:
    """(None, the layer's inputs ``[tokens, in_features]``), of the tokens that are kept.

    In float32, or on a GPU in bfloat16, whose products are exact there too and run on its tensor
    cores: at 8B 1,500 TFLOP.
    """
    x = x.flatten(0, -2)
    _check_tokens(module, len(x), len(kept))
    x = x[kept.to(x.device)]
    yield None, x if x.is_cuda and x.dtype == torch.bfloat16 else x.float()


def refuse_untold_inputs(structure: Structure) -> None:
    """Raise UnsupportedModelError for experts whose inputs cannot be told, and offloaded layers.

    And for layers without a weight, by which it is told where they lie.
    """
    for down_proj in structure.projections():
        if not isinstance(getattr(down_proj.module, down_proj.parameter, None), Tensor):
            raise UnsupportedModelError(
                f"{down_proj.name} is a {type(down_proj.module).__name__}, which has no "
                f"{down_proj.parameter}, as GPTQ's layers have none. Estimate the protection from "
                "the model before it was quantized (loki-kernels protection MODEL FILE)."
            )
        if down_proj.weight.is_meta:
            raise UnsupportedModelError(
                f"{down_proj.name} is not in memory (offloaded, or on the meta device), and a "
                "protection is estimated from a model that is; load it without offloading, in "
                "bfloat16 on the CPU if a GPU has no room."
            )
        if not down_proj.of_experts:
            continue
        module = down_proj.module
        if "why_whole" in vars(module):  # patching has found out, and taken the weights over
            reason = vars(module)["why_whole"]
        else:
            reason = why_not_grouped(module, down_proj.parameter, down_proj.axis)
        if reason is not None:
            raise UnsupportedModelError(
                f"{down_proj.name} holds experts, and what enters their down-projections cannot be "
                f"told: {reason}. A protection is for dense models and for experts that "
                "transformers decorates."
            )


def _read_inputs_of_experts(
    module: nn.Module,
    kept: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> _Inputs:
    """(expert, its float32 inputs times its shares of the tokens), of those that are kept."""
    _check_tokens(module, len(hidden_states), len(kept))
    own = kept.to(hidden_states.device)
    # a patched model's experts have the methods of the family's class too
    found = routed_inputs(module, module, hidden_states[own], top_k_index[own])
    x = found.x.float() * top_k_weights[own].flatten()[found.order, None].float()
    start = 0
    for expert, end in enumerate(found.offsets.tolist()):
        if end > start:
            yield expert, x[start:end]
        start = end


def _check_tokens(module: nn.Module, given: int, tokens: int) -> None:
    if given != tokens:
        raise UnsupportedModelError(
            f"a down-projection, {type(module).__name__}, is given {given} inputs for {tokens} "
            "tokens, so that which are of text cannot be told; no protection can be estimated."
        )


def moment_of(protection: Protection, name: str, device: torch.device) -> Tensor:
    """As much of E[x x^T] as a protection holds."""
    directions = protection.directions[name].to(device)
    return (directions * protection.energies[name].to(device)[..., None, :]) @ directions.mT


def top_eigenvectors(
    moment: Tensor, share: float | None, most: int | None
) -> tuple[Tensor, Tensor, float]:
    """The eigenvectors that hold ``share`` of the trace, their eigenvalues, and the trace.

    At most ``most`` of them, and with neither given at most a fourteenth of the features. Of
    experts each one's, with columns of zeros where another has more of them. What no token reaches
    has nothing to protect: a column of zeros.
    """
    if moment.ndim == 3:
        return _of_each(moment, share, most)
    if not moment.any():
        return moment.new_zeros(len(moment), 1).cpu(), moment.new_zeros(1).cpu(), 0.0
    if moment.device.type not in ("cpu", "cuda"):
        moment = moment.cpu()
    total = float(moment.trace())
    if most is None:
        most = default_directions(len(moment)) if share is None else len(moment)
    if len(moment) <= _EXACT or most > _MOST_ITERATED * len(moment):
        values, vectors = _eigh(moment)
    else:
        values, vectors = _subspace(moment, min(len(moment), most + 64))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # on the CPU: CUDA refuses it of float32 where algorithms have to be deterministic
    count = int((values.cpu().cumsum(0) < (share or _SHARE) * total).sum()) + 1
    # all directions would leave nothing to train
    count = min(count, most, len(values), len(moment) - 1)
    return vectors[:, :count].contiguous().cpu(), values[:count].contiguous().cpu(), total


def _of_each(
    moments: Tensor, share: float | None, most: int | None
) -> tuple[Tensor, Tensor, float]:
    found = [top_eigenvectors(moment, share, most) for moment in moments]
    width = max(len(values) for _, values, _ in found)
    directions = torch.zeros(*moments.shape[:2], width, dtype=moments.dtype)
    energies = torch.zeros(len(moments), width, dtype=moments.dtype)
    for number, (vectors, values, _) in enumerate(found):
        directions[number, :, : len(values)] = vectors
        energies[number, : len(values)] = values
    return directions, energies, sum(total for _, _, total in found)


def _eigh(moment: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues, rising, and eigenvectors.

    LAPACK's in float64 where the device's own do not converge, which may be so of a moment of fewer
    tokens than features, most of whose eigenvalues are zero.
    """
    try:
        values, vectors = torch.linalg.eigh(moment)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = torch.linalg.eigh(moment.cpu().double())
    return values.to(moment), vectors.to(moment)


def _subspace(moment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, rising, and eigenvectors, by subspace iteration."""
    generator = torch.Generator(moment.device).manual_seed(0)
    basis = torch.linalg.qr(torch.empty_like(moment[:, :width]).normal_(generator=generator))[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(moment @ basis)[0]
    values, small = _eigh(basis.t() @ moment @ basis)
    return values, basis @ small
