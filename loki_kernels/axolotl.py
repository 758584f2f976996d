"""LoKI as an Axolotl adapter.

    plugins: [loki_kernels.axolotl.LokiPlugin]
    adapter: loki
    loki_rows: rows.json  # or loki_quota: 10, which analyses the model first; else all, protected
    loki_criterion: signed  # as the paper's analysis chooses
    loki_rank: 8          # for LoKI*
    loki_protect: true    # or a protection's file

``lora_model_dir`` continues an adapter, and ``lora_modules_to_save`` and
``peft_trainable_token_indices`` name what is trained beside the rows, as for Axolotl's own. An
unknown ``adapter`` is an error there, so a run cannot train everything because this plugin was
missing.
"""

from __future__ import annotations

from typing import Any

import peft
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel

from .peft import LokiConfig
from .training.adapters import task_type


class LokiArguments(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    loki_rows: str | None = None
    loki_quota: float | None = None
    loki_criterion: str | None = None
    loki_rank: int | None = None
    loki_protect: bool | str | None = None


class LokiPlugin(BasePlugin):
    """Registers ``adapter: loki``."""

    def get_input_args(self) -> str:
        return "loki_kernels.axolotl.LokiArguments"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="loki")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, LokiConfig] | None:
        if cfg.adapter != "loki":
            return None
        config = LokiConfig(
            rows=cfg.loki_rows,
            quota=cfg.loki_quota,
            criterion=cfg.loki_criterion,
            rank=cfg.loki_rank,
            protect=cfg.loki_protect,
            modules_to_save=cfg.lora_modules_to_save or None,
            trainable_token_indices=cfg.peft_trainable_token_indices or None,
            task_type=task_type(model),
        )
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            saved = LokiConfig.from_pretrained(cfg.lora_model_dir)
            if isinstance(cfg.loki_protect, str):
                saved.protect = cfg.loki_protect
            model = peft.PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, config=saved
            )
            return model, model.peft_config["default"]
        model = peft.get_peft_model(model, config)
        return model, model.peft_config["default"]  # filled in
