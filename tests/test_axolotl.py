"""The Axolotl plugin. In an environment that has Axolotl (it pins its own packages).

pip install axolotl && pip install --no-deps . && pytest tests/test_axolotl.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.models import changed_rows

pytest.importorskip("axolotl")


def run_axolotl(*command):
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", *map(str, command)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@pytest.fixture
def config(base_folder, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([[1, 5, 40], [0], [7, 3]]))
    lines = [json.dumps({"text": f"w1 w2 w3 w4 w{i} " * 4}) for i in range(16)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return {
        "base_model": str(base_folder), "plugins": ["loki_kernels.axolotl.LokiPlugin"],
        "adapter": "loki", "loki_rows": str(tmp_path / "rows.json"),
        "datasets": [{"path": str(tmp_path / "data.jsonl"), "ds_type": "json",
                      "type": "completion"}],
        "dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "out"),
        "sequence_len": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": 3, "learning_rate": 0.01, "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False, "fp16": False, "tf32": False, "val_set_size": 0, "save_steps": 3,
        "special_tokens": {"pad_token": "</s>"}, "use_tensorboard": False,
    }  # fmt: skip


def test_trains_and_merges(config, base_folder, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(config))
    run_axolotl("train", path, "--launcher", "python")
    merge = config | {"lora_model_dir": str(tmp_path / "out"), "merge_method": "legacy"}
    path.write_text(json.dumps(merge))
    run_axolotl("merge-lora", path)
    assert changed_rows(tmp_path / "out" / "merged", base_folder) == [1, 5, 40]


def test_another_adapter_is_left_alone():
    from axolotl.utils.dict import DictDefault

    from loki_kernels.axolotl import LokiPlugin

    assert LokiPlugin().load_adapter(None, DictDefault({"adapter": "lora"})) is None
    options = {"loki_rank": 2, "loki_protect": True, "lora_modules_to_save": ["lm_head"]}
    config = DictDefault({"adapter": "loki"} | options)
    model, made = LokiPlugin().load_adapter(None, config, config_only=True)
    assert model is None
    assert (made.rank, made.modules_to_save, made.task_type) == (2, ["lm_head"], "CAUSAL_LM")
    assert made.trainable_token_indices is None
    assert made.protect is True
