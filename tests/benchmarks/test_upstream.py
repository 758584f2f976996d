"""The settings that are proposed to PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")

from peft import PeftConfig

from loki_kernels.peft import LokiConfig

FOLDER = Path(__file__).parents[2] / "benchmarks" / "upstream" / "experiments" / "loki"


@pytest.mark.parametrize("folder", sorted(FOLDER.iterdir()), ids=lambda folder: folder.name)
def test_settings_are_ones_that_peft_reads(folder):
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, LokiConfig)
    assert config.rank is None
    assert (config.protect is None) == ("protected" not in folder.name)
    text = (folder / "training_params.json").read_text()
    assert json.loads(text)["optimizer_kwargs"]["weight_decay"] == 0
