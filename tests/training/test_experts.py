"""Rows of every expert of a mixture: trained, saved, loaded and put back."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

import loki_kernels as loki
from loki_kernels.peft import LokiConfig
from loki_kernels.training import arithmetic, checkpoint, patching, writer
from loki_kernels.training.experts import LokiExperts
from tests.models import DEVICE, assert_unchanged, snapshot, to_device
from tests.test_drift import texts
from tests.tiny_training import logits, straight_and_resumed, tiny_trainer, token_batch, train
from tests.zoo import build as zoo

build = functools.partial(zoo.build, device=DEVICE)
# (experts in one tensor, how they lie): with a shared expert, biased and transposed, of their own
# forward pass; the first layers of GLM and DeepSeek are dense.
FAMILIES = ["Qwen3Moe", "Mixtral", "GptOss", "Glm4Moe", "DeepseekV3", "Llama4"]
ROWS = [[5, 1], [0], [7, 3, 30], [2]]


@functools.cache
def built(family):
    # Muse Spark normalises each expert's output.
    name = f"{family}For{'ConditionalGeneration' if family == 'MuseSpark' else 'CausalLM'}"
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    return build(name)


def build_model(family="Mixtral"):
    return copy.deepcopy(built(family))


def stacks(model):
    """(name, module) of the experts of a model that is not patched."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter)
    ]


def one_module(family, rows, dtype=torch.float32, **changes):
    """(the experts of a layer, what trains rows of them)."""
    module = copy.deepcopy(stacks(built(family))[-1][1]).to(dtype)
    for name, value in changes.items():
        setattr(module, name, value)
    axis = 2 if getattr(module, "is_transposed", family == "Llama4") else 1
    return copy.deepcopy(module), LokiExperts(module, "down_proj", axis, torch.tensor(rows))


def axis_width(experts):
    return experts.frozen.shape[experts.axis]


def routed(experts, dtype=torch.float32):
    """Tokens, of which none goes to the last expert, and where they go."""
    torch.manual_seed(0)
    shares, chosen = torch.rand(6, experts.num_experts - 1).topk(2)
    up = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    width = up.shape[1 if experts.is_transposed else 2]
    return to_device((torch.randn(6, width).to(dtype), chosen, shares.to(dtype)))


def run(module, weight, inputs, upstream):
    """Output, and the gradients of the tokens, their shares and the weight."""
    x, chosen, shares = inputs
    wanted = [x.clone().requires_grad_(), shares.clone().requires_grad_(), weight]
    y = module(wanted[0], chosen, wanted[1])
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(
    "family", [*(name for name in FAMILIES if name != "Llama4"), "MuseSpark", "NemotronH"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_dense_training(family, implementation, dtype):
    if dtype == torch.float64 and implementation == "grouped_mm":
        pytest.skip("torch's grouped product takes no float64")
    module = copy.deepcopy(stacks(built(family))[-1][1]).to(dtype)
    module.config = copy.copy(module.config)
    module.config._experts_implementation = implementation
    dense = copy.deepcopy(module).requires_grad_(False)
    rows = to_device(torch.tensor([1, 5, 17]))
    axis = 2 if dense.is_transposed else 1
    ours = LokiExperts(module, "down_proj", axis, rows)
    assert ours.why_whole is None
    ours.update.data.normal_(0, 0.1)
    with torch.no_grad():
        dense.down_proj.copy_(ours.put_rows(dense.down_proj, ours.merged_rows()))
    inputs = routed(ours, dtype)
    upstream = to_device(torch.randn(6, axis_width(ours), dtype=dtype))
    want = run(dense, dense.down_proj.requires_grad_(), inputs, upstream)
    want[-1] = want[-1].index_select(axis, rows).movedim(axis, -2)
    got = run(ours, ours.update, inputs, upstream)
    assert not got[-1][-1].any()  # of the expert without tokens
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) <= tolerance * float(b.norm())


def test_autocast_rounds_no_product_of_the_factors():
    """As HF Trainer's ``bf16=True`` trains them: transformers' grouped products are not its."""
    module = copy.deepcopy(stacks(built("Mixtral"))[-1][1])
    ours = LokiExperts(module, "down_proj", 1, to_device(torch.tensor([1, 5, 17])), 2)
    for factor in (ours.delta_a, ours.delta_b):
        factor.data.normal_(0, 0.3)
    x, chosen, shares = routed(ours)
    upstream = to_device(torch.randn(6, axis_width(ours)))

    def run_it():
        y = ours(x, chosen, shares)
        return [y.detach(), *torch.autograd.grad(y, [ours.delta_a, ours.delta_b], upstream)]

    want = run_it()
    with torch.autocast(x.device.type, torch.bfloat16):
        got = run_it()
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_rounds_no_weight_of_the_whole_form():
    """Neither the factors' product nor the base: a small update would do nothing until merged."""
    _, ours = one_module("Llama4", [1, 5, 17])
    ours = LokiExperts(ours.experts, "down_proj", 2, torch.tensor([1, 5, 17]), 2)
    for factor in (ours.delta_a, ours.delta_b):
        factor.data.normal_(0, 1e-3)
    want = ours.trained_weight()
    with torch.autocast(want.device.type, torch.bfloat16):
        got = ours.trained_weight()
    assert torch.equal(got, want)


def test_the_whole_form_has_the_gradients_of_dense_training():
    """Llama 4's forward pass is none of transformers' implementations."""
    dense, ours = one_module("Llama4", [1, 5, 17])
    assert ours.why_whole is not None
    ours.update.data.normal_(0, 0.1)
    with torch.no_grad():
        dense.down_proj.copy_(ours.put_rows(dense.down_proj, ours.merged_rows()))
    x, upstream = to_device((torch.randn(4 * 3, 32), torch.randn(12, 32)))
    weight = dense.down_proj
    (want,) = torch.autograd.grad(dense(x), weight, upstream)
    for sharded in (False, True):  # a merged copy there
        ours.sharded = sharded
        (got,) = torch.autograd.grad(ours(x), ours.update, upstream)
        rows = want[..., [1, 5, 17]].transpose(1, 2)
        assert float((got - rows).norm()) <= 1e-6 * float(rows.norm())
        torch.testing.assert_close(ours(x), dense(x))


def test_hooks_of_the_whole_form_run_once():
    model = build_model("Llama4")
    seen = []
    before = logits(model)
    for name, module in list(model.named_modules()):
        if name.endswith("experts"):
            module.register_forward_pre_hook(lambda *_: seen.append("before"))
            module.register_forward_hook(lambda _m, _a, y: (seen.append("after"), 2 * y)[1])
    doubled = logits(model)
    assert not torch.equal(doubled, before)
    count = len(seen)
    loki.patch(model, ROWS)
    assert any(m.why_whole for m in model.modules() if isinstance(m, LokiExperts))
    torch.testing.assert_close(logits(model), doubled)
    assert len(seen) == 2 * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_starts_as_the_module_it_replaces(family, dtype):
    module, ours = one_module(family, [1, 5, 17], dtype)
    inputs = routed(module, dtype)
    want, got = module(*inputs), ours(*inputs)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {"update"}
    assert ours.update.dtype == torch.float32
    assert ours.num_experts == module.num_experts


def test_what_is_another_product_runs_its_own_forward_pass():
    class Doubled(type(stacks(built("Mixtral"))[0][1])):
        def forward(self, *args):
            return 2 * super().forward(*args)

    module = copy.deepcopy(stacks(built("Mixtral"))[0][1])
    module.__class__ = Doubled
    ours = LokiExperts(module, "down_proj", 1, torch.tensor([1]))
    assert "does not compute" in ours.why_whole
    inputs = routed(module)
    assert torch.equal(ours(*inputs), module(*inputs))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_only_the_rows_and_unpatches(family, rank):
    model = build_model(family)
    before, want = snapshot(model), logits(model)
    names = {f"{name}.down_proj": module for name, module in stacks(model)}
    handle = loki.patch(model, ROWS, rank=rank)
    torch.testing.assert_close(logits(model), want)
    assert handle.report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    learned = logits(train(model))
    assert not torch.allclose(learned, want)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    for key, tensor in before["weights"].items():
        differs = trained[key] != tensor
        if "down_proj" not in key:
            assert not differs.any(), key
            continue
        axis = 0 if key not in names else 2 if family in ("GptOss", "Llama4") else 1
        moved = differs.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
        assert moved == ([] if "bias" in key else sorted(ROWS[int(key.split(".")[2])])), key
    torch.testing.assert_close(logits(model), learned)  # once the state dict has been read
    handle.unpatch()
    assert_unchanged(model, before)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_and_adapters_restore_the_model(family, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path / "base")
    handle = loki.patch(model, ROWS)
    want = logits(train(model))
    model.save_pretrained(tmp_path / "saved")
    loki.save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want)

    def load(folder):
        load = AutoModelForCausalLM.from_pretrained
        loaded, info = load(tmp_path / folder, output_loading_info=True)
        return loaded.to(DEVICE), info

    plain, info = load("saved")  # plain transformers
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(plain), want)
    again = load("base")[0]
    torch.testing.assert_close(logits(loki.patch(again, tmp_path / "saved").model), want)
    again = load("base")[0]
    loaded = loki.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), want)
    torch.testing.assert_close(logits(loaded.merge()), want)
    torch.testing.assert_close(
        logits(loki.load_adapter(load("base")[0], tmp_path / "saved").merge()), want
    )
    merged = dict(handle.merged_parameters())
    assert merged.keys() == dict(again.named_parameters()).keys()
    torch.testing.assert_close(logits(handle.merge()), want)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], msg=name)


def test_an_adapter_of_another_rank_is_one(tmp_path):
    model = build_model()
    loki.patch(model, ROWS, rank=2)
    want = logits(train(model))
    loki.save_adapter(model, tmp_path)
    handle = loki.load_adapter(build_model(), tmp_path)
    torch.testing.assert_close(logits(handle.model), want)


@pytest.mark.parametrize("by", ["callback", "rows"])
def test_a_resumed_trainer_goes_on_from_the_experts_rows(tmp_path, by):
    """Its checkpoints name experts one by one, so a state dict of one leaves them as they are."""

    def run(folder, resume=None):
        model = build_model("Qwen3Moe")
        handle = loki.patch(model, resume if resume and by == "rows" else ROWS)
        callbacks = [handle.trainer_callback()] if by == "callback" else []
        tiny_trainer(model, folder, 6, callbacks).train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight, resumed = straight_and_resumed(run, tmp_path)
    for name, tensor in straight.items():
        torch.testing.assert_close(tensor, resumed[name], rtol=1e-6, atol=1e-7, msg=name)


def trained_for_six_steps(folder, model="Qwen3MoeForCausalLM", seed=42, **options):
    """State dict after six steps; checkpoints of three and six are in the folder."""
    made = build(model)
    callback = loki.patch(made, ROWS, **options).trainer_callback()
    tiny_trainer(made, folder, 6, [callback], seed=seed).train()
    return made.state_dict()


# One names experts one by one in its files, the other, which is dense, the whole decoder otherwise.
@pytest.mark.parametrize("model", ["Qwen3MoeForCausalLM", "LlavaForConditionalGeneration"])
@pytest.mark.parametrize("rank", [None, 2])
def test_another_checkpoint_than_was_read_is_not_resumed(tmp_path, model, rank):
    trained_for_six_steps(tmp_path, model, rank=rank)
    resumed = str(tmp_path / "checkpoint-6")
    again = build(model)
    loki.patch(again, tmp_path / "checkpoint-3")
    with pytest.raises(RuntimeError, match="nothing of these rows"):
        tiny_trainer(again, tmp_path, 9).train(resume_from_checkpoint=resumed)
    again = build(model)
    loki.patch(again, resumed)
    tiny_trainer(again, tmp_path, 9).train(resume_from_checkpoint=resumed)


@pytest.mark.parametrize(
    "measure",
    [
        lambda handle: loki.drift(handle, texts=texts()),
        lambda handle: loki.limit_drift(handle, 100.0, texts()),
    ],
)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_checkpoint_that_was_measured_is_resumed(measure, rank, tmp_path):
    """A measurement takes the update away for a moment, after which it is as it was read."""
    trained_for_six_steps(tmp_path, rank=rank)
    resumed = str(tmp_path / "checkpoint-3")
    model = build_model("Qwen3Moe")
    measure(loki.patch(model, resumed))
    tiny_trainer(model, tmp_path, 6).train(resume_from_checkpoint=resumed)


def test_the_callback_reads_the_checkpoint_that_is_resumed_from(tmp_path):
    """Whatever was read before; and none of another run that lies where it looks."""
    want = trained_for_six_steps(tmp_path / "a")
    trained_for_six_steps(tmp_path / "b", seed=1)
    model = build_model("Qwen3Moe")
    callback = loki.patch(model, tmp_path / "a" / "checkpoint-6").trainer_callback()
    resumed = str(tmp_path / "a" / "checkpoint-3")
    tiny_trainer(model, tmp_path / "a", 6, [callback]).train(resume_from_checkpoint=resumed)
    for name, tensor in want.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-6, atol=1e-7, msg=name)
    model = build_model("Qwen3Moe")
    callback = loki.patch(model, ROWS).trainer_callback()
    with pytest.raises(RuntimeError, match="of the checkpoint's weights was found"):
        tiny_trainer(model, tmp_path / "b", 6, [callback]).train(resume_from_checkpoint=resumed)


@pytest.mark.parametrize("read", [False, True])
def test_shards_in_any_order_are_noticed(read, tmp_path):
    """The last has nothing of the first layers; some have a part of the experts of a layer."""
    model = build_model("Mixtral")
    loki.patch(model, ROWS)
    model.save_pretrained(tmp_path / "read")
    want = logits(train(model))
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    shards = [load_file(path) for path in sorted((tmp_path / "saved").glob("model-*.safetensors"))]
    assert len(shards) > 4
    for order in (shards, shards[::-1]):
        again = build_model("Mixtral")
        loki.patch(again, tmp_path / "read" if read else ROWS)
        for shard in order:
            again.load_state_dict(shard, strict=False)
        with pytest.raises(RuntimeError, match="nothing of these rows"):
            logits(again)
        again = build_model("Mixtral")
        loki.patch(again, tmp_path / "saved")
        for shard in order:
            again.load_state_dict(shard, strict=False)
        torch.testing.assert_close(logits(again), want)


def test_modules_trained_whole_are_resumed_under_other_names(tmp_path):
    """Llava's files name all of its decoder otherwise, and a Trainer's loading passes it by."""

    def run(folder, resume=None):
        model = build("LlavaForConditionalGeneration")
        handle = loki.patch(model, ROWS, modules_to_save=["embed_tokens"])
        run = tiny_trainer(model, folder, 6, [handle.trainer_callback()])
        run.train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight, resumed = straight_and_resumed(run, tmp_path)
    for name, tensor in straight.items():
        torch.testing.assert_close(tensor, resumed[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_vision_towers_own_weights_pass_over_no_rows():
    """Its layers have numbers too."""
    model = build("LlavaForConditionalGeneration")
    handle = loki.patch(model, ROWS)
    want = logits(train(model))
    tower = {n: p.clone() for n, p in model.state_dict().items() if "vision_tower.encoder" in n}
    assert any("layers.0." in name for name in tower)
    assert not model.load_state_dict(tower, strict=False).unexpected_keys
    torch.testing.assert_close(logits(model), want)
    handle.merge()


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "LlavaForConditionalGeneration"])
def test_weights_under_the_names_of_their_files_are_noticed(name, tmp_path):
    """Mixtral's files name experts one by one, Llava's the whole decoder otherwise."""
    model = build(name)
    loki.patch(model, ROWS)
    want = logits(train(model))
    model.save_pretrained(tmp_path)
    again = build(name)
    handle = loki.patch(again, ROWS)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    with pytest.raises(RuntimeError, match="nothing of these rows"):
        logits(again)
    handle.load_state(tmp_path)
    torch.testing.assert_close(logits(again), want)
    again.load_state_dict({"lm_head.weight": again.lm_head.weight}, strict=False)
    logits(again)  # a part of a model is none of its rows


class KeepsItsOwn(HfQuantizer):
    """Whose state dict transformers saves, as where attention is quantized and experts are not."""

    def __init__(self, made):
        self.made = made

    def get_state_dict_and_metadata(self, model):
        found = model.state_dict() if self.made else None
        return found, dict.fromkeys(found or (), "torch.Tensor")

    def is_serializable(self):
        return True

    is_trainable = True


@pytest.mark.parametrize("made", [False, True])
def test_a_quantized_model_saves_its_experts_merged_alone(made, tmp_path):
    """bitsandbytes' quantizer makes no state dict, torchao's makes one."""
    model = build_model()
    loki.patch(model, ROWS)
    want = logits(train(model))
    model.hf_quantizer = KeepsItsOwn(made)
    model.save_pretrained(tmp_path)
    assert any(name.endswith("experts.update") for name in model.state_dict())
    base = build_model()
    base.save_pretrained(tmp_path / "base")
    names, base_names = (
        load_file(folder / "model.safetensors").keys() for folder in (tmp_path, tmp_path / "base")
    )
    assert names == base_names
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.metadata() if "update" in name or "index" in name]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    torch.testing.assert_close(logits(again), want)
    assert loki.load_adapter(base, tmp_path).rows == loki.RowSelection(ROWS)


@pytest.mark.parametrize("way", ["merge", "save_pretrained", "save_adapter", "merged_parameters"])
def test_what_was_passed_over_is_neither_merged_nor_saved(way, tmp_path):
    model = build("MixtralForCausalLM")
    loki.patch(model, ROWS)
    train(model).save_pretrained(tmp_path / "trained")
    again = build("MixtralForCausalLM")
    before = snapshot(again)
    handle = loki.patch(again, ROWS)
    again.load_state_dict(load_file(tmp_path / "trained" / "model.safetensors"), strict=False)
    write = {
        "merge": handle.merge,
        "merged_parameters": handle.merged_parameters,
        "save_pretrained": lambda: again.save_pretrained(tmp_path / "out"),
        "save_adapter": lambda: loki.save_adapter(again, tmp_path / "out"),
    }[way]
    with pytest.raises(RuntimeError, match="nothing of these rows"):
        write()
    assert not (tmp_path / "out").exists()
    handle.unpatch()
    assert_unchanged(again, before)


def stack_of_last_layer(model):
    return [m for m in model.modules() if isinstance(m, LokiExperts)][-1]


@pytest.mark.parametrize("family", ["GptOss", "Llama4"])
def test_checkpointing_and_compilation_train_the_same(family):
    def trained(change):
        torch._dynamo.reset()
        model = build_model(family)
        loki.patch(model, ROWS)
        change(model)
        train(model.train())
        return {k: v for k, v in model.state_dict().items() if "down_proj" in k or "update" in k}

    want = trained(lambda model: None)
    options = {"use_reentrant": False}
    for change in (
        lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options),
        lambda model: stack_of_last_layer(model).compile(backend="aot_eager", fullgraph=True),
    ):
        for name, tensor in trained(change).items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-4, msg=name)


def test_suppressed_rows_are_silent_in_every_expert():
    """gpt-oss has a bias of each expert."""
    model = build_model("GptOss")
    before = snapshot(model)
    seen = []
    for name, module in stacks(model):
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(
            lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        assert module.down_proj_bias.any()
    with loki.suppress(model, ROWS):
        logits(model)
    for output, rows in zip(seen, ROWS, strict=True):
        silent = output.reshape(-1, 32).abs().amax(0) == 0
        assert silent.nonzero().flatten().tolist() == sorted(rows)
    before.pop("hooks")
    after = snapshot(model)["weights"]
    assert all(torch.equal(after[k], v) for k, v in before["weights"].items())


def test_what_experts_do_not_support_is_refused():
    model = build_model("Glm4Moe")
    before = snapshot(model)
    with pytest.raises(loki.UnsupportedModelError, match="experts"):
        peft.get_peft_model(model, LokiConfig(rows=ROWS))
    assert_unchanged(model, before)
    first = stacks(model)[0][1]
    first.down_proj.ds_id = 0  # ZeRO-3's
    with pytest.raises(loki.UnsupportedModelError, match="use ZeRO-2"):
        loki.patch(model, ROWS)
    del first.down_proj.ds_id
    assert_unchanged(model, before)
    handle = loki.patch(model, ROWS)
    stack_of_last_layer(model).down_proj.ds_id = 0  # sharded once it is patched
    with pytest.raises(loki.UnsupportedModelError, match="use ZeRO-2"):
        logits(model)
    del stack_of_last_layer(model).down_proj.ds_id
    handle.unpatch()
    first.down_proj.data = first.down_proj.data.to(torch.float8_e4m3fn)
    before = snapshot(model)
    with pytest.raises(loki.UnsupportedModelError, match="load the model unquantized"):
        loki.patch(model, ROWS)
    assert_unchanged(model, before)


def test_expert_parallelism_is_refused_for_what_it_is(one_process):
    """As transformers leaves the stacks of a model that was loaded with ep_size=."""
    model = zoo.build("Glm4MoeForCausalLM", device="cpu")
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    for _, experts in stacks(model):
        part = distribute_tensor(experts.down_proj.detach(), mesh, [Shard(0)])
        experts.down_proj = nn.Parameter(part)
        experts._is_expert_parallel = True
    with pytest.raises(loki.UnsupportedModelError, match="load the model without ep_size"):
        loki.patch(model, ROWS)


def test_packed_experts_are_refused():
    """gpt-oss's checkpoints are MXFP4, which transformers leaves packed on a GPU."""
    model = build_model("GptOss")
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config).requires_grad_(False)
    model.is_quantized = True
    before = snapshot(model)
    for attempt in (
        lambda: loki.patch(model, ROWS),
        lambda: loki.attribute(model, [{"input_ids": [5, 6]}]),
    ):
        with pytest.raises(loki.UnsupportedModelError, match=r"experts.*load it unquantized"):
            attempt()
    assert_unchanged(model, before)


class MegaBlocksMoeMLP:
    """What the library kernels binds to gpt-oss's MLP: it reads the weights of the experts."""

    def forward(self, hidden_states):
        experts = self.experts
        up = hidden_states @ experts.gate_up_proj[0]
        return up[..., : experts.down_proj.shape[1]] @ experts.down_proj[0], None


def test_a_kernel_around_the_experts_is_refused():
    model = build_model("GptOss")
    handle = loki.patch(model, ROWS)
    want = logits(model)
    mlp = model.model.layers[-1].mlp
    mlp.forward = MegaBlocksMoeMLP.forward.__get__(mlp)
    for mode in (model.train, model.eval):
        mode()
        with pytest.raises(RuntimeError, match=r"\d\.mlp by MegaBlocksMoeMLP\.forward after"):
            logits(model)
    mlp.forward = type(mlp).forward.__get__(mlp)  # what kernels falls back to
    assert torch.equal(logits(model), want)
    handle.unpatch()
    assert loki.patch(model, ROWS).unpatch() is model
    mlp.forward = MegaBlocksMoeMLP.forward.__get__(mlp)
    with pytest.raises(loki.UnsupportedModelError, match="put MegaBlocksMoeMLP"):
        loki.patch(model, ROWS)


def test_the_report_tells_what_is_not_fused_and_what_is_whole():
    handle = loki.patch(build_model("Llama4"), ROWS, fuse_mlp=True)
    assert any("own forward pass" in note for note in handle.report.notes)
    assert any("sorted tokens" in reason for reason in handle.report.not_fused.values())
    assert handle.report.fused  # the shared experts', whose output Llama 4 adds to in place


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "FalconForCausalLM"])
@pytest.mark.parametrize("rank", [None, 2])
def test_other_linear_layers(family, rank, tmp_path):
    """Conv1D's weight has rows for columns; Falcon's linear layer is a subclass of torch's."""
    model = build(family)
    before, want = snapshot(model), logits(model)
    handle = loki.patch(model, ROWS, rank=rank)
    torch.testing.assert_close(logits(model), want)
    learned = logits(train(model))
    assert not torch.allclose(learned, want)
    model.save_pretrained(tmp_path / "saved")
    loki.save_adapter(model, tmp_path / "adapter")
    plain = type(model).from_pretrained(tmp_path / "saved").to(DEVICE)
    torch.testing.assert_close(logits(plain), learned)
    again = loki.load_adapter(build(family), tmp_path / "adapter").merge()
    torch.testing.assert_close(logits(again), learned)
    loki.export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(build(family), tmp_path / "lora")), learned
    )
    for (name, layer), rows in zip(handle.named_layers(), ROWS, strict=True):
        axis = 1 if family == "GPT2LMHeadModel" else 0
        moved = (layer.merged_weight() != before["weights"][f"{name}.weight"]).any(1 - axis)
        assert moved.nonzero().flatten().tolist() == sorted(rows)
    handle.unpatch()
    before.pop("config")  # save_pretrained writes the architecture to it
    assert_unchanged(model, before)


def test_conv1d_has_the_gradient_of_its_columns():
    torch.manual_seed(0)
    linear = Conv1D(9, 7)
    layer = loki.LokiLinear(copy.deepcopy(linear), [8, 2])
    layer.update.data.normal_()
    x, upstream = torch.randn(2, 5, 7), torch.randn(2, 5, 9)
    with torch.no_grad():
        linear.weight[:, [2, 8]] += layer.update.t()
    (want,) = torch.autograd.grad(linear(x), linear.weight, upstream)
    (got,) = torch.autograd.grad(layer(x), layer.update, upstream)
    torch.testing.assert_close(got, want[:, [2, 8]].t())
    torch.testing.assert_close(layer(x), linear(x))


def test_a_weight_of_two_modules_is_refused():
    """As DiffusionGemma's, whose encoder and decoder are one."""
    model = build_model("Mixtral")
    model.other = nn.Module()
    model.other.down_proj = model.model.layers[1].mlp.experts.down_proj
    with pytest.raises(loki.UnsupportedModelError, match=r"other\.down_proj are one weight"):
        loki.patch(model, ROWS)


def test_a_subclass_that_is_no_linear_layer_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build("FalconForCausalLM")
    model.transformer.h[1].mlp.dense_4h_to_h.__class__ = Scaled
    with pytest.raises(loki.UnsupportedModelError, match="something else than a linear"):
        loki.patch(model, ROWS)


@pytest.mark.parametrize(
    ("family", "protected"), [("Mixtral", False), ("Mixtral", True), ("Llama4", False)]
)
def test_generating_writes_the_rows_once_and_takes_them_out_again(family, protected, monkeypatch):
    """Of the grouped form, which trains beside the base's weight, and of the whole one."""
    model = build_model(family)
    ids = token_batch()[:, :4]
    protect = None
    if protected:
        texts = [list(range(3, 60)), list(range(70, 5, -1))]
        protect = loki.estimate_protection(model, texts, share=0.7)
    bases = {name: module.down_proj.detach().clone() for name, module in stacks(model)}
    handle = loki.patch(model, ROWS, protect=protect)
    train(model)
    model.eval()
    prompt = {"input_ids": ids, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 5}
    want = type(model).generate(model, **prompt)
    calls = []

    def count(holder, name):
        real = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *args: calls.append(name) or real(*args))

    count(writer, "write_rows")
    count(LokiExperts, "_update_factors")  # what the grouped form adds at each token
    alone = "loki_kernels.training.rows.write_rows"
    monkeypatch.setattr(alone, lambda _: pytest.fail("a layer writes by itself"))
    assert torch.equal(model.generate(**prompt), want)
    monkeypatch.undo()
    assert calls == ["write_rows"]
    for name, layer in handle.named_layers():
        if isinstance(layer, LokiExperts) and layer.why_whole is None:
            assert torch.equal(layer.down_proj, bases[name])
    before = logits(model)
    with handle.inference():
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    train(model)
    handle.unpatch()
    assert all(torch.equal(m.down_proj, bases[name]) for name, m in stacks(model))


def test_a_rank_of_none_is_refused_before_anything_is_estimated(monkeypatch):
    monkeypatch.setattr(patching, "protection_to_keep", lambda *_: pytest.fail("it estimates"))
    for options in ({"rank": 0}, {"quota": 0, "protect": True}):
        with pytest.raises(ValueError, match="must be"):
            loki.patch(build_model(), **options)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPT2LMHeadModel"])
def test_after_a_checkpoint_the_update_is_added_to_the_base_again(name, tmp_path):
    """At once: what is swapped in before the next pass, as an average is, would be added to it."""
    model = build(name)
    handle = loki.patch(model, ROWS)
    train(model)
    before = logits(model)
    model.save_pretrained(tmp_path)
    layers = [layer for _, layer in handle.named_layers()]
    assert not any(layer.can_write or layer.written for layer in layers)
    assert all(torch.equal(layer.take_rows(layer.frozen), layer.base_rows) for layer in layers)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPT2LMHeadModel"])
def test_a_checkpoint_that_is_loaded_inside_inference_acts(name, assign):
    """Of layers that cannot write their rows too; and the caller's state dict stays as it was."""
    model = build(name)
    loki.patch(model, ROWS)
    state, want = train(model).state_dict(), logits(model)
    kept = {key: tensor.clone() for key, tensor in state.items()}
    model = build(name)
    handle = loki.patch(model, ROWS)
    with handle.inference(), torch.no_grad():
        base = logits(model)
        model.load_state_dict(state, assign=assign)
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base, want, rtol=1e-3)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(kept[key], tensor) for key, tensor in state.items())


def test_merging_inside_inference_is_refused():
    model = build_model("Mixtral")
    handle = loki.patch(model, ROWS)
    train(model)
    with handle.inference(), pytest.raises(RuntimeError, match="leave it first"):
        handle.merge()
    handle.merge()


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPT2LMHeadModel"])
def test_a_state_dict_of_what_holds_the_base_stays_as_it_is(name):
    """What a forward pass adds an update to is the base, not what was merged to be saved."""
    model = build(name)
    loki.patch(model, ROWS)
    learned = logits(train(model))
    state = model.state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    torch.testing.assert_close(logits(model), learned)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())
    again = build(name)
    loki.patch(again, ROWS)
    again.load_state_dict(state, assign=True)
    torch.testing.assert_close(logits(again), learned)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPT2LMHeadModel"])
def test_saving_copies_no_weight(name, tmp_path, monkeypatch):
    model = build(name)
    handle = loki.patch(model, ROWS)
    learned = logits(train(model))
    checked = []

    def check(*_, state_dict, **__):
        for key, layer in handle.named_layers():
            weight = state_dict[f"{key}.{layer.parameter}"]
            assert weight.data_ptr() == layer.frozen.data_ptr()
            assert torch.equal(layer.take_rows(weight), layer.merged_rows())
            checked.append(key)

    monkeypatch.setattr(type(model), "save_pretrained", check)
    model.save_pretrained(tmp_path)
    assert len(checked) == len(handle.named_layers())
    torch.testing.assert_close(logits(model), learned)


def test_copies_in_a_state_dict_are_on_the_host_where_they_have_no_room(monkeypatch):
    """accelerate makes all of it before it moves any, under ZeRO-2."""
    model = build("MixtralForCausalLM")
    handle = loki.patch(model, ROWS)
    train(model)
    want = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names = [f"{name}.{layer.parameter}" for name, layer in handle.named_layers()]
    room = want[names[0]].nbytes * 6

    def host_of(free, host):
        left = iter(free)
        monkeypatch.setattr(arithmetic, "free_bytes", lambda _: next(left))
        monkeypatch.setattr(arithmetic, "HOST", torch.device(host))
        return model.state_dict()

    state = host_of([room, room - 1, None, 0], "meta")
    assert [key for key, tensor in state.items() if tensor.is_meta] == [names[1], names[3]]
    assert not any(tensor.is_meta for _, tensor in handle.merged_parameters())
    state = host_of([0] * 4, "cpu")
    assert all(state[name].device.type == "cpu" for name in names)
    assert all(torch.equal(state[key].to(tensor), tensor) for key, tensor in want.items())


@pytest.mark.parametrize(("free", "moved"), [(0, True), (10**9, False), (None, False)])
def test_what_transformers_takes_apart_goes_to_the_host_where_it_has_no_room(
    free, moved, tmp_path, monkeypatch
):
    """It copies gate and up of all experts of all layers at once."""
    model = build("MixtralForCausalLM")
    handle = loki.patch(model, ROWS)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: free)
    monkeypatch.setattr(checkpoint, "HOST", torch.device("meta"))
    checked = []

    def check(*_, state_dict, **__):
        away = {key for key, tensor in state_dict.items() if tensor.is_meta}
        assert away == {f"{n}.gate_up_proj" for n, _ in handle.named_layers() if moved}
        checked.append(away)

    monkeypatch.setattr(type(model), "save_pretrained", check)
    model.save_pretrained(tmp_path)
    assert checked


@pytest.mark.parametrize(
    ("part", "refused"), [("gate_up_proj", True), ("gate_up_proj_bias", False)]
)
def test_matrices_of_experts_that_are_to_be_trained_are_an_error(part, refused):
    """The grouped products give them no gradient; a bias gets one."""
    model = build_model("GptOss")
    loki.patch(model, ROWS)
    asked = [p for n, p in model.named_parameters() if n.endswith(f"experts.{part}")]
    asked[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"{part} was asked for") if refused else nullcontext():
        model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    assert (asked[0].grad is None) == refused
