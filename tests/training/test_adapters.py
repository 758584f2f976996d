from __future__ import annotations

import contextlib
import copy
import json
import shutil

import peft
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loki_kernels as loki
from loki_kernels.fingerprint import BaseRows
from loki_kernels.training import adapter_file, patching
from tests.models import DEVICE, assert_unchanged, build_model, snapshot
from tests.tiny_training import ROWS, logits, token_batch, train

NAME = "model.layers.0.mlp.down_proj"
few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def trained(tmp_path):
    """(patched and trained model, folder of its adapter)."""
    model = build_model()
    loki.patch(model, ROWS)
    train(model)
    return model, loki.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_restores_the_model_bit_for_bit(tmp_path, rank, dtype):
    model = build_model("llama_mlp_bias", dtype=dtype)
    loki.patch(model, [ROWS[0], [], ROWS[2]], rank=rank)
    train(model, lr=0.01)
    loki.save_adapter(model, tmp_path)
    handle = loki.load_adapter(build_model("llama_mlp_bias", dtype=dtype), tmp_path)
    assert torch.equal(logits(handle.model), logits(model))
    layer = handle.model.model.layers[0].mlp.down_proj
    trained = layer.update if rank is None else layer.delta_a
    assert trained.dtype == torch.float32
    merged = handle.merge().state_dict()
    saved = model.state_dict()
    for name, tensor in merged.items():
        assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_adapter_fits_a_copy_in_another_dtype(trained, dtype):
    """Its update is added to that copy's own rows."""
    model, folder = trained
    base = build_model().to(dtype)
    want = base.state_dict()[f"{NAME}.weight"].clone()
    handle = loki.load_adapter(base, folder)
    update = model.get_submodule(NAME).update.detach()
    merged = handle.merge().state_dict()[f"{NAME}.weight"]
    want[ROWS[0]] = (want[ROWS[0]].to(torch.promote_types(dtype, torch.float32)) + update).to(dtype)
    assert torch.equal(merged, want)


def test_a_new_head_goes_with_the_adapter(tmp_path):
    config = build_model().config
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).to(DEVICE)
    base = copy.deepcopy(model)
    loki.patch(model, ROWS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batch = token_batch()
    for _ in range(2):
        model(input_ids=batch, labels=torch.zeros(len(batch), dtype=torch.int64)).loss.backward()
        optimizer.step()
    assert not torch.equal(model.score.weight, base.score.weight)
    loki.save_adapter(model, tmp_path)
    again = loki.load_adapter(copy.deepcopy(base), tmp_path).model
    assert torch.equal(again.score.weight, model.score.weight)
    assert torch.equal(again(input_ids=batch).logits, model(input_ids=batch).logits)


def test_adapter_holds_the_update_alone(trained):
    model, folder = trained
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    layers = adapter_file.read_update(folder / "adapter_model.safetensors").layers
    assert list(layers) == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert torch.equal(layers[NAME]["index"], torch.tensor([1, 5, 40]))
    assert torch.equal(layers[NAME]["update"], model.model.layers[0].mlp.down_proj.update.cpu())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * 112 * 4 + 2500


def test_a_trained_adapter_can_be_trained_further(trained):
    model, folder = trained
    handle = loki.load_adapter(build_model(), folder)
    torch.testing.assert_close(logits(train(handle.model)), logits(train(model)))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: build_model(seed=1), "trained on another base"),
        (lambda: build_model("gpt_neox"), "which the model lacks"),
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
        ({"peft_type": "LORA"}, "type LORA; load it with PEFT"),
        ({"base_sketch": "["}, "not an adapter's config"),
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
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone, nor"):
        loki.load_adapter(build_model(), tmp_path / "gone")
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder with an adapter, the side file of a checkpoint): their bytes stay as they are."""
    model = build_model()
    loki.patch(model, ROWS)
    folder = tmp_path_factory.mktemp("written")
    model.save_pretrained(folder / "checkpoint")
    return loki.save_adapter(model, folder / "adapter"), folder / "checkpoint" / "loki_rows.update"


@few
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_an_error(written, share, tmp_path):
    folder, side_file = written
    for path in (folder / "adapter_model.safetensors", side_file):
        content = path.read_bytes()
        (tmp_path / "cut.update").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"cut\.update"):
            adapter_file.read_update(tmp_path / "cut.update")


@few
@given(place=st.integers(0, 2**16), byte=st.integers(0, 255), side=st.booleans())
def test_an_update_of_which_a_byte_is_another_is_refused_or_loaded(
    written, place, byte, side, tmp_path
):
    folder = tmp_path / ("checkpoint" if side else "adapter")
    path = folder / ("loki_rows.update" if side else "adapter_model.safetensors")
    folder.mkdir(exist_ok=True)
    if side:
        shutil.copy(written[1], path)
    else:
        shutil.copytree(written[0], folder, dirs_exist_ok=True)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    model = build_model()
    want = logits(model)
    with contextlib.suppress(ValueError):
        loki.load_adapter(model, folder).unpatch()
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", [b"base_sketch", b"base_dtype"])
def test_a_side_file_whose_metadata_are_damaged_is_named(written, name, tmp_path):
    content = written[1].read_bytes()
    assert content.count(name) == 1
    (tmp_path / "loki_rows.update").write_bytes(content.replace(name, b"x" * len(name)))
    with pytest.raises(ValueError, match=r"loki_rows\.update is damaged"):
        loki.load_adapter(build_model(), tmp_path)


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


def test_an_update_written_before_zero3_split_the_weights_is_saved_once(trained, tmp_path):
    """The engine collects a weight as it split it: with what a forward pass had written into it."""
    model, folder = trained
    want = model.state_dict()[f"{NAME}.weight"].clone()
    again = build_model()
    handle = loki.patch(again, folder)
    logits(again)
    collected = again.state_dict()
    for _, layer in handle.named_layers():
        layer.frozen.ds_id = 0  # as every parameter has then
    again.save_pretrained(tmp_path / "saved", state_dict=collected)
    saved = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved[f"{NAME}.weight"], want.cpu())


def test_an_adapter_and_a_checkpoint_have_a_folder_each(trained, tmp_path):
    """transformers would load the one onto the other, and the update act twice."""
    model, folder = trained
    handle = loki.load_adapter(build_model(), folder)
    want = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is an adapter's folder"):
        model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == want
    handle.model.save_pretrained(tmp_path / "update")
    (tmp_path / "update" / "config.json").unlink()  # what lies beside it is enough
    handle.merge().save_pretrained(tmp_path / "merged")
    for name in ("update", "merged"):
        for save in (loki.save_adapter, loki.export_lora):
            with pytest.raises(ValueError, match="is a checkpoint's folder"):
                save(model, tmp_path / name)
        assert not (tmp_path / name / "adapter_config.json").exists()
    shutil.copy(tmp_path / "update" / "loki_rows.update", folder)
    with pytest.raises(ValueError, match="which may be two"):
        loki.patch(build_model(), folder)


@pytest.mark.parametrize("save", [loki.save_adapter, loki.export_lora])
def test_a_further_tasks_base_is_not_the_first_ones(save, tmp_path, caplog):
    """Whoever loads the second update by its base's name would miss the first."""

    def named():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with loki.patch(model, ROWS):
            save(model, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        return config["base_model_name_or_path"]

    model = build_model()
    model.name_or_path = "the base"
    assert named() == "the base"
    handle = loki.patch(model, ROWS)
    train(model)
    handle.merge()
    assert not caplog.text
    assert named() is None
    assert "the base with an update merged into it" in caplog.text
    model.name_or_path = "first"
    assert named() == "first"


def test_a_trainer_says_at_the_start_that_its_folder_is_an_adapters(trained, caplog):
    """`save_model` would, when all has been trained; checkpoints lie elsewhere."""
    _, folder = trained
    callback = loki.patch(build_model(), ROWS).trainer_callback()
    arguments = transformers.TrainingArguments(str(folder), use_cpu=True)
    state = transformers.TrainerState()
    callback.on_train_begin(arguments, state, transformers.TrainerControl())
    assert "save_model() will be refused" in caplog.text
    once = transformers.TrainingArguments(str(folder), use_cpu=True, save_strategy="no")
    arguments.push_to_hub = True
    for last in (arguments, once):  # whose only save it is
        with pytest.raises(ValueError, match="is an adapter's folder"):
            callback.on_train_begin(last, state, transformers.TrainerControl())


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


def fingerprint(layers):
    return BaseRows.of(layers).fingerprint


def test_fingerprint_does_not_see_the_dtype_a_model_was_loaded_in():
    rows = torch.randn(50, 64)
    rows[0, :8] = torch.tensor([0.0, -0.0, 1e-5, -6e-8, 2.0**-14, -(2.0**-14), 3e-5, 65000.0])
    checkpoint = rows.to(torch.bfloat16)
    want = fingerprint([checkpoint])
    assert fingerprint([checkpoint.float()]) == want
    assert fingerprint([checkpoint.half()]) == want
    assert fingerprint([rows]) == fingerprint([rows.to(torch.bfloat16)])
    other = checkpoint.clone()
    other[3, 5] *= 1.01
    assert fingerprint([other]) != want
    assert fingerprint([checkpoint.flip(0)]) != want
    assert fingerprint([checkpoint[:20], checkpoint[20:]]) != want


@pytest.mark.parametrize("bits", [4, 8])
def test_a_sketch_knows_a_quantized_copy_from_another_model(bits):
    torch.manual_seed(0)
    layers = [0.02 * torch.randn(51, 333) for _ in range(6)]

    def quantized(rows):
        scale = rows.abs().unflatten(1, (-1, 37)).amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
        return (rows.unflatten(1, (-1, 37)) / scale).round().mul(scale).flatten(1)

    base = BaseRows.of(layers)
    copied = BaseRows.of([quantized(rows) for rows in layers], quantized=True)
    assert base.fingerprint != copied.fingerprint
    assert base.why_other(copied) is None
    assert copied.why_other(base) is None
    other = BaseRows.of([quantized(rows.roll(1, 0)) for rows in layers], quantized=True)
    assert "copies of one model differ by less than 25%" in base.why_other(other)
    assert "other layers" in base.why_other(BaseRows.of(layers[:3], quantized=True))
    rounded = [rows.to(torch.float8_e4m3fn).float() for rows in layers]
    assert copied.why_other(BaseRows.of(rounded, quantized=True)) is None  # of one model too
    assert "differ by less" in copied.why_other(other)
    near = BaseRows.of([rows + 1e-3 for rows in layers])  # of one dtype copies are equal
    assert "have other values" in base.why_other(near)


@pytest.mark.parametrize(
    ("rank", "dtype", "lr"),
    [
        (None, torch.float32, 1e-3),  # an update of 4 %, over a quantized base
        (2, torch.float32, 1e-3),
        (None, torch.float16, 2e-4),  # of .7 %, where copies may differ by 1 %
        (2, torch.float16, 1e-3),
    ],
)
def test_merged_rows_are_no_copy_of_the_base(rank, dtype, lr, tmp_path):
    rows = [list(range(40))] * 3
    handle = loki.patch(build_model(), rows, rank=rank)
    loki.save_adapter(train(handle.model, lr=lr), tmp_path)
    if dtype == torch.float32:
        edit_config(tmp_path, base_dtype="quantized")
    merged = handle.merge().to(dtype)
    saved, copied = adapter_file.read_saved(tmp_path), copy.deepcopy(merged)
    present = adapter_file.base_of(loki.patch(copied, rows)._layers)
    assert saved.trained_on.why_other(present) is None
    before = snapshot(merged)
    with pytest.raises(ValueError, match="hold it already"):
        loki.load_adapter(merged, tmp_path)
    assert_unchanged(merged, before)
    loki.load_adapter(build_model(dtype=torch.bfloat16), tmp_path)


@pytest.mark.parametrize("save", [loki.save_adapter, loki.export_lora])
def test_merged_weights_alone_are_no_adapter(save, tmp_path):
    model = build_model()
    loki.patch(model, ROWS, rank=2)
    train(model).save_pretrained(tmp_path / "trained")
    again = build_model()
    before = snapshot(again)
    handle = loki.patch(again, ROWS, rank=2)
    merged = safetensors.torch.load_file(tmp_path / "trained" / "model.safetensors")
    again.load_state_dict(merged, strict=False)
    for attempt in (lambda: save(again, tmp_path / "out"), handle.merge):
        with pytest.raises(RuntimeError, match="not the update itself"):
            attempt()
    assert not (tmp_path / "out").exists()
    handle.unpatch()
    assert_unchanged(again, before)


@pytest.mark.parametrize("rank", [None, 2])
def test_lora_export_has_one_rank(tmp_path, rank):
    """Servers divide one alpha by the rank that they read off each tensor."""
    model = build_model()
    loki.patch(model, [[1, 5, 40], [], [7]], rank=rank)
    train(model)
    loki.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (3 if rank is None else 2)
    assert "rank_pattern" not in config
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {len(t) for n, t in tensors.items() if "lora_A" in n} == {config["r"]}
    assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {config["r"]}


def test_lora_export_of_a_smaller_rank_is_the_best(tmp_path, caplog):
    model = build_model()
    loki.patch(model, [[1, 5, 40], [0], [7, 3]])
    train(model)
    loki.export_lora(model, tmp_path, max_rank=2)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    lost = total = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, loki.LokiLinear):
            key = f"base_model.model.{name}.lora_"
            want = torch.zeros(48, 112)
            want[layer.index.cpu()] = layer.update.detach().cpu()
            got = tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
            least = torch.linalg.svdvals(want)[2:].square().sum()
            torch.testing.assert_close((got - want).square().sum(), least, atol=1e-7, rtol=1e-3)
            lost, total = lost + float(least), total + float(want.square().sum())
    assert f"relative error of {(lost / total) ** 0.5:.2g}" in caplog.text
    with pytest.raises(ValueError, match="max_rank must be positive"):
        loki.export_lora(model, tmp_path, max_rank=0)


def test_lora_export_names_a_rank_that_is_not_served(tmp_path, caplog, monkeypatch):
    model = build_model()
    loki.patch(model, ROWS)
    loki.export_lora(model, tmp_path)
    assert caplog.text == ""
    monkeypatch.setattr("loki_kernels.training.adapters._LARGEST_SERVED", 2)
    loki.export_lora(model, tmp_path)
    assert "vLLM serves ranks up to 2" in caplog.text


def test_an_adapter_is_loaded_in_one_process_alone(trained, monkeypatch):
    """The first one may measure it; who trains it compares then."""
    _, folder = trained

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(patching, "is_distributed", lambda: True)
    monkeypatch.setattr(patching, "check_processes_agree", never)
    handle = loki.load_adapter(build_model(), folder)
    assert not handle._writer.agreed
