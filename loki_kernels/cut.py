"""`Cut`: a few layers that stand for all of a model's, built from its config."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .discovery import find_structure
from .errors import UnsupportedModelError
from .inspection import build_model

_LONGEST = 12  # layers in a row
_LEADING = (
    0.1  # of the layers: a kind that these alone are of, as the first, dense ones, is left out
)
_ALIKE = 0.1  # how far the kinds' shares may be from the whole's, summed up


@dataclass(frozen=True)
class Cut:
    """The fewest layers in a row whose kinds have the shares that they have in the whole model.

    Attributes:
        start: the first of them.
        count: how many; 1 where all are alike.
    """

    start: int
    count: int

    @classmethod
    def find(cls, config: Any) -> Cut:
        """Of a model of this config; where layers share keys and values, of one that does not.

        Raises:
            UnsupportedModelError: if its config does not say how to build a few layers alone.
        """
        whole = config.get_text_config().num_hidden_layers
        kinds = _kinds_of(cls(0, whole).of(config, whole))
        usual = Counter(kinds[int(_LEADING * whole) :])
        found = []
        for count in range(1, min(_LONGEST, whole) + 1):
            for start in range(whole - count + 1):
                part = kinds[start : start + count]
                if usual.keys() <= set(part):
                    found.append((_difference(part, usual), count, start))
        # the shortest of those that are alike, else the most alike
        found.sort(key=lambda x: (max(x[0], _ALIKE), x[1], x[0], x[2]))
        for exactly in (True, False):  # a few dense layers are first, however many layers there are
            for _, count, start in found:
                cut = cls(start, count)
                if all(cut._builds(config, layers, kinds, exactly=exactly) for layers in cut.timed):
                    return cut
        raise UnsupportedModelError(
            f"a {type(config).__name__} does not say how to build a few of its layers alone, which "
            "are what is timed."
        )

    @property
    def timed(self) -> tuple[int, int]:
        """Layers of the two models that are timed: what one has more is what layers take."""
        return (1, 3) if self.count == 1 else (self.count, 2 * self.count)

    def _numbers(self, layers: int) -> list[int]:
        """Which of the whole model's layers so many are, the cut's again and again."""
        return [self.start + i % self.count for i in range(layers)]

    def of(self, config: Any, layers: int) -> Any:
        """A config of these layers, repeated up to so many."""
        config = copy.deepcopy(config)
        text = config.get_text_config()
        whole, numbers = text.num_hidden_layers, self._numbers(layers)
        by_layer = text.to_dict().get("per_layer_config") or {}  # as Gemma 4 has it
        for name, value in list(vars(text).items()):  # a few derive what kind a layer is of
            if isinstance(value, list) and len(value) == whole and not name.endswith("_id"):
                setattr(text, name, [value[number] for number in numbers])
            if _names_layers(value, whole):
                setattr(text, name, [i for i, number in enumerate(numbers) if number in value])
        text.num_hidden_layers = layers
        if getattr(text, "first_k_dense_replace", None):
            text.first_k_dense_replace = max(0, text.first_k_dense_replace - self.start)
        if getattr(text, "num_kv_shared_layers", None):
            text.num_kv_shared_layers = 0
        if by_layer:
            own = {i: by_layer[str(n)] for i, n in enumerate(numbers) if str(n) in by_layer}
            text.per_layer_config = own or None
        return config

    def _builds(self, config: Any, layers: int, kinds: Sequence[Any], *, exactly: bool) -> bool:
        """Whether a config of so many layers gives these kinds, in this order if ``exactly``."""
        try:
            built = _kinds_of(self.of(config, layers))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError):
            return False
        want = [kinds[number] for number in self._numbers(layers)]
        return built == want or (not exactly and set(built) == set(want) and len(built) == layers)


def _names_layers(value: Any, whole: int) -> bool:
    """Whether a config's list is the numbers of some layers, as Llama 4's ``moe_layers``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(x) is int and 0 <= x < whole for x in value)
        and value == sorted(set(value))
    )


def _difference(part: Sequence[Any], usual: Counter[Any]) -> float:
    """Of the shares of each kind, summed up."""
    own, total = Counter(part), usual.total()
    return sum(abs(own[kind] / len(part) - usual[kind] / total) for kind in own | usual)


def _kinds_of(config: Any) -> list[Any]:
    """What each layer of a model is made of: layers of one kind take the same."""
    return [
        (
            tuple((name, type(module)) for name, module in layer.named_modules()),
            tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()),
        )
        for layer in find_structure(build_model(config, torch.device("meta"))).layers
    ]
