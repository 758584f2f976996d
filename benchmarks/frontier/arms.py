"""The frontier's arms: what is trained, and how its update is formed; their trainings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to train.

    The update of a linear layer's weight is ``diag(c) delta M`` on the rows that are trained, with
    delta dense or ``B @ A``.

    Attributes:
        rates: learning rates of AdamW.
        targets: the linear layers that are trained: ``down_proj``, ``mlp`` or ``linears``.
        quota: percentage of each layer's rows.
        rows: which: ``random``, or the ``least`` or ``most`` sensitive.
        entries: where single entries of the weights are trained and ``quota`` is of them:
            ``random`` (SHiRA) or the ``smallest`` (Super-Tuning's bottom).
        rank: of LoRA; None trains a dense update.
        whole: whether everything else is trained too, embeddings and norms.
        protect: M of the down-projections, and with ``linears`` of every layer. ``cut`` removes the
            top eigenvectors of the inputs' second moments, ``soft`` is (I + C / lambda)^-1/2,
            ``random`` removes a random subspace of cut's rank and ``other`` another layer's.
        share: of the inputs' energy that the cut's eigenvectors hold; lambda is the last of their
            eigenvalues.
        directions: how many eigenvectors are cut at most.
        source: of the second moments and sensitivities.
        texts: how many of the source's sequences they are of, at equal distances; None: all.
        weighted: whether tokens count by the squared gradient of their layer's output.
        row_steps: whether c is the sensitivity's inverse square root, else 1.
        start: what the update is trained from: ``null`` and ``corda`` are LoRA's factors
            (`start_of`), ``svd`` the weight's own lower singular triplets (OSF); None zero.
        general: what half of every batch is: None (the task), ``replay`` (general text as it is) or
            ``kl`` (general text, with the divergence from the base as its loss).
        general_weight: of that half's loss.
    """

    rates: tuple[float, ...]
    targets: str = "down_proj"
    quota: float = 100.0
    rows: str = "random"
    entries: str | None = None
    rank: int | None = None
    whole: bool = False
    protect: str | None = None
    share: float = 0.9
    directions: int | None = None
    source: str = "samples"
    texts: int | None = None
    weighted: bool = False
    row_steps: bool = False
    start: str | None = None
    general: str | None = None
    general_weight: float = 1.0

    @property
    def moments(self) -> str:
        """The name of the moments that it asks for."""
        source = self.source if self.texts is None else f"{self.texts} {self.source}"
        return f"{source}, weighted" if self.weighted else source


@dataclass(frozen=True)
class Job:
    """One training."""

    arm_name: str
    arm: Arm
    task: str
    rate: float
    seed: int
    steps: int

    def spec(self) -> dict[str, Any]:
        """What the result depends on, as its record keeps it."""
        changed = {
            field.name: getattr(self.arm, field.name)
            for field in fields(self.arm)
            if field.name != "rates" and getattr(self.arm, field.name) != field.default
        }
        return {
            "arm": self.arm_name,
            "settings": changed,
            "task": self.task,
            "rate": self.rate,
            "seed": self.seed,
            "steps": self.steps,
        }


_ROWS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
_ALL = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
_FULL = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4)
_LORA = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)

ARMS: dict[str, Arm] = {
    "full": Arm(_FULL, "linears", whole=True),
    "full, down_proj protected": Arm(_FULL, "linears", whole=True, protect="cut"),
    "linears": Arm(_FULL, "linears"),
    "linears protected": Arm((5e-5, 1e-4, 2e-4, 4e-4, 8e-4), "linears", protect="cut"),
    "LoRA": Arm(_LORA, "linears", rank=16),
    "LoRA protected": Arm(_LORA, "linears", rank=16, protect="cut"),
    "LoRA on the MLP": Arm(_LORA, "mlp", rank=14),
    "rows": Arm(_ROWS, quota=10),
    "rows protected": Arm(_ROWS, quota=10, protect="cut"),
    "rows, random subspace": Arm(_ROWS, quota=10, protect="random"),
    "rows, another layer's": Arm(_ROWS, quota=10, protect="other"),
    "rows soft": Arm(_ROWS, quota=10, protect="soft"),
    "rows, least sensitive": Arm(_ROWS, quota=10, rows="least"),
    "rows, most sensitive": Arm(_ROWS, quota=10, rows="most"),
    "rows, steps by sensitivity": Arm(_ROWS, quota=10, row_steps=True),
    "down_proj": Arm(_ALL),
    "down_proj protected": Arm(_ALL, protect="cut"),
    "down_proj, random subspace": Arm(_ALL, protect="random"),
    "down_proj, another layer's": Arm(_ALL, protect="other"),
    "down_proj soft": Arm(_ALL, protect="soft"),
    "full + replay": Arm(_FULL, "linears", whole=True, general="replay"),
    "full + KL": Arm(_FULL, "linears", whole=True, general="kl"),
    "LoRA + replay": Arm(_LORA, "linears", rank=16, general="replay"),
    "LoRA + KL": Arm(_LORA, "linears", rank=16, general="kl"),
    # Published methods that keep what was known.
    "OSF": Arm(_FULL, "linears", start="svd"),
    "CorDA": Arm(_LORA, "linears", rank=16, start="corda"),
    "LoRA-Null": Arm(_LORA, "linears", rank=16, start="null"),
    "SHiRA": Arm(_ROWS, quota=9.8, entries="random"),
    "Super-Tuning, bottom": Arm(_ROWS, quota=9.8, entries="smallest"),
    # Variants of what the first ones say.
    "full + 5 KL": Arm(_FULL, "linears", whole=True, general="kl", general_weight=5.0),
    "LoRA + 5 KL": Arm(_LORA, "linears", rank=16, general="kl", general_weight=5.0),
    "down_proj protected, docs": Arm(_ALL, protect="cut", source="docs"),
    "down_proj protected, 75 %": Arm(_ALL, protect="cut", share=0.75),
    "down_proj protected, 97 %": Arm(_ALL, protect="cut", share=0.97),
    # A fourteenth, as the package takes: of SmolLM2's 1,536 features and Gemma-3-270M's 2,048.
    "down_proj protected, 110": Arm(_ALL, protect="cut", directions=110),
    "down_proj protected, 147": Arm(_ALL, protect="cut", directions=147),
    # also where fewer hold 90 % of the energy
    "down_proj protected, always 110": Arm(_ALL, protect="cut", share=1.0, directions=110),
    "down_proj protected, 110, 48 texts": Arm(_ALL, protect="cut", directions=110, texts=48),
    # as many tokens a direction as 192 samples have for the 1,024 of an 8B model's layer
    "down_proj protected, 110, 20 texts": Arm(_ALL, protect="cut", directions=110, texts=20),
    "down_proj protected, 32": Arm(_ALL, protect="cut", directions=32),
    "down_proj, random subspace, 110": Arm(_ALL, protect="random", directions=110),
    "down_proj, another layer's, 110": Arm(_ALL, protect="other", directions=110),
    "rows protected, 110": Arm(_ROWS, quota=10, protect="cut", directions=110),
    "down_proj protected, weighted": Arm(_ALL, protect="cut", weighted=True),
    "down_proj protected, 110, weighted": Arm(_ALL, protect="cut", directions=110, weighted=True),
    "down_proj protected + KL": Arm(_ALL, protect="cut", general="kl"),
    "linears protected + KL": Arm(
        (5e-5, 1e-4, 2e-4, 4e-4, 8e-4), "linears", protect="cut", general="kl"
    ),
    "rows protected, 5 %": Arm((2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), quota=5, protect="cut"),
    "rows protected, 30 %": Arm((5e-4, 1e-3, 2e-3, 4e-3, 8e-3), quota=30, protect="cut"),
}
