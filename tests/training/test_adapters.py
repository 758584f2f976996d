from __future__ import annotations

import json

import peft
import pytest
import torch

import loki_kernels as loki
from loki_kernels.fingerprint import rows_fingerprint
from loki_kernels.training import adapter_file
from tests.models import assert_unchanged, build_model, snapshot
from tests.tiny_training import ROWS, logits, train

NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture
def trained(tmp_path):
    """(patched and trained model, folder of its adapter)."""
    model = build_model()
    loki.patch(model, ROWS)
    train(model)
    return model, loki.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("rank", "dtype", "base"),
    [
        (None, None, torch.float32),
        (None, torch.float32, torch.bfloat16),
        (2, None, torch.float32),
        (2, torch.float32, torch.bfloat16),
    ],
)
def test_adapter_restores_the_model_bit_for_bit(tmp_path, rank, dtype, base):
    model = build_model("llama_mlp_bias", dtype=base)
    loki.patch(model, [ROWS[0], [], ROWS[2]], rank=rank, dtype=dtype)
    train(model, lr=0.01)
    loki.save_adapter(model, tmp_path)
    handle = loki.load_adapter(build_model("llama_mlp_bias", dtype=base), tmp_path)
    assert torch.equal(logits(handle.model), logits(model))
    layer = handle.model.model.layers[0].mlp.down_proj
    trained = layer.rows if rank is None else layer.delta_a
    assert trained.dtype == (dtype or base)
    merged = handle.merge()
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name


def test_adapter_holds_the_rows_alone(trained):
    model, folder = trained
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    layers = adapter_file.read_rows(folder / "adapter_model.safetensors").layers
    assert list(layers) == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert torch.equal(layers[NAME]["index"], torch.tensor([1, 5, 40]))
    assert torch.equal(layers[NAME]["rows"], model.model.layers[0].mlp.down_proj.rows.cpu())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * 112 * 4 + 2000


def test_a_trained_adapter_can_be_trained_further(trained):
    model, folder = trained
    handle = loki.load_adapter(build_model(), folder)
    torch.testing.assert_close(logits(train(handle.model)), logits(train(model)))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: build_model(seed=1), "trained on another base"),
        (lambda: build_model("gpt_neox"), "trained on another base"),
    ],
)
def test_another_base_is_refused(trained, base, message):
    model = base()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        loki.load_adapter(model, trained[1])
    assert_unchanged(model, before)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [[1], [0]]}, "2 layers, the model 3"),
        ({"rows": [[1, 5, 48], [0], [3, 7]]}, "row 48 of layer 0"),
        ({"rows": [[1, 5, 41], [0], [3, 7]], "fingerprint": None}, "do not agree: .* other rows"),
        ({"rank": 2}, "do not agree: .* another rank"),
        ({"peft_type": "LORA"}, "type LORA; load it with PEFT"),
        ({"rows": [["x"], [0], [3]]}, "where a row number should be"),
    ],
)
def test_configs_that_do_not_fit(trained, changes, message):
    edit_config(trained[1], **changes)
    model = build_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        loki.load_adapter(model, trained[1])
    assert_unchanged(model, before)


def test_damaged_files(trained, tmp_path):
    folder = trained[1]
    with pytest.raises(FileNotFoundError, match="is not an adapter"):
        loki.load_adapter(build_model(), tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        loki.load_adapter(build_model(), folder)
    adapter_file.write_tensors(folder / "adapter_model.safetensors", {"lora_A": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a LoKI adapter"):
        loki.load_adapter(build_model(), folder)
    index = {f"base_model.model.{NAME}.loki_index": torch.tensor([1])}
    adapter_file.write_tensors(folder / "adapter_model.safetensors", index)
    with pytest.raises(ValueError, match="is not whole"):
        loki.load_adapter(build_model(), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not an adapter's config"):
        loki.load_adapter(build_model(), folder)


def test_outputs_that_cannot_be_written(tmp_path):
    model = build_model()
    with pytest.raises(ValueError, match="not patched"):
        loki.save_adapter(model, tmp_path)
    loki.patch(model, ROWS)
    (tmp_path / "file").touch()
    for save in (loki.save_adapter, loki.export_lora):
        with pytest.raises(NotADirectoryError):
            save(model, tmp_path / "file")
        with pytest.raises(FileNotFoundError):
            save(model, tmp_path / "no" / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rows", [ROWS, [[1, 5, 40], [], [7]]])
def test_lora_export_is_exact(tmp_path, rank, rows):
    """PEFT's own LoRA gives the same logits from it, also with other counts in every layer."""
    model = build_model("llama_mlp_bias")
    loki.patch(model, rows, rank=rank)
    want = logits(train(model))
    loki.export_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(build_model("llama_mlp_bias"), str(tmp_path))
    assert not torch.allclose(logits(build_model("llama_mlp_bias")), want, atol=1e-3)
    torch.testing.assert_close(logits(lora), want, atol=1e-5, rtol=1e-5)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=1e-5)


def test_fingerprint_does_not_see_the_dtype_a_model_was_loaded_in():
    rows = torch.randn(50, 64)
    rows[0, :8] = torch.tensor([0.0, -0.0, 1e-5, -6e-8, 2.0**-14, -(2.0**-14), 3e-5, 65000.0])
    checkpoint = rows.to(torch.bfloat16)
    want = rows_fingerprint([checkpoint])
    assert rows_fingerprint([checkpoint.float()]) == want
    assert rows_fingerprint([checkpoint.half()]) == want
    assert rows_fingerprint([rows]) == rows_fingerprint([rows.to(torch.bfloat16)])
    other = checkpoint.clone()
    other[3, 5] *= 1.01
    assert rows_fingerprint([other]) != want
    assert rows_fingerprint([checkpoint.flip(0)]) != want
    assert rows_fingerprint([checkpoint[:20], checkpoint[20:]]) != want
