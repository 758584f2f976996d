"""Where the analysis of `patch` runs, and what is back in its place afterwards."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loki_kernels as loki
from loki_kernels import placement, sharding
from loki_kernels.attribution import analysis, job
from loki_kernels.discovery import find_structure
from loki_kernels.placement import on_accelerator
from loki_kernels.training import patching
from tests.models import assert_unchanged, build_model, snapshot
from tests.tiny_training import WordTokenizer


class Tied(nn.Module):
    """Two modules with one weight and one buffer, and weights that are views of one storage."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.a.register_buffer("table", torch.arange(4.0))
        self.b.register_buffer("table", self.a.table)
        flat = torch.arange(8.0)
        self.c = nn.ParameterList([nn.Parameter(flat[:4]), nn.Parameter(flat[4:])])


@pytest.fixture
def beside(monkeypatch):
    """An accelerator with room, which a test may take away: copies on the CPU stand for it."""
    found = {"device": torch.device("cpu"), "free": 10**12}
    monkeypatch.setattr(
        placement, "accelerator", lambda: found["device"] and (found["device"], found["free"])
    )
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    return found


def places(model):
    """Of every parameter and buffer by name: the object, and where its numbers lie."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in named}


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_moved_and_put_back(beside, fails):
    model = Tied()
    before = places(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with on_accelerator(model):
            for name, (identity, pointer) in places(model).items():
                assert identity == before[name][0]
                assert pointer != before[name][1]
            assert model.a.weight is model.b.weight
            assert model.a.table is model.b.table
            model.a.register_buffer("table", torch.zeros(2))  # as a rotary embedding does
            model.a.register_buffer("more", torch.zeros(2))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert places(model) == before
    assert model.a.table is model.b.table
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
    assert model.c[0].untyped_storage().data_ptr() == model.c[1].untyped_storage().data_ptr()


def test_a_model_stays_where_something_else_put_it(beside, caplog):
    def stays(model, reason):
        caplog.clear()
        before = places(model)
        with on_accelerator(model):
            assert places(model) == before
        assert reason in caplog.text
        assert bool(caplog.records) == bool(reason)

    mapped = Tied()
    mapped.hf_device_map = {"": "cpu"}
    stays(mapped, "it has a device map")
    hooked = Tied()
    hooked.b._hf_hook = object()
    stays(hooked, "accelerate's hooks")
    quantized = Tied()
    quantized.is_quantized = True
    stays(quantized, "it is quantized")
    sharded = Tied()
    sharded.a.weight.ds_id = 0
    stays(sharded, "split between processes")
    beside["free"] = 2 * 10**9
    stays(Tied(), "do not fit the 2.0 GB")
    beside["device"] = None
    stays(Tied(), "")


def test_there_is_no_accelerator_here_or_it_has_memory():
    found = placement.accelerator()
    assert found is None or found[1] > 0


def test_each_process_has_its_own_device(monkeypatch):
    fake = SimpleNamespace(
        is_available=lambda: True,
        current_accelerator=lambda: torch.device("cuda"),
        current_device_index=lambda: 0,
        device_count=lambda: 4,
    )
    monkeypatch.setattr(torch, "accelerator", fake)
    module = SimpleNamespace(
        mem_get_info=lambda device: (100 + device.index, 1000),
        memory_reserved=lambda _: 0,
        memory_allocated=lambda _: 0,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _kind: module)
    monkeypatch.setattr(placement, "computes", lambda _device: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert placement.accelerator() == (torch.device("cuda:0"), 100)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert placement.accelerator() == (torch.device("cuda:3"), 103)
    fake.current_device_index = lambda: 2  # set_device has been called
    assert placement.accelerator() == (torch.device("cuda:2"), 102)
    del module.mem_get_info  # MPS
    assert placement.accelerator() is None


def test_a_device_without_kernels_is_left_alone(monkeypatch, caplog):
    """A P100 under a build for CUDA 12.8 is found, has memory, and fails at the first kernel."""
    device = torch.device("meta")  # of which no number can be read
    monkeypatch.setattr(placement, "process_device", lambda: device)
    monkeypatch.setattr(placement, "free_bytes", lambda _device: 10**12)
    placement._computes.cache_clear()
    assert placement.accelerator() is None
    assert placement.accelerator() is None
    assert caplog.text.count("meta is left alone, since this torch cannot use it") == 1
    assert placement.computes(torch.device("cpu"))


def test_a_full_device_is_no_device_without_kernels(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    placement._computes.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", full)
        assert placement.computes(torch.device("meta"))
    assert not placement.computes(torch.device("meta"))  # it is tried again
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    assert placement.device_to_use("cpu") == "cpu"  # what is named is not looked for


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "cuda:nccl"])
def test_what_the_first_has_reaches_each_process_on_its_own_device(backend, monkeypatch):
    """A loop that calls model.to(f"cuda:{rank}") and never set_device has cuda:0 as the current."""
    given = []
    own = torch.device("cuda:3")
    monkeypatch.setattr(sharding, "process_device", lambda: own)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
    world = SimpleNamespace(bound_device_id=None)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda *_, device, **__: given.append(device)
    )
    assert sharding.of_the_first("content") == "content"
    assert given == [torch.device("cpu") if "cpu" in backend else own]
    if "cpu" not in backend:  # init_process_group(device_id=...) has said which
        world.bound_device_id = torch.device("cuda:5")
        assert sharding.device_of_the_group() == world.bound_device_id


@pytest.fixture
def analysed(monkeypatch, tmp_path):
    """What `attribute` was called with for an analysis, and what it raises."""
    calls, errors = [], []
    attribute = analysis.attribute

    def recording(model, prompts, **options):
        calls.append(options | {"lies_at": next(model.parameters()).data_ptr()})
        if errors:
            raise errors.pop()
        return attribute(model, prompts, **options)

    monkeypatch.setattr(analysis, "attribute", recording)
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(tmp_path))
    return SimpleNamespace(calls=calls, errors=errors)


PROMPTS = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]


def test_an_analysis_without_memory_takes_the_cpu(beside, analysed, caplog):
    model = build_model(device="cpu")
    analysed.errors.append(torch.OutOfMemoryError("full"))
    before, home = snapshot(model), next(model.parameters()).data_ptr()
    analysis.cached_attribution(find_structure(model), None, {"prompts": PROMPTS})
    assert_unchanged(model, before)
    assert [call["lies_at"] == home for call in analysed.calls] == [False, True]
    assert "(batch_size=None): full" in caplog.text
    assert "the CPU does it" in caplog.text


def test_the_analysis_takes_options_which_its_cache_knows(model, analysed):
    def rows(**analysis):
        with loki.patch(model, quota=25, analysis={"prompts": PROMPTS, **analysis}) as handle:
            return handle.rows

    assert rows() == rows(batch_size=1, steps=7, definition="published", progress=False)
    assert len(analysed.calls) == 1  # the second was in the cache
    want = loki.attribute(model, PROMPTS, definition="paper", target=[1, 2])
    assert rows(definition="paper", target=[1, 2]) == loki.select(want, 25)
    rows(steps=8)
    rows(objective="logit")
    rows(prompts=PROMPTS[:1])
    assert len(analysed.calls) == 5


def test_the_chat_templates_options_reach_the_analysis(model, analysed):
    with pytest.raises(ValueError, match="no prompt is a chat"):
        loki.patch(
            model,
            tokenizer=WordTokenizer(),
            analysis={"chat_template_kwargs": {"enable_thinking": False}},
        )


@pytest.mark.parametrize(
    ("rows", "analysis", "message"),
    [
        (None, {"step": 8}, "analysis has no option step; it has baseline, batch_size"),
        (None, {"site": "ffn_neurons"}, "its site is 'down_proj'"),
        (None, {"prompts": PROMPTS, "steps": 0}, "steps"),
        (None, {"prompts": PROMPTS, "definition": "mine"}, "mine"),
        ([[1], [2], [3]], {"steps": 8}, "analysis= chooses rows, and rows= names them"),
    ],
)
def test_bad_options_change_nothing(model, rows, analysis, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        loki.patch(model, rows, analysis=analysis)
    assert_unchanged(model, before)


@pytest.mark.parametrize("analysis", [{"step": 8}, {"site": "ffn_neurons"}])
def test_unknown_options_are_named_before_a_protection_is_estimated(model, analysis, monkeypatch):
    monkeypatch.setattr(patching, "protection_to_keep", lambda *_: pytest.fail("estimated"))
    with pytest.raises(ValueError, match=r"analysis (has no option|chooses rows to train)"):
        loki.patch(model, analysis=analysis, protect=True)


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cpu_that_multiplies_16_bits_slowly_is_named(dtype, supported, monkeypatch, caplog):
    for short in ("bf16", "fp16"):
        name = f"_is_mkldnn_{short}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    model = build_model(device="cpu").to(dtype)
    loki.attribute(model, PROMPTS, steps=1, progress=False)
    loki.estimate_protection(model, [[1, 2, 3, 4]], progress=False)
    said = [r.message for r in caplog.records if "no instructions for products" in r.message]
    assert len(said) == (0 if supported or dtype == torch.float32 else 2)
    assert all("dtype=torch.float32" in message for message in said)


class Packed(nn.Module):
    """A linear layer that holds its weight under another name, as GPTQ's do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("qweight", linear.weight.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight, self.bias)


def test_a_layer_without_a_weight_is_attributed():
    model = build_model(device="cpu")
    want = loki.attribute(model, PROMPTS, steps=1)
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    torch.testing.assert_close(loki.attribute(model, PROMPTS, steps=1).scores, want.scores)


def test_a_long_attribution_says_so(monkeypatch, caplog):
    """A minute a token, of 3 and then 2 tokens."""
    clock = iter([0.0, 180.0])
    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(job, "accelerator", lambda: (torch.device("cuda:1"), 10**10))
    caplog.set_level(logging.INFO)
    loki.attribute(build_model(device="cpu"), PROMPTS, batch_size=1)
    info, warning = caplog.records
    assert info.getMessage() == "1 prompts take about 2 minutes more"
    assert "about 2 minutes more, beside cuda:1 with 10.0 GB free" in warning.getMessage()
    assert (info.levelname, warning.levelname) == ("INFO", "WARNING")


def test_one_target_for_all_is_reported(model, caplog):
    thinking = SimpleNamespace(decode=lambda ids: "<think>")
    same, others = [{"input_ids": [1, 2]}] * 20, [{"input_ids": [i, 7, i]} for i in range(8)]
    loki.attribute(model, same[:19])
    loki.attribute(model, same, target=[5] * 20)
    assert not caplog.records
    loki.attribute(model, same, tokenizer=thinking)
    assert "('<think>') is the model's prediction for 100 % of the prompts" in caplog.text
    assert len(caplog.records) == 1
    assert "enable_thinking" in caplog.text
    targets = loki.attribute(model, others).targets
    assert (targets != targets[0]).any()
    loki.attribute(model, same + others)
    assert len(caplog.records) == 1


def test_a_damaged_analysis_in_the_cache_is_made_again(model, analysed, caplog, tmp_path):
    def rows():
        with loki.patch(model, quota=25, analysis={"prompts": PROMPTS}) as handle:
            return handle.rows

    want = rows()
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    assert rows() == want
    assert "it is made again" in caplog.text
    assert rows() == want
    assert len(analysed.calls) == 2


def test_a_cache_that_cannot_be_written_is_done_without(model, analysed, caplog, monkeypatch):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(loki.Attribution, "save", full)
    with loki.patch(model, quota=25, analysis={"prompts": PROMPTS}) as handle:
        assert handle.rows.counts == [12, 12, 12]
    assert "could not be written: no space" in caplog.text
