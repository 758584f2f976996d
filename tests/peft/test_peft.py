"""LoKI as a PEFT method, on whichever PEFT is installed; quantized bases in test_quantized.py."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import peft
import pytest
import torch

import loki_kernels as loki
import loki_kernels.peft
from loki_kernels import memory
from loki_kernels.attribution import analysis
from loki_kernels.peft import LokiConfig, LokiLayer
from tests.models import ARCHITECTURES, DEVICE, build_model, to_device
from tests.tiny_training import (
    ROWS,
    WordTokenizer,
    load_model,
    logits,
    protection_file,
    straight_and_resumed,
    tiny_trainer,
    token_batch,
    train,
    train_averaged,
)


@pytest.fixture
def row_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def base(tmp_path):
    """A checkpoint folder, as adapters name their base."""
    build_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def down_proj(model, layer=0):
    return model.get_base_model().model.layers[layer].mlp.down_proj


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ["llama", "llama_mlp_bias", "gemma2", "gpt_neox"])
def test_trains_as_patch_does(name, rank, row_file):
    torch.manual_seed(1)
    patched = build_model(name)
    torch.manual_seed(2)
    handle = loki.patch(patched, row_file, rank=rank)
    wrapped = build_model(name)
    torch.manual_seed(2)
    model = peft.get_peft_model(wrapped, LokiConfig(rows=str(row_file), rank=rank))
    assert torch.equal(logits(model), logits(build_model(name)))
    train(patched)
    train(model)
    want = handle.merge().state_dict()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == want.keys()
    start = build_model(name).state_dict()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, want[key], atol=2e-5, rtol=2e-5, msg=key)
        changed = (tensor != start[key]).nonzero()[:, :1].unique().tolist()
        assert changed in ([], [0], [3, 7], [1, 5, 40]), key


@pytest.mark.parametrize("second", [{"rows": ROWS}, {"rows": ROWS, "rank": 2}])
@pytest.mark.parametrize("first", [{}, {"rank": 2}, {"protect": True}, {"rows": [[9], [], []]}])
def test_a_second_adapter_of_a_name_replaces_the_first(first, second, base_folder, tmp_path):
    """PEFT wraps a base again with no more than a warning, as when a notebook's cell is rerun."""
    first = {"rows": ROWS} | first
    if "protect" in first:
        first["protect"] = protection_file(base_folder)
    base = load_model(base_folder)
    train(peft.get_peft_model(base, LokiConfig(**first)))
    model = train(peft.get_peft_model(base, LokiConfig(**second)))
    want = train(peft.get_peft_model(load_model(base_folder), LokiConfig(**second)))
    if "rank" not in second:  # whose factors are drawn
        torch.testing.assert_close(logits(model), logits(want))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load_model(base_folder), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(loaded))


def test_a_second_adapter_that_is_refused_leaves_the_first(tmp_path):
    base = build_model()
    model = train(peft.get_peft_model(base, LokiConfig(rows=ROWS, rank=2)))
    want, config = logits(model), model.peft_config["default"]
    second = LokiConfig(rows=ROWS, protect=str(tmp_path / "gone.safetensors"))
    with pytest.raises(FileNotFoundError, match="gone"):
        peft.get_peft_model(base, second)
    assert torch.equal(logits(model), want)
    assert model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(build_model(), tmp_path)), want)


@pytest.mark.parametrize(
    "beside",
    [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": list(range(50))}],
)
def test_a_second_adapters_rows_are_the_bases(beside, base_folder, monkeypatch):
    """Which rows matter least is asked of the base without the first adapter."""
    seen = []

    def selection(structure, *_, **__):
        seen.append(logits(structure.causal_lm))
        return loki.RowSelection(ROWS)

    base = load_model(base_folder)
    want = logits(base)
    model = train(peft.get_peft_model(base, LokiConfig(rows=ROWS, **beside)))
    learned = logits(model)
    monkeypatch.setattr(loki_kernels.peft.model, "selection_to_train", selection)
    model.add_adapter("other", LokiConfig(quota=10))
    torch.testing.assert_close(seen[0], want)
    torch.testing.assert_close(logits(model), learned)


@pytest.mark.parametrize("protected", [False, True])
def test_an_average_is_of_the_same_rows(protected, base_folder):
    protect = protection_file(base_folder) if protected else None
    config = LokiConfig(rows=ROWS, protect=protect)
    averaged, want = train_averaged(peft.get_peft_model(load_model(base_folder), config))
    again = peft.get_peft_model(load_model(base_folder), config)
    for tensor in averaged.state_dict().values():
        if not tensor.is_floating_point():
            tensor.sub_(1)  # as an average in a state dict may
    again.load_state_dict(averaged.state_dict())  # it compares rows and protections
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(want[name])
    torch.testing.assert_close(logits(averaged), logits(again))
    merged = averaged.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(again))


@pytest.mark.parametrize(("free", "said"), [(400_000, False), (200_000, True)])
def test_too_little_memory_is_said_before_anything_is_estimated(free, said, monkeypatch, caplog):
    """430,000 bytes would hold the rows as they were, too, which only `loki.patch` keeps."""
    model = build_model(device="cpu")
    own = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(memory, "accelerator", lambda: (torch.device("cuda", 0), own + free))
    monkeypatch.setattr(
        loki_kernels.peft.model, "protection_to_keep", lambda *_: pytest.fail("estimated")
    )
    with caplog.at_level("WARNING"), pytest.raises(pytest.fail.Exception):
        peft.get_peft_model(model, LokiConfig())
    found = "training 100 % of the rows takes 0.0 GB .* quota=50, protect=True takes"
    assert bool(re.search(found, caplog.text)) == said


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_starts_as_its_base(name):
    want = logits(build_model(name))
    model = peft.get_peft_model(build_model(name), LokiConfig(rows=ROWS))
    assert torch.equal(logits(model), want)
    assert model.get_nb_trainable_parameters()[0] == 6 * down_proj_width(name)


def down_proj_width(name):
    return ARCHITECTURES[name]().intermediate_size


def test_base_weights_are_never_written():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    train(model)
    start = build_model().state_dict()
    layer = down_proj(model).base_layer
    assert torch.equal(layer.weight, start["model.layers.0.mlp.down_proj.weight"])
    want = logits(build_model())
    batch = token_batch()
    loss = model(input_ids=batch, labels=batch).loss
    with model.disable_adapter():  # between a forward pass and its backward pass, as DPO does
        assert torch.equal(logits(model), want)
    loss.backward()
    assert down_proj(model).loki_update["default"].grad is not None


def test_a_merged_adapter_that_is_turned_off_is_the_base():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    learned = logits(train(model))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build_model()))
    assert torch.equal(logits(model), learned)


@pytest.mark.parametrize("rank", [None, 2])
def test_merging_is_undone_bit_for_bit(rank):
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, rank=rank))
    learned = logits(train(model))
    weight = down_proj(model).base_layer.weight.clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), learned, atol=1e-5, rtol=1e-5)
    assert not torch.equal(down_proj(model).base_layer.weight, weight)
    model.unmerge_adapter()
    assert torch.equal(down_proj(model).base_layer.weight, weight)
    assert torch.equal(logits(model), learned)
    with torch.no_grad():
        part = down_proj(model).loki_update if rank is None else down_proj(model).loki_delta_a
        part["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(down_proj(model).base_layer.weight, weight)


def test_saves_and_loads(base, tmp_path):
    model = peft.get_peft_model(load_model(base), LokiConfig(rows=ROWS))
    want = logits(train(model))
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    again = peft.PeftModel.from_pretrained(load_model(base), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), want)
    assert not any(p.requires_grad for p in again.parameters())
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(auto.to(DEVICE)), want)
    handle = loki.load_adapter(load_model(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(handle.model), want)
    with pytest.raises(ValueError, match="another base"):
        peft.PeftModel.from_pretrained(build_model(seed=1), str(tmp_path / "adapter"))


def test_reads_what_save_adapter_wrote(base, tmp_path):
    for rank in (None, 2):
        model = load_model(base)
        loki.patch(model, [ROWS[0], [], ROWS[2]], rank=rank)
        want = logits(train(model))
        folder = str(loki.save_adapter(model, tmp_path / f"adapter-{rank}"))
        again = peft.PeftModel.from_pretrained(load_model(base), folder, is_trainable=True)
        torch.testing.assert_close(logits(again), want)
        assert any(p.requires_grad for p in again.parameters())
        torch.testing.assert_close(logits(train(again)), logits(train(model)), atol=1e-4, rtol=1e-4)


def test_several_adapters():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    first = logits(train(model))
    model.add_adapter("other", LokiConfig(rows=[[2, 5], [9], [8]]))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(build_model()))
    other = logits(train(model))
    assert not torch.allclose(other, first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build_model()))
    with pytest.raises(ValueError, match="trains row 5"):
        model.base_model.set_adapter(["default", "other"])
    model.add_adapter("apart", LokiConfig(rows=[[2], [9], [8]]))
    model.base_model.set_adapter(["default", "apart"])
    torch.testing.assert_close(logits(model), first)  # a product of other columns rounds otherwise
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in model.named_buffers())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), first, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, LokiLayer) for m in merged.modules())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_a_second_adapter(base, tmp_path, low_cpu_mem_usage):
    wants, updates = {}, {}
    for name, rows in (("a", ROWS), ("b", [[2], [9], [8]])):
        model = peft.get_peft_model(load_model(base), LokiConfig(rows=rows))
        wants[name] = logits(train(model))
        updates[name] = down_proj(model).loki_update["default"]
        model.save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(
        load_model(base), str(tmp_path / "a"), adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage
    )
    model.load_adapter(str(tmp_path / "b"), "b", low_cpu_mem_usage=low_cpu_mem_usage)
    for name, want in wants.items():
        model.set_adapter(name)
        assert torch.equal(down_proj(model).loki_update[name], updates[name])
        # with low_cpu_mem_usage the update lies in the mapped file, where products round otherwise
        torch.testing.assert_close(logits(model), want)


def rounded_sum(base, update):
    """What merging has to give: one rounding."""
    return (base.double() + update.double()).to(base.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_float32_update_of_a_base_of_any_dtype(tmp_path, dtype):
    model = peft.get_peft_model(build_model(dtype=dtype), LokiConfig(rows=ROWS))
    update = down_proj(model).loki_update["default"]
    assert update.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not update.any()
    want = logits(train(model, lr=0.01))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build_model(dtype=dtype), str(tmp_path))
    assert torch.equal(logits(again), want)
    start = build_model(dtype=dtype).model.layers[0].mlp.down_proj.weight
    rows = sorted(ROWS[0])
    merged = model.merge_and_unload().model.layers[0].mlp.down_proj.weight
    assert merged.dtype == dtype
    assert torch.equal(merged[rows], rounded_sum(start[rows], update))


def test_analyses_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(analysis, "find_tokenizer", lambda model: WordTokenizer())
    model = peft.get_peft_model(build_model(), LokiConfig(quota=25))
    with loki.patch(build_model(), tokenizer=WordTokenizer(), quota=25) as handle:
        assert model.peft_config["default"].rows == [layer.tolist() for layer in handle.rows]


def test_a_saved_config_makes_the_same_again(row_file, base, tmp_path):
    """Named rows have no quota that chose them, and a config has either."""
    peft.get_peft_model(load_model(base), LokiConfig(rows=str(row_file))).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    again = LokiConfig(**{name: saved[name] for name in ("rows", "quota", "criterion", "rank")})
    assert again.rows == [sorted(rows) for rows in ROWS]


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_a_model_whose_adapter_was_taken_off_runs(way):
    """Under the PEFT model, whose hook looks for layers in training mode."""
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    getattr(model, way)()
    ids = token_batch()
    want = build_model().train()(input_ids=ids, labels=ids)
    got = model.train()(input_ids=ids, labels=ids)
    assert torch.equal(got.loss, want.loss)


OTHER_BASE = {"fingerprint": "0", "base_dtype": "float32", "base_sketch": [[0.0] * 4] * 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [[1], [2]]}, "2 layers, the model 3"),
        ({"rows": [[48], [1], [1]]}, "row 48 of layer 0 is out of range"),
        ({"rows": ROWS, "quantized_merge": "somehow"}, "quantized_merge='somehow' is unknown"),
        ({"rows": ROWS, "rank": 0}, "rank"),
        ({"rows": ROWS} | OTHER_BASE, "another base"),
    ],
)
def test_bad_configs(options, message):
    model = build_model()
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, LokiConfig(**options))
    assert not any(isinstance(m, LokiLayer) for m in model.modules())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[-1], [2], [3]], "layer 0 has -1 where a row number should be"),
        ([[1], [2, 2], [3]], "layer 1 has row 2 twice"),
        ("{", r"rows\.json is not a row file"),
        ('{"counts": 1}', r"rows\.json is not a row file"),
        ("[[1, -2], [3]]", r"rows\.json: layer 0 has -2 where"),
        ("[[1, 1], [3]]", r"rows\.json: layer 0 has row 1 twice"),
    ],
)
def test_rows_are_checked_when_a_config_is_made(rows, message, tmp_path):
    if isinstance(rows, str):
        (tmp_path / "rows.json").write_text(rows)
        rows = str(tmp_path / "rows.json")
    with pytest.raises(ValueError, match=message):
        LokiConfig(rows=rows)


def test_a_row_file_of_neurons_is_refused(tmp_path):
    loki.RowSelection(ROWS, {"site": "ffn_neurons"}).save(tmp_path / "rows.json")
    with pytest.raises(ValueError, match="ffn_neurons"):
        LokiConfig(rows=str(tmp_path / "rows.json"))


def test_a_config_serves_for_a_second_model():
    config = LokiConfig(rows=ROWS)
    merged = train(peft.get_peft_model(build_model(), config)).merge_and_unload()
    second = peft.get_peft_model(merged, config)
    assert config.fingerprint is None
    assert config.target_modules is None
    assert second.peft_config["default"].fingerprint is not None


def test_rows_of_another_selection_are_not_loaded_into_an_adapter(tmp_path):
    """As a Trainer does that resumes after the row file was made anew."""
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    train(model)
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(build_model(), LokiConfig(rows=[[1, 5, 41], [0], [7, 3]]))
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(ValueError, match="trains other rows in adapter 'default'"):
        other.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    assert torch.equal(logits(other), logits(build_model()))


@pytest.mark.parametrize(
    ("own", "saved", "message"),
    [
        (
            {"rank": 2},
            {},
            "another rank than adapter 'default': it lacks the loki_delta_a of model",
        ),
        ({}, {"rank": 2}, "another rank than adapter 'default': it lacks the loki_update of model"),
        ({"rows": [[1], [2], [3]]}, {"rows": [[1], [], [3]]}, r"other layers .*model\.layers\.1\."),
        ({"rows": [[1], [], [3]]}, {"rows": [[1], [2], [3]]}, r"other layers .*model\.layers\.1\."),
    ],
)
def test_what_would_be_loaded_in_part_is_refused(own, saved, message, tmp_path):
    """PEFT passes over what it does not find, and leaves the rest as it was."""
    train(peft.get_peft_model(build_model(), LokiConfig(**{"rows": ROWS} | saved))).save_pretrained(
        tmp_path
    )
    model = peft.get_peft_model(build_model(), LokiConfig(**{"rows": ROWS} | own))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_adapter_is_added_to_a_merged_model():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    learned = logits(train(model))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("other", LokiConfig(rows=[[1], [1], [1]]))
    model.unmerge_adapter()
    assert torch.equal(logits(model), learned)


def test_errors_of_one_layer_change_no_other():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    model.add_adapter("other", LokiConfig(rows=[[2], [9], [3]]))  # in common in the last layer
    learned = logits(train(model))
    with pytest.raises(ValueError, match="trains row 3"):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model), learned)
    with pytest.raises(ValueError, match="trains row 3"):
        model.merge_and_unload(adapter_names=["default", "other"])
    with torch.no_grad():
        down_proj(model, 2).loki_update["default"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in model.base_model._loki_layers())
    assert len(model.base_model._loki_layers()) == 3


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_small_updates_of_a_bfloat16_base_are_loaded(tmp_path, low_cpu_mem_usage):
    model = peft.get_peft_model(build_model(dtype=torch.bfloat16), LokiConfig(rows=ROWS))
    with torch.no_grad():
        rows = down_proj(model).loki_update["default"]
        rows += 1e-5 * torch.randn_like(rows)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        build_model(dtype=torch.bfloat16), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(down_proj(again).loki_update["default"], rows)


def test_an_update_that_a_trainer_rounds_is_named(caplog):
    model = peft.get_peft_model(build_model(dtype=torch.bfloat16), LokiConfig(rows=ROWS))
    train(model, steps=1)
    assert "rounded away" not in caplog.text
    model = peft.get_peft_model(build_model(dtype=torch.bfloat16), LokiConfig(rows=ROWS))
    for parameter in model.parameters():
        if parameter.requires_grad:  # as TRL does over bitsandbytes
            parameter.data = parameter.data.bfloat16()
    train(model, steps=2)
    assert caplog.text.count("rounded away") == 1


def test_only_what_is_trained_requires_gradients(tmp_path):
    model = peft.get_peft_model(build_model(dtype=torch.bfloat16), LokiConfig(rows=ROWS))
    model.save_pretrained(tmp_path)
    model.add_adapter("reference", LokiConfig(rows=ROWS))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith(".default") for name in trained)
    loaded = peft.PeftModel.from_pretrained(build_model(dtype=torch.bfloat16), str(tmp_path))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_unmerges_in_another_dtype():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    train(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    want = build_model(dtype=torch.bfloat16).model.layers[0].mlp.down_proj.weight
    assert torch.equal(down_proj(model).base_layer.weight, want)


def test_adapters_within_a_batch_are_refused():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS)).eval()
    with pytest.raises(ValueError, match="mixed within a batch"):
        model(input_ids=token_batch(), adapter_names=["default"])


def test_trainer_resumes_bit_exactly(tmp_path):
    def run(folder, resume=None):
        model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
        tiny_trainer(model, folder, 6).train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if "loki_" in n}

    straight, resumed = straight_and_resumed(run, tmp_path)
    assert straight
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    def gradients(checkpoint):
        model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS)).train()
        if checkpoint:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        batch = token_batch()
        model(input_ids=batch, labels=batch).loss.backward()
        return down_proj(model).loki_update["default"].grad

    assert torch.equal(gradients(True), gradients(False))


def test_autocast():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    batch = token_batch()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    assert down_proj(model).loki_update["default"].grad.dtype == torch.float32


def test_compiles_without_breaks():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer = down_proj(peft.get_peft_model(build_model(), LokiConfig(rows=ROWS)))
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD([layer.loki_update["default"]], lr=0.1)
    for _ in range(3):
        x = to_device(torch.randn(5, 112))
        y = run(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


def test_an_adapter_that_accelerate_has_offloaded_is_refused():
    """It brings in the parameters of what is called, and those of an adapter's are in a dict."""
    from accelerate import cpu_offload

    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    cpu_offload(model, execution_device=DEVICE)
    assert down_proj(model).loki_update["default"].is_meta
    with pytest.raises(loki.UnsupportedModelError, match="'default' is not in memory"):
        model(input_ids=token_batch())


def test_copies():
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS))
    twin = copy.deepcopy(model)
    train(twin)
    assert torch.equal(logits(model), logits(build_model()))
    assert not torch.equal(logits(twin), logits(model))


def test_registration_needs_the_import():
    """Nothing of PEFT changes until loki_kernels.peft is imported, whatever else is used; nor is
    Triton imported by what the package offers.
    """
    script = (
        "import sys, loki_kernels as loki\n"
        "assert 'peft' not in sys.modules\n"
        # names of the package are imported when they are first used, transformers' Trainer with
        # them, which imports PEFT by itself
        "loki.ops.count_lowest, loki.patch, loki.attribute, loki.drift, loki.save_adapter\n"
        "assert 'loki_kernels.training.adapters' in sys.modules\n"
        "assert 'loki_kernels.ops._dispatch' in sys.modules\n"
        "assert 'loki_kernels.ops._triton' not in sys.modules\n"
        "import peft; assert 'LOKI' not in list(peft.PeftType)\n"
        "import loki_kernels.peft; assert 'LOKI' in list(peft.PeftType)\n"
        "assert peft.PeftType.LOKI == peft.PeftType('LOKI') == 'LOKI'"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_old_peft_is_refused(monkeypatch):
    import importlib

    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"needs peft 0.18 or newer; 0.17.1"):
        importlib.reload(loki_kernels.peft.config)
