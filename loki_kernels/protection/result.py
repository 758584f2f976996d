"""`Protection`: the directions in which general text drives each down-projection."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import of_a_whole_file, read_safetensors, write_safetensors
from ..fingerprint import tensors_fingerprint
from ..structure import Structure

logger = logging.getLogger(__name__)

_FORMAT = "loki-kernels-protection"


@dataclass(frozen=True, eq=False)  # the fingerprint compares
class Protection:
    """The input directions of every down-projection that an update has to leave alone.

    With U of a layer the trained update is ``delta (I - U U^T)``: what general text puts into the
    layer's largest directions passes the update unseen, so that little of it changes
    (docs/forgetting.md). `estimate_protection` makes one.

    Attributes:
        directions: layer name -> U, float32 ``[in_features, r]`` on the CPU, orthonormal columns:
            the top eigenvectors of E[x x^T], x the inputs of the down-projection. Of E experts
            ``[E, in_features, r]``, x being an expert's inputs times its shares of the tokens;
            columns of zeros where one has fewer than r.
        energies: layer name -> their eigenvalues, float32 ``[r]`` or ``[E, r]``, falling.
        totals: layer name -> the trace of E[x x^T], of all experts together.
        info: what it was estimated from.
    """

    directions: dict[str, Tensor]
    energies: dict[str, Tensor]
    totals: dict[str, float]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = [directions.shape[-1] for directions in self.directions.values()]
        shares = self.shares().values()
        return (
            f"Protection({len(counts)} layers, {min(counts)} to {max(counts)} directions, "
            f"{min(shares):.0%} to {max(shares):.0%} of the inputs' energy)"
        )

    def __deepcopy__(self, _memo: dict[int, Any]) -> Protection:
        """The same tensors, which nothing writes: of a copied model at 8B they are 1.9 GB."""
        copied = Protection(
            dict(self.directions), dict(self.energies), dict(self.totals), dict(self.info)
        )
        if "fingerprint" in vars(self):  # for which a gigabyte is read
            vars(copied)["fingerprint"] = self.fingerprint
        return copied

    def shares(self) -> dict[str, float]:
        """Layer name -> the share of its inputs' energy that its directions hold; 1 of none."""
        return {
            name: float(energies.sum()) / self.totals[name] if self.totals[name] else 1.0
            for name, energies in self.energies.items()
        }

    def of(self, structure: Structure) -> Protection:
        """This one, or the same under the names that this model has for its layers.

        A text model of a whole one, and the whole one, name the same layers otherwise.

        Raises:
            ValueError: if it is none of this model's layers.
        """
        names = [down_proj.name for down_proj in structure.projections()]
        own = {_from_its_layer(name): name for name in self.directions}
        found = {name: own.get(_from_its_layer(name), name) for name in names}
        fits = self.directions.keys() >= set(names) or len(own) < len(self.directions)
        if fits or not self.directions.keys() >= set(found.values()):
            self.check(structure)
            return self
        renamed = Protection(
            {name: self.directions[known] for name, known in found.items()},
            {name: self.energies[known] for name, known in found.items()},
            {name: self.totals[known] for name, known in found.items()},
            self.info,
        )
        renamed.check(structure)
        return renamed

    def check(self, structure: Structure) -> None:
        """Raise ValueError if it is none of this model's layers, or no file could hold it."""
        try:
            json.dumps([self.totals, self.info])
        except TypeError as error:
            raise ValueError(
                f"the protection cannot be saved with a checkpoint: {error}."
            ) from error
        for down_proj in structure.projections():
            held = self.directions.get(down_proj.name)
            if held is None:
                raise ValueError(f"the protection is of another model: it lacks {down_proj.name}.")
            shape = *down_proj.experts, down_proj.in_features
            if held.shape[:-1] != shape:
                raise ValueError(
                    f"the protection is of another model: {down_proj.name} has "
                    f"{_of_inputs(shape)}, and {_of_inputs(held.shape[:-1])} there."
                )

    @functools.cached_property  # at 8B it reads a gigabyte
    def fingerprint(self) -> str:
        """A hash of the directions, the same in bfloat16, which a checkpoint names."""
        return tensors_fingerprint(self.directions[name] for name in sorted(self.directions))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.safetensors`` file, atomically.

        Raises:
            OSError: if it cannot be written.
        """
        tensors = {f"directions:{name}": tensor for name, tensor in self.directions.items()}
        tensors |= {f"energies:{name}": tensor for name, tensor in self.energies.items()}
        seen: set[int] = set()  # a file shares no memory, as one tensor of several layers would
        for name, tensor in tensors.items():
            if tensor.data_ptr() in seen:
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        metadata = {
            "format": _FORMAT,
            "totals": json.dumps(self.totals),
            "info": json.dumps(self.info),
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Protection:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or another kind of file.
        """
        tensors, metadata = read_safetensors(path, _FORMAT)
        parts: dict[str, dict[str, Tensor]] = {"directions": {}, "energies": {}}
        with of_a_whole_file(path):
            totals, info = json.loads(metadata["totals"]), json.loads(metadata["info"])
            for key, tensor in tensors.items():
                part, _, name = key.partition(":")
                # Windows lets nobody replace a file that is mapped
                parts[part][name] = tensor.clone() if sys.platform == "win32" else tensor
            directions, energies = parts["directions"], parts["energies"]
            whole = directions.keys() == energies.keys() == totals.keys() and all(
                directions[name].ndim in (2, 3)
                and energies[name].shape == directions[name][..., 0, :].shape
                for name in directions
            )
        if not whole or not directions:
            raise ValueError(f"{path} is damaged: its layers have not the same parts.")
        return cls(directions, energies, totals, info)


def fingerprint_of(protection: Protection | None) -> str | None:
    """Its fingerprint; None of none."""
    return None if protection is None else protection.fingerprint


def warn_of_another_model(protection: Protection | None, structure: Structure) -> None:
    """Warn of a protection that was estimated from a model of another name, as one of its shapes.

    No more than that: the same weights may lie in another folder, and a model that was tuned from
    a base may be protected by the base's.
    """
    known = None if protection is None else protection.info.get("model")
    own = getattr(structure.causal_lm, "name_or_path", None)
    if known and own and Path(known).name != Path(own).name:
        logger.warning(
            "the protection was estimated from %s, and this model is %s. Unless that has the same "
            "weights, or this was tuned from it, estimate one of this model: another subspace "
            "protects nothing, and one of half of the directions, another layer's, was worse than "
            "none (1.66 and 3.50 times full fine-tuning's KL).",
            known, own,
        )  # fmt: skip


def _from_its_layer(name: str) -> str:
    """A down-projection's name from its decoder layer on, as in "layers.3.mlp.down_proj"."""
    found = re.search(r"[^.]+\.\d+\..*", name)
    return name if found is None else found[0]


def _of_inputs(shape: Sequence[int]) -> str:
    *experts, width = shape
    return f"{experts[0]} experts of {width} inputs" if experts else f"{width} inputs"
