"""LLaMA-Factory continues an untrained adapter. In an environment that has it (it pins its own).

pip install llamafactory && pip install --no-deps . && pytest tests/test_launch.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.models import changed_rows

pytest.importorskip("llamafactory")


def run_launched(*arguments, torchrun=0):
    command = [sys.executable, "-m"]
    if torchrun:
        command += [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(torchrun),
            "-m",
        ]
    result = subprocess.run(
        [*command, "loki_kernels.launch", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("processes", [0, 2])
def test_trains_and_exports(base_folder, tmp_path, processes):
    (tmp_path / "rows.json").write_text(json.dumps([[1, 5, 40], [0], [7, 3]]))
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    run_launched("loki_kernels", "adapter", base_folder, tmp_path / "rows.json", adapter)
    chats = [{"instruction": "w1 w2 w3", "input": "", "output": f"w{i}"} for i in range(8)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"chats": {"file_name": "chats.json"}}))
    common = {"model_name_or_path": str(base_folder), "finetuning_type": "lora",
              "template": "default"}  # fmt: skip
    train = common | {
        "stage": "sft", "do_train": True, "adapter_name_or_path": str(adapter),
        "dataset_dir": str(tmp_path), "dataset": "chats", "cutoff_len": 32, "output_dir": str(out),
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01, "use_cpu": True,
        "report_to": "none", "preprocessing_num_workers": 1,
    }  # fmt: skip
    export = common | {
        "adapter_name_or_path": str(out), "export_dir": str(tmp_path / "merged"),
        "export_device": "cpu",
    }  # fmt: skip
    for name, content in (("train.yaml", train), ("export.yaml", export)):
        (tmp_path / name).write_text(json.dumps(content))
    if processes:
        run_launched("llamafactory.launcher", tmp_path / "train.yaml", torchrun=processes)
    else:
        run_launched("llamafactory.cli", "train", tmp_path / "train.yaml")
    run_launched("llamafactory.cli", "export", tmp_path / "export.yaml")
    assert changed_rows(tmp_path / "merged", base_folder) == [1, 5, 40]
