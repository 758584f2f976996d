"""What an attribution computes: path, objective, rule and baseline, under three known names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import check_choice
from ..options import DefinitionName, Site

Path = Literal["last_token", "sequence"]
Objective = Literal["probability", "logit", "log_probability"]
Rule = Literal["left", "right", "midpoint", "trapezoid", "captum_trapezoid", "gauss-legendre"]
Baseline = Literal["zero", "token_zero", "given"]


@dataclass(frozen=True)
class Definition:
    """One way to attribute an answer to FFN nodes with integrated gradients.

    Attributes:
        path: ``"last_token"`` scales the last prompt token's node alone; ``"sequence"`` scales the
            layer's output at every position (captum's ``LayerIntegratedGradients``).
        objective: of the target token: its softmax ``"probability"``, ``"logit"`` or
            ``"log_probability"``.
        rule: where on the path gradients are taken and how they are weighted (see `path_rule`).
        baseline: where the path starts: ``"zero"``; ``"token_zero"``, the node's value on the
            prompt with every token id replaced by 0; or ``"given"``, a tensor that `attribute` was
            given, such as `mean_activations`.
        multiply: whether the averaged gradient is multiplied by (z - baseline), which is what makes
            the scores add up to F(z) - F(baseline).
        site: ``"down_proj"``, its output nodes, or ``"ffn_neurons"``, the activations entering it.
    """

    path: Path = "last_token"
    objective: Objective = "probability"
    rule: Rule = "left"
    baseline: Baseline = "zero"
    multiply: bool = True
    site: Site = "down_proj"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("path", Path),
            ("objective", Objective),
            ("rule", Rule),
            ("baseline", Baseline),
            ("site", Site),
        ):
            check_choice(name, getattr(self, name), get_args(allowed))
        if not isinstance(self.multiply, bool):
            raise ValueError(f"multiply must be True or False; it is {self.multiply!r}.")

    @property
    def completes(self) -> bool:
        """Whether the last token's scores should add up to F(z) - F(baseline)."""
        return self.multiply and self.path == "last_token"


class Overrides(TypedDict, total=False):
    """Fields of `Definition` that a call changes."""

    path: Path
    objective: Objective
    rule: Rule
    baseline: Baseline | Tensor
    multiply: bool
    site: Site


DEFINITIONS: dict[DefinitionName, Definition] = {
    # The procedure in the authors' first commit, which came with the published position files.
    "published": Definition(),
    # arXiv 2505.22120, Eq. 3-5.
    "paper": Definition(objective="logit", rule="right", multiply=False),
    # captum's LayerIntegratedGradients on the whole sequence, what the authors run today.
    "captum": Definition(path="sequence", rule="captum_trapezoid", baseline="token_zero"),
}


def path_rule(rule: Rule, steps: int) -> tuple[Tensor, Tensor]:
    """Positions and weights of a quadrature rule on [0, 1], float64 ``[steps]`` each.

    ``left``: k/m, 1/m each, from k = 0. ``right``: from k = 1. ``midpoint``: (k + 1/2)/m.
    ``trapezoid``: k/(m-1) with halved ends, sum 1. ``captum_trapezoid``: the same points with
    captum's weights, 1/m with halved ends, which sum to (m-1)/m. ``gauss-legendre``: the m-point
    Gauss rule.

    Raises:
        ValueError: for fewer steps than the rule needs.
    """
    least = 2 if "trapezoid" in rule else 1
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"rule {rule!r} needs an integer steps >= {least}; it is {steps!r}.")
    points = torch.arange(steps, dtype=torch.float64)
    even = torch.full((steps,), 1.0 / steps, dtype=torch.float64)
    if rule == "left":
        return points / steps, even
    if rule == "right":
        return (points + 1) / steps, even
    if rule == "midpoint":
        return (points + 0.5) / steps, even
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    ends = torch.ones(steps, dtype=torch.float64)
    ends[0] = ends[-1] = 0.5
    return points / (steps - 1), ends / (steps if rule == "captum_trapezoid" else steps - 1)


@dataclass(frozen=True)
class PathIntegral:
    """A definition and the quadrature that computes it.

    Attributes:
        definition: what is integrated.
        alphas: float64 ``[m]``, where on the path gradients are taken.
        weights: float64 ``[m]``, what each of them counts.
        baseline: ``[L, D]``, where the path starts, if it was given.
    """

    definition: Definition
    alphas: Tensor
    weights: Tensor
    baseline: Tensor | None = None

    @classmethod
    def resolve(cls, name: DefinitionName, overrides: Overrides, steps: int) -> PathIntegral:
        """The named definition, some fields replaced, by its rule of ``steps`` points.

        Raises:
            ValueError: for an unknown name or field, or fewer steps than the rule needs.
        """
        check_choice("definition", name, DEFINITIONS)
        unknown = set(overrides) - set(Definition.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(sorted(unknown))}; a definition has "
                f"{', '.join(Definition.__dataclass_fields__)}."
            )
        given = overrides.get("baseline")
        if isinstance(given, Tensor):
            overrides = {**overrides, "baseline": "given"}
        elif given == "given":
            raise ValueError("baseline='given' is written by a tensor: baseline=mean_activations.")
        definition = replace(DEFINITIONS[name], **overrides)  # type: ignore[arg-type]
        alphas, weights = path_rule(definition.rule, steps)
        if definition.completes and not (alphas == 0).any():
            # Completeness needs F(baseline), a point this rule does not visit: add it, unweighted.
            zero = torch.zeros(1, dtype=alphas.dtype)
            alphas, weights = torch.cat([zero, alphas]), torch.cat([zero, weights])
        return cls(definition, alphas, weights, given if isinstance(given, Tensor) else None)

    def described(self) -> dict[str, Any]:
        """The definition, and a hash of the baseline that was given."""
        described = asdict(self.definition)
        if self.baseline is not None:
            values = self.baseline.detach().cpu().contiguous().float().numpy()
            described["baseline_values"] = hashlib.sha256(values.tobytes()).hexdigest()
        return described

    def given_starts(
        self, layers: Iterable[int], shape: Sequence[int], device: torch.device
    ) -> dict[int, Tensor] | None:
        """Layer -> the given baseline at every position, ``[*shape, D]``; None without one."""
        if self.baseline is None:
            return None
        return {i: self.baseline[i].to(device).expand(*shape, -1) for i in layers}
