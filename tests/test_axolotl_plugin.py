"""What the Axolotl plugin makes of a config, with stand-ins for the two classes that it takes.

`test_axolotl.py` runs Axolotl itself, where that is installed.
"""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace

import peft
import pytest

from tests.models import build_model
from tests.tiny_training import ROWS, logits, protection_of, train

KEYS = (
    "adapter loki_rows loki_quota loki_criterion loki_rank loki_protect lora_model_dir "
    "lora_modules_to_save peft_trainable_token_indices"
)


@dataclass
class Capabilities:
    name: str


@pytest.fixture
def module(monkeypatch):
    pytest.importorskip("pydantic")  # Axolotl's own
    base = types.ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = Capabilities, object
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "loki_kernels.axolotl", raising=False)
    yield importlib.import_module("loki_kernels.axolotl")
    del sys.modules["loki_kernels.axolotl"]


def config(**options):
    return SimpleNamespace(**(dict.fromkeys(KEYS.split()) | options))


def test_every_option_reaches_the_config(module, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[[1, 5], [0], [7]]")
    plugin = module.LokiPlugin()
    assert plugin.get_adapter_capabilities() == [Capabilities("loki")]
    assert plugin.get_input_args() == "loki_kernels.axolotl.LokiArguments"
    given = config(
        adapter="loki", loki_rows=str(rows), loki_rank=2, loki_protect=True,
        lora_modules_to_save=["lm_head"], peft_trainable_token_indices=[3],
    )  # fmt: skip
    model, made = plugin.load_adapter(None, given, config_only=True)
    assert model is None
    assert (made.rows, made.rank, made.protect) == ([[1, 5], [0], [7]], 2, True)
    assert (made.modules_to_save, made.trainable_token_indices) == (["lm_head"], [3])
    given = config(adapter="loki", loki_quota=10, loki_criterion="signed")
    _, made = plugin.load_adapter(None, given, config_only=True)
    assert (made.rows, made.quota, made.criterion, made.protect) == (None, 10, "signed", None)
    assert plugin.load_adapter(None, config(adapter="lora")) is None
    assert set(module.LokiArguments.model_fields) == {k for k in KEYS.split() if "loki" in k}


def test_an_adapter_is_made_and_continued(module, tmp_path):
    (tmp_path / "rows.json").write_text(str(ROWS))
    given = config(adapter="loki", loki_rows=str(tmp_path / "rows.json"))
    model, _ = module.LokiPlugin().load_adapter(build_model(), given)
    assert isinstance(model, peft.PeftModel)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    given.lora_model_dir = str(tmp_path / "adapter")
    for inference in (False, True):
        again, _ = module.LokiPlugin().load_adapter(build_model(), given, inference=inference)
        assert any(p.requires_grad for p in again.parameters()) is not inference
        assert (logits(again) - logits(model)).abs().max() < 1e-5


def test_a_continued_adapter_takes_the_protection_that_is_named(module, tmp_path):
    protection_of(build_model()).save(tmp_path / "one.safetensors")
    given = config(adapter="loki", loki_protect=str(tmp_path / "one.safetensors"))
    model, _ = module.LokiPlugin().load_adapter(build_model(), given)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "loki_rows.protection").unlink()
    (tmp_path / "one.safetensors").rename(tmp_path / "moved.safetensors")
    given = config(
        adapter="loki",
        loki_protect=str(tmp_path / "moved.safetensors"),
        lora_model_dir=str(tmp_path / "adapter"),
    )
    again, made = module.LokiPlugin().load_adapter(build_model(), given)
    assert made.protection == model.peft_config["default"].protection
    train(again)
