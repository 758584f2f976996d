"""LoKI as a PEFT method: importing this module registers ``LokiConfig``.

    import loki_kernels.peft
    model = peft.get_peft_model(model, loki_kernels.peft.LokiConfig(rows="rows.json"))

The base weights are never written while an adapter is active (a preference loss turns the adapter
off between a forward pass and its backward pass), so the layers work in the delta form:
``base(x)`` plus ``x @ update.T`` at the rows' places, or from half of the rows of a plain base on
one product with weight plus update. That also serves quantized bases, and an adapter fits any copy
of its base, in another dtype or quantized.
"""

from .config import LokiConfig
from .layer import LokiLayer
from .model import LokiModel

__all__ = ["LokiConfig", "LokiLayer", "LokiModel"]
