"""Batches that a device has no room for."""

import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import loki_kernels as loki
from loki_kernels import placement
from loki_kernels.attribution import copies, fitting, job, plan
from loki_kernels.attribution.fitting import Fitting
from loki_kernels.attribution.plan import PlannedBatch
from loki_kernels.attribution.prompts import Tokens
from loki_kernels.discovery import find_structure
from loki_kernels.errors import UnsupportedModelError
from tests.architectures import lfm2, mixtral
from tests.models import build_model

PROMPTS = [{"input_ids": [*range(1, 2 + n)]} for n in (3, 7, 5, 4, 6, 2, 8)]


@pytest.fixture
def room(monkeypatch):
    """How many tokens a batch may have, padded; and the sizes of the batches that were tried."""
    found = {"tokens": 10**9, "tried": []}
    attribute_batch = job.attribute_batch

    def crowded(engine, batch):
        found["tried"].append(tuple(batch.input_ids.shape))
        if batch.input_ids.numel() > found["tokens"]:
            raise torch.OutOfMemoryError("full")
        return attribute_batch(engine, batch)

    monkeypatch.setattr(job, "attribute_batch", crowded)
    return found


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_what_does_not_fit_is_halved_with_the_same_result(keep, room, caplog):
    model = build_model(device="cpu")
    options = {"batch_size": 5, "keep": keep}
    want = loki.attribute(model, PROMPTS, **options)
    assert room["tried"] == [(5, 9), (2, 4)]
    room["tried"].clear()
    room["tokens"] = 20
    got = loki.attribute(model, PROMPTS, **options)
    assert room["tried"] == [(5, 9), (2, 9), (3, 7), (1, 7), (2, 6), (2, 4)]
    assert caplog.text.count("do not fit") == 2
    if keep == "counts":
        assert torch.equal(got.counts, want.counts)
    else:
        torch.testing.assert_close(got.scores, want.scores)
    for name in ("targets", "value", "completeness", "change"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))


WORDS = [
    "Triton Error [CUDA]: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
]


def full_above(model, rows, words):
    """A model whose first FFN has no room for more samples or copies than so many."""
    tried = []

    def crowded(_module, args):
        tried.append(len(args[0]))
        if len(args[0]) > rows:
            raise RuntimeError(words)

    model.model.layers[0].mlp.register_forward_pre_hook(crowded)
    return tried


@pytest.mark.parametrize("words", WORDS)
def test_full_memory_in_the_words_of_other_libraries(words, room, caplog):
    """Raised by the model's own code, where other errors are a reason to refuse the model."""
    want = loki.attribute(build_model(device="cpu"), PROMPTS[:4], batch_size=4)
    room["tried"].clear()
    model = build_model(device="cpu")
    full_above(model, 2, words)
    got = loki.attribute(model, PROMPTS[:4], batch_size=4)
    assert [prompts for prompts, _ in room["tried"]] == [4, 2, 2]
    assert words in caplog.text
    assert got.run["engine"] == "staircase"
    torch.testing.assert_close(got.scores, want.scores)


@pytest.mark.parametrize("words", WORDS)
def test_full_memory_chooses_no_other_engine(words):
    model = build_model(device="cpu")
    full_above(model, 1, words)  # the head is tried with two prompts
    with pytest.raises(RuntimeError, match=r"memory|ALLOC"):
        loki.attribute(model, PROMPTS[:1])


def test_another_error_is_not_halved(room, monkeypatch):
    room["tokens"] = 13
    crowded = job.attribute_batch

    def other(engine, batch):
        try:
            return crowded(engine, batch)
        except torch.OutOfMemoryError:
            raise RuntimeError("shapes do not fit") from None

    monkeypatch.setattr(job, "attribute_batch", other)
    with pytest.raises(RuntimeError, match="do not fit"):
        loki.attribute(build_model(device="cpu"), PROMPTS[:4], batch_size=4)


@pytest.mark.parametrize("engine", ["decode", "reforward"])
def test_copies_that_do_not_fit_are_fewer_layers_at_a_time(engine, caplog):
    """Of 3 layers of 7 points; so many of one layer do fit."""
    model = build_model(device="cpu")
    prompts = PROMPTS[1:2] * 2
    want = loki.attribute(model, prompts, engine=engine)
    tried = full_above(model, 8, WORDS[0])
    got = loki.attribute(model, prompts, engine=engine)
    assert [rows for rows in tried if rows > 4] == [22, 8, 8, 8, 8, 8, 8]
    assert caplog.text.count("do not fit") == 1
    torch.testing.assert_close(got.scores, want.scores)
    full_above(model, 7, WORDS[0])
    with pytest.raises(RuntimeError, match="out of memory"):
        loki.attribute(model, prompts, engine=engine)


def test_states_that_are_written_in_place_count_four_times():
    """A copy's own, and three that the backward pass keeps. Of lfm2 two layers attend."""
    model = lfm2()
    config, ids = model.config, torch.arange(1, 8)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    keys = ids.shape[1] * config.num_key_value_heads * (config.hidden_size // 4)
    window = config.hidden_size * config.conv_L_cache
    assert copies._size(cache) == 4 * (2 * 2 * keys + 4 * window)


def test_what_did_not_fit_is_not_tried_again(room):
    room["tokens"] = 13
    loki.attribute(build_model(device="cpu"), PROMPTS[:4] * 3, batch_size=4)
    sizes = [tokens * prompts for prompts, tokens in room["tried"]]
    assert sum(size > 13 for size in sizes) == 2  # 4 prompts, then 2


def test_a_batch_whose_halves_do_not_fit_was_only_refused(monkeypatch, caplog):
    """Six prompts that the engine takes by three alone, and whose memory is enough for two."""
    model, tried, compute = build_model(device="cpu"), [], job.attribute_batch
    prompts = [{"input_ids": [1 + i, 5, 2]} for i in range(6)]
    want = loki.attribute(model, prompts)

    def refusing(engine, batch):
        count = len(batch.input_ids)
        tried.append(count)
        if count > 3:
            raise UnsupportedModelError("not so many together")
        if count > 2:
            raise torch.OutOfMemoryError("full")
        return compute(engine, batch)

    monkeypatch.setattr(job, "attribute_batch", refusing)
    got = loki.attribute(model, prompts, batch_size=6)
    assert tried == [6, 3, 1, 2, 1, 2]
    assert caplog.text.count("do not fit") == 1
    assert "3 prompts" in caplog.text
    assert "decode" not in caplog.text
    torch.testing.assert_close(got.scores, want.scores)


def test_one_prompt_that_does_not_fit_is_an_error(room):
    room["tokens"] = 8
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        loki.attribute(build_model(device="cpu"), PROMPTS, batch_size=4)
    assert room["tried"][-1] == (1, 9)


def test_processes_that_share_weights_do_not_halve(room, monkeypatch):
    room["tokens"] = 20
    monkeypatch.setattr("loki_kernels.structure.Structure.sharded", True)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        loki.attribute(build_model(device="cpu"), PROMPTS, batch_size=5)
    assert len(room["tried"]) == 1


def test_memory_is_free_again_when_the_halves_run():
    """What the failed batch had made is gone, although its error was logged."""
    made = []
    sequences = [Tokens(np.array(ids)) for ids in ([1, 2], [3, 4])]

    def compute(part):
        assert all(reference() is None for reference in made)
        tensor = torch.zeros(3)
        made.append(weakref.ref(tensor))
        if len(part.members) > 1:
            raise torch.OutOfMemoryError("full")
        raise StopIteration

    with pytest.raises(StopIteration):
        Fitting(points=1).run(PlannedBatch(0, [0, 1], sequences), compute)
    assert len(made) == 2


def test_points_fit_by_count(monkeypatch):
    """Of 7 matrices a layer: q, k, v and o, gate and up, down."""
    model = build_model(device="cpu")
    structure, config = find_structure(model), model.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    outputs = heads * config.head_dim + 2 * config.hidden_size + 2 * config.intermediate_size
    each = 4 * config.num_hidden_layers * outputs
    device = torch.device("cuda")
    free = {"bytes": 1000 * each}
    monkeypatch.setattr(fitting, "free_bytes", lambda _: free["bytes"])
    assert fitting.points_that_fit(structure, device) == 512  # of 600
    assert fitting.points_that_fit(structure, device, beside=500 * each) == 256
    assert fitting.points_that_fit(structure, device, beside=2000 * each) == 1
    free["bytes"] = 10**15
    assert fitting.points_that_fit(structure, device) == 131_072
    free["bytes"] = None
    assert fitting.points_that_fit(structure, device) is None
    free["bytes"] = 10**9
    experts = find_structure(mixtral())
    assert fitting.points_that_fit(experts, device) is None
    free["bytes"] = 1000 * each
    for layer in model.model.layers:  # as 4 bits are packed
        packed = torch.empty(layer.mlp.up_proj.weight.numel() // 2, 1, dtype=torch.uint8)
        layer.mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert fitting.points_that_fit(structure, device) == 512
    model.model.layers[0].to("meta")
    assert fitting.points_that_fit(structure, device) is None  # on two devices
    model.model.layers[1:].to("meta")
    assert fitting.points_that_fit(structure, device) == 512
    monkeypatch.setattr("loki_kernels.structure.Structure.sharded", True)
    assert fitting.points_that_fit(find_structure(model), device) is None


def test_an_attribution_takes_as_large_batches_as_fit(room, monkeypatch):
    model = build_model(device="cpu")
    want = loki.attribute(model, PROMPTS)
    points = 7 * model.config.num_hidden_layers
    room["tried"].clear()
    module = sys.modules[loki.attribute.__module__]
    monkeypatch.setattr(module, "points_that_fit", lambda *_: 3 * points)
    got = loki.attribute(model, PROMPTS)
    assert [prompts for prompts, _ in room["tried"]] == [3, 3, 1]
    torch.testing.assert_close(got.scores, want.scores)


def test_other_engines_keep_small_batches(room, monkeypatch):
    """They take a prompt at a time, and a batch is what a log keeps."""
    module = sys.modules[loki.attribute.__module__]
    monkeypatch.setattr(module, "points_that_fit", lambda *_: 10**6)
    monkeypatch.setattr(plan, "_POINTS", 7 * 3 * 2)
    loki.attribute(build_model(device="cpu"), PROMPTS, engine="reforward", steps=7)
    assert [prompts for prompts, _ in room["tried"]][-4:] == [2, 2, 2, 1]


def test_memory_that_is_held_and_unused_is_free(monkeypatch):
    module = SimpleNamespace(
        mem_get_info=lambda _: (100, 1000),
        memory_reserved=lambda _: 70,
        memory_allocated=lambda _: 30,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert placement.free_bytes(torch.device("cuda")) == 140
    assert placement.free_bytes(torch.device("cpu")) is None
    module.mem_get_info = lambda _: (_ for _ in ()).throw(RuntimeError("it does not tell"))
    assert placement.free_bytes(torch.device("xpu")) is None
    del module.mem_get_info  # MPS
    assert placement.free_bytes(torch.device("mps")) is None
