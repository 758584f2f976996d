"""LokiConfig(protect=): what trains is projected, and what is saved needs no protection."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from functools import cache, partial
from pathlib import Path

import peft
import pytest
import torch
import transformers

import loki_kernels as loki
from loki_kernels.attribution import analysis
from loki_kernels.peft import LokiConfig
from loki_kernels.peft import config as config_module
from loki_kernels.peft import layer as layer_module
from loki_kernels.peft import model as model_module
from loki_kernels.protection import estimate
from loki_kernels.training import targets
from tests.models import DEVICE, build_model
from tests.tiny_tokenizers import chat_tokenizer
from tests.tiny_training import (
    ROWS,
    WordTokenizer,
    batch_answers,
    load_model,
    logits,
    protection_of,
    token_batch,
    train,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "protection.safetensors"
    protection_of(build_model()).save(path)
    return path


@pytest.mark.parametrize("rank", [None, 2])
def test_trains_as_patch_does(rank, file):
    patched, wrapped = build_model(), build_model()
    torch.manual_seed(2)
    handle = loki.patch(patched, ROWS, rank=rank, protect=file)
    torch.manual_seed(2)
    model = peft.get_peft_model(wrapped, LokiConfig(rows=ROWS, rank=rank, protect=str(file)))
    train(patched)
    train(model)
    torch.testing.assert_close(logits(model), logits(patched), rtol=1e-4, atol=1e-5)
    handle.merge()
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(patched))


@pytest.mark.parametrize("when", ["added", "run"])
def test_zero_3_trains_no_protected_adapter(when, file):
    """It collects a state dict by itself, which would hold the update as it does not act."""
    config, model = LokiConfig(rows=ROWS, protect=str(file)), build_model()
    if when == "run":  # split once it is made
        model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        parameter.ds_id = 0
    attempt = {
        "added": lambda: peft.get_peft_model(model, config),
        "run": lambda: model(input_ids=token_batch()),
    }[when]
    with pytest.raises(loki.UnsupportedModelError, match="cannot train a protected LoKI adapter"):
        attempt()


@pytest.mark.parametrize("rank", [None, 2])
def test_an_adapter_needs_its_protection_to_be_trained_on_alone(rank, file, tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    model = peft.get_peft_model(base, LokiConfig(rows=ROWS, rank=rank, protect=str(file)))
    train(model)
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    kept = file.read_bytes()
    file.unlink()
    beside = tmp_path / "adapter" / "loki_rows.protection"
    assert beside.is_file()
    loaded = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), want)
    ours = loki.load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours.model), want)

    def trainable(protect=None):
        base = load_model(tmp_path / "base")
        config = LokiConfig.from_pretrained(tmp_path / "adapter")
        config.protect = config.protect if protect is None else str(protect)
        return peft.PeftModel.from_pretrained(
            base, tmp_path / "adapter", is_trainable=True, config=config
        )

    train(trainable())  # by what lies beside it
    loaded.save_pretrained(tmp_path / "adapter")  # which knows no protection and leaves it
    beside.unlink()
    with pytest.raises(ValueError, match="name its file"):
        trainable()
    protection_of(build_model(), seed=5).save(file)
    with pytest.raises(ValueError, match="another protection"):
        trainable(file)
    file.write_bytes(kept)
    again = trainable(file)
    torch.testing.assert_close(logits(again), want)
    train(again)
    again.delete_adapter("default")


def test_transformers_reads_an_adapter_wherever_its_protection_is(tmp_path):
    """As pipelines and evaluations do, by the adapter's folder alone."""
    pytest.importorskip("peft.utils.transformers_weight_conversion")  # which transformers asks for
    build_model().save_pretrained(tmp_path / "base")
    file = tmp_path / "protection.safetensors"
    protection_of(build_model()).save(file)
    base = load_model(tmp_path / "base")
    model = train(peft.get_peft_model(base, LokiConfig(rows=ROWS, protect=str(file))))
    model.save_pretrained(tmp_path / "adapter")
    file.unlink()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.to(DEVICE)), logits(model))


def test_a_protection_of_a_model_of_another_name_is_warned_of(tmp_path, caplog):
    protection, file = protection_of(build_model()), tmp_path / "protection.safetensors"
    protection.info["model"] = "meta-llama/Llama-3.1-8B"
    protection.save(file)
    model = build_model()
    model.name_or_path = "mistralai/Mistral-7B-v0.3"
    peft.get_peft_model(model, LokiConfig(rows=ROWS, protect=str(file)))
    assert caplog.text.count("worse than none") == 1


@pytest.mark.parametrize("rows", [[[1], [2]], [[48], [1], [1]]])
def test_rows_are_checked_before_a_protection_is_estimated(rows, monkeypatch):
    monkeypatch.setattr(model_module, "protection_to_keep", lambda *_: pytest.fail("it estimates"))
    with pytest.raises(ValueError, match=r"layers|out of range"):
        peft.get_peft_model(build_model(), LokiConfig(rows=rows, protect=True))


def test_a_protection_is_read_before_an_analysis(monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "cached_attribution", lambda *_: pytest.fail("it analyses"))
    with pytest.raises(FileNotFoundError, match="gone"):
        peft.get_peft_model(
            build_model(), LokiConfig(quota=25, protect=str(tmp_path / "gone.safetensors"))
        )


def test_a_config_names_a_file():
    with pytest.raises(TypeError, match=r"protection.save\(FILE\), protect=FILE"):
        LokiConfig(rows=ROWS, protect=protection_of(build_model()))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What a model says by itself, given; a cache of its own."""
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(estimate, "draw_samples", lambda *_, **__: [[5, 6, 7, 8, 9], [11, 12, 13]])
    monkeypatch.setattr(estimate, "openings_of", lambda tokenizer: [[1]])
    monkeypatch.setattr(estimate, "find_tokenizer", lambda model: object())


def test_true_estimates_one_and_all_rows_need_no_analysis(drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "cached_attribution", None)
    build_model().save_pretrained(tmp_path / "base")
    config = LokiConfig(quota=100, protect=True)
    model = peft.get_peft_model(load_model(tmp_path / "base"), config)
    patched = load_model(tmp_path / "base")
    handle = loki.patch(patched, quota=100, protect=True)
    train(model)
    train(patched)
    handle.merge()
    torch.testing.assert_close(logits(model), logits(patched), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")

    def trainable():
        base = load_model(tmp_path / "base")
        return peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)

    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(estimate, "draw_samples", lambda *_, **__: [[25, 26, 27, 28, 29]])
    train(trainable())  # by what lies beside it
    (tmp_path / "adapter" / "loki_rows.protection").unlink()
    with pytest.raises(ValueError, match="name its file"):
        trainable()


def test_a_second_adapter_is_protected_as_the_first(drawn, monkeypatch, tmp_path):
    """Of the base alone; TRL adds its reference by the first one's config."""
    config = LokiConfig(quota=100, protect=True)
    model = peft.get_peft_model(build_model(), config)
    train(model)
    monkeypatch.setattr(estimate, "estimate_protection", None)
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path / "empty"))
    for name, added in [("ref", model.peft_config["default"]), ("new", config)]:
        model.add_adapter(name, added)
        layer = model.get_base_model().model.layers[1].mlp.down_proj
        assert torch.equal(layer.loki_directions[name], layer.loki_directions["default"])
        assert model.peft_config[name].protection == model.peft_config["default"].protection
    model.set_adapter("new")
    train(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directions_stay_in_the_base_s_dtype(dtype, tmp_path):
    """PEFT makes float32 of what adapters hold in 16 bits."""
    file = tmp_path / "protection.safetensors"
    protection_of(build_model(dtype=dtype)).save(file)
    config = LokiConfig(rows=ROWS, protect=str(file), trainable_token_indices=[96])
    model = peft.get_peft_model(build_model(dtype=dtype), config)
    model.save_pretrained(tmp_path / "adapter")
    model.add_adapter("added", LokiConfig(rows=ROWS, protect=str(file)))
    model.load_adapter(tmp_path / "adapter", "loaded", is_trainable=True)
    layers = [m for m in model.modules() if isinstance(m, layer_module.LokiLayer)]
    assert len(layers) == 3
    for layer in layers:
        for name in ("default", "added", "loaded"):
            assert layer.loki_directions[name].dtype == dtype
            assert layer.loki_update[name].dtype == torch.float32
    deltas = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert deltas
    assert all(delta.dtype == torch.float32 for delta in deltas)
    train(model)


def test_the_model_keeps_nothing_of_what_a_new_adapter_is_made_of(file):
    """Directions that are moved to the weights' device, or padded, are other tensors there."""
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    assert not model.base_model._added
    layers = [m for m in model.modules() if isinstance(m, layer_module.LokiLayer)]
    held = [weakref.ref(layer.loki_directions["default"]) for layer in layers]
    model.delete_adapter("default")
    gc.collect()
    assert not any(reference() is not None for reference in held)


@pytest.mark.parametrize("first", [{"rows": ROWS}, {"rows": [[1], [], [2]], "protect": True}])
def test_a_second_adapter_alone_protected_needs_a_file(drawn, first, file):
    model = peft.get_peft_model(build_model(), LokiConfig(**first))
    with pytest.raises(ValueError, match="protect=FILE"):
        model.add_adapter("second", LokiConfig(rows=ROWS, protect=True))
    model.add_adapter("third", LokiConfig(rows=ROWS, protect=str(file)))


def test_an_adapter_of_patch_is_trained_on(file, tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    loki.patch(model, ROWS, protect=file)
    train(model)
    loki.save_adapter(model, tmp_path / "adapter")
    file.unlink()
    base = load_model(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    torch.testing.assert_close(logits(again), logits(model))
    train(again)


def test_all_rows_protected_unless_something_says_what_to_train(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path))
    model, tokenizer = build_model(), chat_tokenizer()
    monkeypatch.setattr(estimate, "find_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(estimate, "draw_samples", cache(estimate.draw_samples))  # both draw alike
    want = loki.estimate_protection(model, tokenizer=tokenizer)
    config = peft.get_peft_model(model, LokiConfig()).peft_config["default"]
    assert [len(rows) for rows in config.rows] == [48] * 3
    assert config.protection == want.fingerprint
    config = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS)).peft_config["default"]
    assert config.protection is None


def test_false_trains_all_rows_unprotected(monkeypatch):
    monkeypatch.setattr(estimate, "estimate_protection", None)
    monkeypatch.setattr(targets, "cached_attribution", None)
    model = peft.get_peft_model(build_model(), LokiConfig(protect=False))
    config = model.peft_config["default"]
    assert [len(rows) for rows in config.rows] == [48] * 3
    assert config.protection is None
    patched = build_model()
    handle = loki.patch(patched, protect=False)
    train(model)
    train(patched)
    handle.merge()
    torch.testing.assert_close(logits(model), logits(patched), rtol=1e-4, atol=1e-5)


def test_the_papers_rows_are_one_argument_away(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(analysis, "find_tokenizer", lambda model: WordTokenizer())
    handle = loki.patch(build_model(), criterion="signed")
    config = LokiConfig(criterion="signed")
    wrapped = peft.get_peft_model(build_model(), config)
    trained = wrapped.peft_config["default"]
    assert trained.rows == [layer.tolist() for layer in handle.rows]
    assert trained.protection is None
    wrapped.save_pretrained(tmp_path / "adapter")  # whose config has rows and a criterion
    peft.PeftModel.from_pretrained(build_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="chooses rows, and rows= names them"):
        LokiConfig(rows=ROWS, quota=10)
    with pytest.raises(ValueError, match="criterion='lowest' is unknown"):
        LokiConfig(criterion="lowest")


@pytest.mark.parametrize("resumed", ["another", "none", "one where there was none"])
def test_a_state_dict_of_another_protection_is_refused(resumed, file, tmp_path):
    """As HF Trainer resumes: into an adapter that is there, whose config PEFT does not read."""
    first = LokiConfig(rows=ROWS, protect=None if "was none" in resumed else str(file))
    model = peft.get_peft_model(build_model(), first)
    train(model)
    model.save_pretrained(tmp_path / "checkpoint")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if resumed == "another":
        protection_of(build_model(), seed=5).save(file)
    config = LokiConfig(rows=ROWS, protect=None if resumed == "none" else str(file))
    again = peft.get_peft_model(build_model(), config)
    want = logits(again)
    reason = {"another": "with another protection", "none": "with a protection"}
    message = f"patched otherwise: it was trained {reason.get(resumed, 'without a protection')}"
    with pytest.raises(ValueError, match=message):
        again.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
    with pytest.raises(ValueError, match=message):
        again.load_state_dict(state)
    assert torch.equal(logits(again), want)
    same = peft.get_peft_model(build_model(), first) if resumed != "another" else None
    if same is not None:
        same.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
        torch.testing.assert_close(logits(same), logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_loaded_to_be_used_is_not_trained_without_its_protection(file, tmp_path):
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(build_model(), tmp_path / "adapter")
    want = logits(loaded)
    loaded.save_pretrained(tmp_path / "again")  # as it was
    again = peft.PeftModel.from_pretrained(build_model(), tmp_path / "again", is_trainable=True)
    train(again)
    loaded.set_adapter("default")  # PEFT lets it be trained by this
    with pytest.raises(RuntimeError, match="loaded without it"):
        train(loaded.train())
    loaded.eval()
    assert torch.equal(logits(loaded), want)


@pytest.mark.parametrize("turned_on", ["set_adapter", "enable_adapters"])
def test_transformers_trains_no_adapter_without_its_protection(turned_on, file, tmp_path):
    """It throws away the model that PEFT makes, and sets the parameters anew."""
    pytest.importorskip("peft.utils.transformers_weight_conversion")  # which transformers asks for
    trained = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    train(trained)
    trained.save_pretrained(tmp_path)
    model = build_model()
    model.load_adapter(str(tmp_path))
    want = logits(model)
    torch.testing.assert_close(want, logits(trained))
    layers = [m for m in model.modules() if isinstance(m, layer_module.LokiLayer)]

    def enable(enabled):  # as transformers' own do, which ask for a newer PEFT by its number
        for layer in layers:
            layer.enable_adapters(enabled)

    if turned_on == "set_adapter":
        for layer in layers:
            layer.set_adapter("default")
    else:
        enable(False)
        enable(True)
    batch = token_batch()
    with pytest.raises(RuntimeError, match="loaded without it"):
        train(model.train())
    enable(False)
    model(input_ids=batch, labels=batch)  # as the reference of a preference loss
    enable(True)
    loss = model.eval()(input_ids=batch, labels=batch).loss
    with pytest.raises(RuntimeError, match="loaded without it"):
        loss.backward()
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("way", ["copied", "loaded anew"])
def test_an_adapter_s_new_parameters_are_watched_too(file, tmp_path, way):
    """Copying, and PEFT's loading with little memory, make parameters that have no hooks."""
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    train(model)
    model.save_pretrained(tmp_path)
    anew = {"low_cpu_mem_usage": True} if way == "loaded anew" else {}
    loaded = peft.PeftModel.from_pretrained(build_model(), tmp_path, **anew)
    loaded = copy.deepcopy(loaded) if way == "copied" else loaded
    loaded.set_adapter("default")
    batch = token_batch()
    loss = loaded.eval()(input_ids=batch, labels=batch).loss
    with pytest.raises(RuntimeError, match="loaded without it"):
        loss.backward()


def test_a_patched_model_is_refused_before_anything_is_estimated(monkeypatch):
    model = build_model()
    loki.patch(model, ROWS)
    monkeypatch.setattr("loki_kernels.training.targets.cached_protection", None)
    with pytest.raises(ValueError, match=r"already patched; call unpatch\(\) or merge\(\)"):
        peft.get_peft_model(model, LokiConfig())


def test_a_copy_of_an_adapter_shares_its_directions(file):
    """Those of all rows take .9 GB at 8B; TRL's reference is such a copy."""
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    file.unlink()
    model.add_adapter("ref", model.peft_config["default"])
    layers = [m for m in model.modules() if isinstance(m, layer_module.LokiLayer)]
    for layer in layers:
        own, copied = (layer.loki_directions[name] for name in ("default", "ref"))
        assert own.data_ptr() == copied.data_ptr()


def test_generating_forms_a_protected_update_once(file, monkeypatch):
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    train(model)
    model.eval()
    prompt = {"input_ids": token_batch()[:, :4], "pad_token_id": 0}
    options = {"do_sample": False, "max_new_tokens": 6}
    want = model.get_base_model().generate(**prompt, **options)
    want_batch = batch_answers(model.get_base_model().generate_batch)
    formed = []
    real = layer_module.acting_factors
    monkeypatch.setattr(
        layer_module, "acting_factors", lambda *given: formed.append(1) or real(*given)
    )
    assert torch.equal(model.generate(**prompt, **options), want)
    layers = [m for m in model.modules() if isinstance(m, layer_module.LokiLayer)]
    assert len(formed) == len(layers)
    formed.clear()
    assert batch_answers(model.generate_batch) == want_batch
    assert len(formed) == len(layers)
    assert all(layer.formed is None for layer in layers)
    held = []
    layers[0].register_forward_hook(lambda layer, *_: held.append(layer.formed is not None))
    keep = partial(model.generate_batch, persistent_manager=True)  # whose graphs outlive the call
    assert batch_answers(keep) == want_batch
    assert held
    assert not any(held)
    model.get_base_model().destroy_cached_continuous_batching_manager()
    train(model)
    assert not torch.equal(logits(model), want)


def test_a_generation_that_fails_keeps_no_formed_update(file):
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    train(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.get_base_model().model.layers[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.eval().generate(input_ids=token_batch()[:, :4], pad_token_id=0, max_new_tokens=2)
    hook.remove()
    train(model)
    graded = model(input_ids=token_batch()).logits  # for which nothing is taken that was formed
    torch.testing.assert_close(logits(model), graded.detach().cpu())


def test_an_adapter_that_lost_its_protection_is_refused_without_an_estimate(drawn, monkeypatch):
    model = peft.get_peft_model(build_model(), LokiConfig())
    config = LokiConfig(**model.peft_config["default"].to_dict())
    monkeypatch.setattr(estimate, "estimate_protection", lambda *_, **__: pytest.fail("it draws"))
    monkeypatch.setattr(estimate, "cache_folder", lambda: Path("nowhere"))
    with pytest.raises(ValueError, match="name its file"):
        peft.get_peft_model(build_model(), config)

    def fail():
        raise OSError("401")

    config.hub = fail
    with pytest.raises(ValueError, match=r"nothing was fetched: 401"):
        peft.get_peft_model(build_model(), config)


def test_what_a_hubs_config_names_is_not_read_here(file, monkeypatch, tmp_path):
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["protect"] == str(file)
    monkeypatch.setattr(peft.config, "hf_hub_download", lambda *_, **__: str(path))
    assert LokiConfig.from_pretrained("someone/adapter").protect is None
    path.write_text(json.dumps(saved | {"rows": "/dev/zero"}))
    for kind in (LokiConfig, peft.PeftConfig):
        with pytest.raises(ValueError, match="names a file in rows"):
            kind.from_pretrained("someone/adapter")


@pytest.mark.parametrize("folder", ["adapter", "someone/adapter"])
def test_a_config_that_peft_reads_names_no_file_of_another_machine(
    folder, file, monkeypatch, tmp_path
):
    """transformers' ``load_adapter`` reads it so, by which `LokiConfig` is not asked."""
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    model.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter" / "adapter_config.json")
    monkeypatch.setattr(peft.config, "hf_hub_download", lambda *_, **__: path)
    local = tmp_path / folder
    config = peft.PeftConfig.from_pretrained(local if local.is_dir() else folder)
    assert config.protect is None
    config.inference_mode = False
    with pytest.raises(ValueError, match=r"LokiConfig\.from_pretrained\(FOLDER\) finds it"):
        peft.get_peft_model(build_model(), copy.copy(config))
    config.protect = str(file)
    train(peft.get_peft_model(build_model(), config))


def test_an_adapter_of_a_hub_is_trained_on_with_its_protection(file, monkeypatch, tmp_path):
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    file.unlink()

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return str(tmp_path / "adapter" / name)

    asked = []
    monkeypatch.setattr(peft.config, "hf_hub_download", download)
    monkeypatch.setattr(config_module, "hf_hub_download", download)
    config = LokiConfig.from_pretrained("someone/adapter", revision="v1")
    peft.PeftModel.from_pretrained(build_model(), tmp_path / "adapter", config=config)
    assert not [name for _, name, _ in asked if name == "loki_rows.protection"]  # to be used
    config = LokiConfig.from_pretrained("someone/adapter", revision="v1")
    again = peft.PeftModel.from_pretrained(
        build_model(), tmp_path / "adapter", config=config, is_trainable=True
    )
    options = {"subfolder": None, "revision": "v1"}
    assert asked[-1] == ("someone/adapter", "loki_rows.protection", options)
    train(again)


def test_a_config_that_no_model_has_filled_in_leaves_what_is_there(file, tmp_path):
    """As Axolotl saves one before it trains."""
    held = tmp_path / "loki_rows.protection"
    file.rename(held)
    LokiConfig(protect=str(held)).save_pretrained(tmp_path)
    assert held.is_file()


def test_an_adapter_that_is_used_may_be_evaluated_with_gradients(file, tmp_path):
    model = peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    used = peft.PeftModel.from_pretrained(build_model(), tmp_path / "adapter").eval()
    batch = token_batch(2)
    with used.disable_adapter():
        used(input_ids=batch)
    # which makes what was frozen of the adapter trainable
    loss = used(input_ids=batch, labels=batch).loss
    with pytest.raises(RuntimeError, match="was trained with a protection and loaded without it"):
        loss.backward()


def test_an_adapter_that_is_used_takes_its_protection_along(file, tmp_path):
    first, other = (
        peft.get_peft_model(build_model(), LokiConfig(rows=ROWS, protect=str(file)))
        for _ in range(2)
    )
    for folder in ("one", "two"):
        first.save_pretrained(tmp_path / folder)
    protection_of(build_model(), seed=5).save(tmp_path / "other.safetensors")
    config = LokiConfig(rows=ROWS, protect=str(tmp_path / "other.safetensors"))
    other = peft.get_peft_model(build_model(), config)
    other.save_pretrained(tmp_path / "two")
    file.unlink()
    used = peft.PeftModel.from_pretrained(build_model(), tmp_path / "one")
    used.save_pretrained(tmp_path / "three")
    used.save_pretrained(tmp_path / "two")  # where another's lies
    for folder in ("two", "three"):
        again = loki.patch(build_model(), tmp_path / folder)
        assert again.protection.fingerprint == first.peft_config["default"].protection
