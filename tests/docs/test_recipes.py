"""Every block of docs/recipes.md and of docs/drift.md runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments

import loki_kernels as loki
from tests.models import changed_rows

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = (DOCS / "recipes.md").read_text(encoding="utf-8")
BLOCKS = dict(
    re.findall(
        r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", RECIPES, re.DOTALL | re.MULTILINE
    )
)
DRIFT = (DOCS / "drift.md").read_text(encoding="utf-8")


@pytest.fixture
def names(base_folder, tmp_path, monkeypatch):
    """What the blocks take for granted."""
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps([[1, 5, 40], [0], [7, 3]]))
    ids = torch.arange(32).reshape(4, 8)
    return {
        "loki": loki,
        "peft": peft,
        "torch": torch,
        "Trainer": Trainer,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "model": AutoModelForCausalLM.from_pretrained(base_folder),
        "base": AutoModelForCausalLM.from_pretrained(base_folder),
        "base_folder": base_folder,
        "ids": ids,
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "loader": torch.utils.data.DataLoader(list(ids), batch_size=2),
        "out": str(tmp_path / "out"),
        "adapter": str(tmp_path / "adapter"),
        "args": TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2,
            learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True,
        ),
    }  # fmt: skip


def run(block, names, **more):
    from loki_kernels.peft import LokiConfig

    names |= {"LokiConfig": LokiConfig} | more
    exec(compile(BLOCKS[block], f"docs/recipes.md: {block}", "exec"), names)
    return names


def test_every_block_has_a_test():
    assert set(BLOCKS) == {
        "HF Trainer", "TRL", "PEFT", "accelerate", "Lightning", "torch.compile",
        "A quantized base", "Several GPUs", "Only the update", "A server that takes LoRA",
    }  # fmt: skip


def test_trainer(names, base_folder):
    run("HF Trainer", names)
    assert changed_rows(names["out"], base_folder) == [1, 5, 40]


def test_trl(names, base_folder):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts = [" ".join(f"w{i + j}" for j in range(8)) for i in range(4)]
    args = trl.SFTConfig(**{k: v for k, v in names["args"].to_dict().items() if k in (
        "output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "report_to",
        "use_cpu", "disable_tqdm")}, bf16=False)  # fmt: skip
    run(
        "TRL",
        names,
        SFTTrainer=trl.SFTTrainer,
        dataset=Dataset.from_dict({"text": texts}),
        args=args,
    )
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in Path(names["out"]).iterdir()
    }
    handle = loki.load_adapter(names["base"], names["out"])
    handle.merge().save_pretrained("merged")
    assert changed_rows("merged", base_folder) == [1, 5, 40]


def test_peft(names):
    from loki_kernels.peft.layer import LokiLayer

    run("PEFT", names)
    config = json.loads((Path(names["out"]) / "adapter_config.json").read_text())
    assert config["rows"] == [[1, 5, 40], [0], [3, 7]]
    assert isinstance(names["model"], transformers.LlamaForCausalLM)
    assert not any(isinstance(module, LokiLayer) for module in names["model"].modules())


def test_accelerate(names):
    accelerate = pytest.importorskip("accelerate")
    run("accelerate", names, accelerator=accelerate.Accelerator(cpu=True))
    assert len(names["optimizer"].param_groups[0]["params"]) == 3


def test_lightning(names, base_folder):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def training_step(self, ids, _):
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    run("Lightning", names, lightning=lightning, module=Module())
    names["model"].save_pretrained(names["out"])
    assert changed_rows(names["out"], base_folder) == [1, 5, 40]


def test_compile(names, monkeypatch):
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compile_(m, backend="aot_eager"))
    run("torch.compile", names)
    assert names["model"].model.layers[0].mlp.down_proj.update.grad.any()


def test_quantized(names, base_folder):
    quantization = pytest.importorskip("torchao.quantization")
    pytest.importorskip("peft.utils.quantization_utils", reason="needs peft 0.20")
    run("A quantized base", names, int8=TorchAoConfig(quantization.Int8WeightOnlyConfig()))
    assert len(changed_rows(names["out"], base_folder)) == 64  # all are rounded
    weights = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (names["out"], base_folder)
    ]
    got, want = (state["model.layers.0.mlp.down_proj.weight"] for state in weights)
    assert (got - want).abs().max() < want.abs().max() / 127  # no more than int8 rounds


def test_several_gpus(names, one_process):
    from torch.distributed.fsdp import fully_shard

    # what two processes do with it is in test_distributed
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    run("Several GPUs", names, fully_shard=lambda module: fully_shard(module, mesh=mesh))
    names["model"](input_ids=names["ids"], labels=names["ids"]).loss.backward()
    assert names["model"].model.layers[0].mlp.down_proj.update.grad is not None


def test_adapter_and_lora(names, base_folder):
    loki.patch(names["model"], "rows.json")
    with torch.no_grad():
        names["model"].model.layers[0].mlp.down_proj.update += 0.1
    run("Only the update", names)
    assert changed_rows(names["out"], base_folder) == [1, 5, 40]
    want = names["model"](names["ids"]).logits
    fresh = AutoModelForCausalLM.from_pretrained(base_folder)
    run("A server that takes LoRA", names, base=fresh, out="lora")
    lora = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), "lora")
    torch.testing.assert_close(lora(names["ids"]).logits, want, atol=1e-5, rtol=1e-5)


def test_drift(names, base_folder):
    Path("texts.jsonl").write_text('{"text": "w1 w2 w3", "domain": "counting"}\n')
    names |= {"tokenizer": transformers.AutoTokenizer.from_pretrained(base_folder)}
    train, measure, limit = re.findall(r"```python\n(.*?)```", DRIFT, re.DOTALL)
    exec(compile(train, "docs/drift.md", "exec"), names)
    names["trainer"].save_model(names["out"])
    exec(compile(measure, "docs/drift.md", "exec"), names)
    logged = [e["drift/kl"] for e in names["trainer"].state.log_history if "drift/kl" in e]
    assert logged[0] == 0
    assert logged[-1] == pytest.approx(names["result"].overall.kl, rel=1e-4)
    assert Path("drift.json").exists()
    assert Path("drift.png").exists()
    names["handle"] = loki.patch(names["model"], "rows.json")
    exec(compile(limit, "docs/drift.md", "exec"), names)
    assert names["share"] == 1
