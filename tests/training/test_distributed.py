"""Two gloo processes against one: DDP, FSDP2, ZeRO, plain and in HF Trainer.

On the CPU, whatever --device says.
"""

from __future__ import annotations

import gc
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, TrainingArguments

import loki_kernels as loki
from loki_kernels.sharding import full_values
from tests.models import assert_unchanged, build_model, snapshot
from tests.tiny_training import ROWS
from tests.training.distributed_worker import build_experts, protection
from tests.two_processes import run_worker

OPTIONS = ("rank", "bf16", "peft", "protect", "experts")
PLAIN = ["plain", *(f"plain-{option}" for option in OPTIONS), "plain-protect-experts",
         "plain-protect-peft"]  # fmt: skip
TORCH = ["ddp", "ddp-peft", "ddp-protect", "fsdp2", "fsdp2-rank", "fsdp2-bf16", "fsdp2-peft",
         "fsdp2-protect", "fsdp2-offload", "fsdp2-offload-peft", "ddp-experts",
         "fsdp2-experts", "ddp-protect-experts", "fsdp2-protect-experts", "ddp-protect-peft",
         "fsdp2-protect-peft"]  # fmt: skip
# of one process, in which accelerate goes on sharding once it has: the ones without come first
TRAINER = ["trainer-ddp", "trainer-ddp-peft", "trainer-ddp-protect", "trainer-fsdp2",
           "trainer-fsdp2-rank", "trainer-fsdp2-peft", "trainer-fsdp2-protect",
           "trainer-fsdp2-protect-sharded"]  # fmt: skip
ZERO = ["zero2", "zero2-peft", "zero3", "zero3-rank", "zero3-peft", "zero3-protect"]
# stage3_gather_16bit_weights_on_model_save is off, as by default
APART = "trainer-zero3-apart"
ZERO_TRAINER = ["trainer-zero3", "trainer-zero3-rank", "trainer-zero3-peft",
                "trainer-zero3-protect"]  # fmt: skip
# what a patched model's state dict has beside a plain one's
OWN = (".index", ".update", ".delta_a", ".delta_b", ".protection_digest")
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def launch_worker(out: Path, cases: list[str]) -> Path:
    run_worker("tests.training.distributed_worker", out, *cases, DS_ACCELERATOR="cpu")
    return out


# Two starts for all cases: a process imports for ten seconds before it trains for two.
@pytest.fixture(scope="module")
def torch_engines(tmp_path_factory):
    others = ["ranks", "estimated", "efficient"]
    return launch_worker(tmp_path_factory.mktemp("torch"), PLAIN + TORCH + TRAINER + others)


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    # a Trainer under ZeRO-3 has transformers split whatever is built after it
    cases = ["continued", *ZERO, *ZERO_TRAINER, APART]
    return launch_worker(tmp_path_factory.mktemp("zero"), cases)


def case_of_one_process(case: str) -> str:
    """The case that one process runs."""
    return "-".join(["plain", *(part for part in case.split("-") if part in OPTIONS)])


def assert_same_losses(alone: Path, out: Path, case: str) -> None:
    got = json.loads((out / f"{case}.json").read_text())
    want = json.loads((alone / f"{case_of_one_process(case)}.json").read_text())
    # of bfloat16 models, sums in another order
    tolerance = 3e-3 if "bf16" in case else 2e-6
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    assert len(set(got)) == len(got)


def assert_same_weights(alone: Path, case: str, state: dict[str, torch.Tensor]) -> None:
    want = load_file(alone / f"{case_of_one_process(case)}.safetensors")
    if case.endswith("peft"):
        state = {k.replace(".loki_update.default", ".loki_update"): v for k, v in state.items()}
        want = {k.replace(".loki_update.default", ".loki_update"): v for k, v in want.items()}
        want = {k: v for k, v in want.items() if ".loki_update" in k}
    elif not any(k.endswith(OWN) for k in state):  # a plain model's
        want = {k: v for k, v in want.items() if not k.endswith(OWN)}
    assert want
    for name, tensor in want.items():
        if (
            "bf16" in case and tensor.is_floating_point()
        ):  # AdamW's first steps are as large for a gradient of rounding errors
            assert (state[name].float() - tensor.float()).norm() < 0.02 * tensor.float().norm()
        else:
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", TORCH)
def test_torch_engines(torch_engines, case):
    assert_same_losses(torch_engines, torch_engines, case)
    assert_same_weights(torch_engines, case, load_file(torch_engines / f"{case}.safetensors"))


@pytest.mark.parametrize(
    "case",
    ["ddp", "fsdp2", "fsdp2-rank", "fsdp2-bf16", "fsdp2-protect", "fsdp2-experts",
     "fsdp2-protect-experts"],
)  # fmt: skip
def test_checkpoint_at_the_end_is_ordinary(torch_engines, case):
    folder = torch_engines / case
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_weights(torch_engines, case, model.state_dict())
    assert (folder / "loki_rows.update").exists()
    if case != "ddp":  # what save_pretrained gathers by itself, called in every process
        for file in ("model.safetensors", "loki_rows.update"):
            got = load_file(folder.with_name(f"{case}-own") / file)
            for name, tensor in load_file(folder / file).items():
                assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("case", "rank", "dtype"),
    [
        ("ddp", None, torch.float32),
        ("fsdp2", None, torch.float32),
        ("fsdp2-rank", 2, torch.float32),
        ("fsdp2-bf16", None, torch.bfloat16),
        ("fsdp2-protect", None, torch.float32),
    ],
)
def test_side_file_of_a_sharded_model(torch_engines, case, rank, dtype):
    model = AutoModelForCausalLM.from_pretrained(torch_engines / case, dtype=dtype)
    trained = model.state_dict()
    base = build_model("llama_mlp_bias", dtype=dtype, device="cpu")
    protect = protection(base) if "protect" in case else None
    handle = loki.patch(base, ROWS, rank=rank, protect=protect)
    handle.load_state(torch_engines / case)
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(base.state_dict()[name], trained[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "case", ["fsdp2", "fsdp2-rank", "fsdp2-protect", "fsdp2-offload", "fsdp2-experts"]
)
def test_adapters_of_sharded_models_fit_the_base(torch_engines, case):
    """Every process saves one, and the first one writes it."""
    plain = AutoModelForCausalLM.from_pretrained(torch_engines / case)
    ids = torch.arange(40).reshape(4, 10)
    with torch.no_grad():
        want = plain(ids).logits

    def base():
        return build_experts() if "experts" in case else build_model("llama_mlp_bias", device="cpu")

    def assert_close(model):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids).logits, want, rtol=1e-4, atol=1e-4)

    merged = loki.load_adapter(base(), torch_engines / f"{case}-adapter").merge()
    assert_close(merged)
    name = f"model.layers.0.mlp.{'experts.' if 'experts' in case else ''}down_proj"
    name += "" if "experts" in case else ".weight"
    torch.testing.assert_close(
        merged.state_dict()[name], plain.state_dict()[name], rtol=1e-6, atol=1e-7
    )
    if "experts" not in case:
        peft = pytest.importorskip("peft")
        assert_close(peft.PeftModel.from_pretrained(base(), torch_engines / f"{case}-lora"))


def test_all_processes_train_the_same_rows(torch_engines):
    """Each analyses by itself: the first one's rows. Each is given others: an error, in time."""
    first, second = json.loads((torch_engines / "ranks.json").read_text())
    assert first[:2] == second[:2]
    assert first[1] == "True"
    assert [len(rows) for rows in first[0]] == [4, 4, 4]
    # given to patch, and found at the first step
    other = ["trains other rows than another"] * 2 + ["protects other directions than another"] * 2
    other += ["holds other base weights than another"] * 2
    for *said, expected in zip(first[2:], second[2:], other, strict=True):
        assert sorted(map(bool, said)) == [False, True]  # whoever comes second
        assert expected in "".join(said)


def test_all_processes_protect_what_the_first_estimates(torch_engines):
    """Each would draw other samples; what fails in the first is told in the second."""
    first, second = json.loads((torch_engines / "estimated.json").read_text())
    assert first[0] != second[0]
    assert first[1] == second[1] == first[0]
    assert (first[2], second[2]) == (1, 0)  # files in the caches
    assert first[3] == "OSError: no samples"
    assert second[3].startswith("RuntimeError: process 0, which shares this job, failed with OSE")


def test_efficient_loading_is_refused_in_every_process(torch_engines):
    for process in json.loads((torch_engines / "efficient.json").read_text()):
        assert len(process) == 3  # by patch, PEFT, and a Trainer whose arguments come later
        assert all("cpu_ram_efficient_loading" in said for said in process)


@pytest.mark.parametrize("around", ["layer", "model", "larger"])
def test_fsdp1_is_refused_before_training(one_process, around):
    """Around the whole model, as by accelerate's default, no part of the model is FSDP1's."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = build_model(device="cpu")
    loki.patch(model, [[1], [2], [3]])
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    if around == "larger":  # FSDP2's
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(torch.nn.Sequential(model), mesh=mesh)
    elif around == "model":
        model = FullyShardedDataParallel(model, **options)
    else:
        layers = model.model.layers
        layers[0] = FullyShardedDataParallel(layers[0], **options)
    with pytest.raises(loki.UnsupportedModelError, match="FSDP2"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_a_model_inside_ddp_is_refused(one_process, tmp_path):
    """It adds up no gradients of parameters that are younger; evaluating needs none."""
    model = build_model(device="cpu")
    before = snapshot(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for around in (wrapped, torch.compile(wrapped)):
        with pytest.raises(loki.UnsupportedModelError, match="patch the model first, then wrap"):
            loki.patch(around, ROWS)
    assert_unchanged(model, before)
    with loki.patch(build_model(device="cpu"), ROWS) as handle:
        loki.save_adapter(handle.model, tmp_path)
    loki.load_adapter(wrapped, tmp_path).unpatch()


def shard(model, **options):
    """As a loop of one's own does."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


@pytest.mark.parametrize("case", ["unpatched", "rows", "fused", "whole", "loaded", "experts"])
def test_whole_parameters_are_freed_when_they_are_sharded(one_process, case, tmp_path):
    """Whoever keeps the handle, or gives its callback to a trainer, keeps no unsharded model."""

    def build():
        return build_experts() if case == "experts" else build_model("llama_mlp_bias", device="cpu")

    model, kept = build(), []
    if case == "loaded":
        with loki.patch(build(), ROWS, modules_to_save=["embed_tokens"]) as handle:
            handle.model.save_pretrained(tmp_path)
        handle = loki.patch(model, str(tmp_path))
        kept += [handle, handle.trainer_callback()]
    elif case != "unpatched":
        whole = ["embed_tokens"] if case == "whole" else []
        handle = loki.patch(model, ROWS, modules_to_save=whole, fuse_mlp=case == "fused")
        kept += [handle, handle.trainer_callback()]
    before = {n: StorageWeakRef(p.untyped_storage()) for n, p in model.named_parameters()}
    shard(model)
    gc.collect()
    assert [name for name, values in before.items() if not values.expired()] == []
    assert len(kept) == (0 if case == "unpatched" else 2)


def test_what_shards_are_read_into_holds_the_base(one_process):
    """The update is added to the output then, and what the weights lacked would be formed too."""
    model = build_model("llama_mlp_bias", device="cpu")
    handle = loki.patch(model, ROWS)
    ids = torch.arange(20).reshape(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for _, layer in handle.named_layers():
            layer.update.add_(0.1)
        want = model(ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard(model)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    for _, layer in handle.named_layers():
        assert not layer.written
        rows = full_values(layer.frozen)[layer.index]
        assert torch.equal(rows, layer.base_rows)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_what_is_sharded_after_it_was_written_is_the_base_again(one_process, kind, tmp_path):
    """Else every pass would form its whole update and keep it for backward, 7.5 GB at 8B."""
    model = build_experts() if kind == "experts" else build_model("llama_mlp_bias", device="cpu")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = loki.patch(model, ROWS)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        for _, layer in handle.named_layers():
            layer.update.add_(0.1)
    want = model(input_ids=ids, labels=ids)
    want.loss.backward()
    gradients = [layer.update.grad.clone() for _, layer in handle.named_layers()]
    model.zero_grad()
    if kind == "experts":
        model.save_pretrained(tmp_path)
    else:
        model.state_dict()  # as accelerate asks for it before it shards
    # of experts a save has put the base back
    assert {layer.written for _, layer in handle.named_layers()} == {kind == "dense"}
    shard(model)
    got = model(input_ids=ids, labels=ids)
    got.loss.backward()
    torch.testing.assert_close(got.logits, want.logits)
    for (name, layer), gradient in zip(handle.named_layers(), gradients, strict=True):
        assert not layer.written
        assert torch.equal(full_values(layer.frozen), base[f"{name}.{layer.parameter}"])
        torch.testing.assert_close(full_values(layer.update.grad), gradient)


@pytest.mark.parametrize("reshard", [None, False])
def test_what_is_saved_after_a_forward_pass_is_what_is_kept(one_process, reshard, tmp_path):
    """And not what FSDP2 has gathered of it, rounded to what it computes in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = build_model("llama_mlp_bias", device="cpu")
    handle = loki.patch(model, ROWS, modules_to_save=["norm"])
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    writers = {
        "adapter": lambda folder: loki.save_adapter(model, folder),
        "lora": lambda folder: loki.export_lora(model, folder),
    }
    for name, write in writers.items():
        write(tmp_path / name)
    want = {name: value.clone() for name, value in handle.merged_parameters()}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    shard(model, reshard_after_forward=reshard, mp_policy=policy)

    def run():
        with torch.no_grad():
            model(ids)

    for name, write in writers.items():
        run()
        write(tmp_path / f"{name}-again")
        (file,) = (path.name for path in (tmp_path / name).iterdir() if path.suffix != ".json")
        got = load_file(tmp_path / f"{name}-again" / file)
        for key, value in load_file(tmp_path / name / file).items():
            assert torch.equal(got[key], value), (name, key)
    run()
    for name, value in handle.merged_parameters():
        assert torch.equal(value, want[name]), name
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.zero_()
    run()
    handle.load_state(tmp_path / "adapter")
    run()
    with pytest.raises(RuntimeError, match="are sharded"):
        handle.merge()
    got = {name: full_values(p) for name, p in model.named_parameters() if name in trained}
    torch.testing.assert_close(got, trained, rtol=0, atol=0)


def test_merged_adapters_of_shards_are_put_back_in_turn(one_process):
    peft = pytest.importorskip("peft")
    from loki_kernels.peft import LokiConfig

    base = build_model("llama_mlp_bias", device="cpu")
    model = peft.get_peft_model(base, LokiConfig(rows=ROWS))
    model.add_adapter("other", LokiConfig(rows=[[2], [1], [4]]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loki_update" in name:
                parameter.add_(1)
    shard(base)
    before = {name: full_values(p).clone() for name, p in model.named_parameters()}
    model.merge_adapter(["default", "other"])
    merged = {name: full_values(p).clone() for name, p in model.named_parameters()}
    changed = [n for n in before if not torch.equal(merged[n], before[n])]
    assert len(changed) == 3
    assert sum(int((merged[n] != before[n]).any(1).sum()) for n in changed) == 6 + 3
    model.unmerge_adapter()
    assert all(torch.equal(full_values(p), before[n]) for n, p in model.named_parameters())


def test_values_that_wait_on_the_cpu_are_gathered_where_the_group_is(one_process, monkeypatch):
    """As accelerate offloads a state dict; NCCL gathers nothing on a CPU."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    values = torch.arange(6.0)
    sharded = distribute_tensor(values, mesh, [Shard(0)])
    sharded.device_mesh._device_type = "cuda"
    moved = []
    monkeypatch.setattr(DTensor, "to", lambda self, to: moved.append(to) or self, raising=False)
    assert torch.equal(full_values(sharded), values)
    assert moved == ["cuda"]


@pytest.mark.skipif(
    "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__,
    reason="transformers 5.0 logs another loss in several processes",
)
@pytest.mark.parametrize("case", TRAINER)
def test_trainers(torch_engines, case):
    assert_trainer(torch_engines, torch_engines, case)


def test_a_sharded_checkpoint_has_its_protection(torch_engines):
    """Of `SHARDED_STATE_DICT` the Trainer calls no save_pretrained."""
    for step in (2, 4):
        folder = torch_engines / "trainer-fsdp2-protect-sharded" / f"checkpoint-{step}"
        assert not (folder / "model.safetensors").exists()
        kept = loki.Protection.load(folder / "loki_rows.protection")
        assert kept.fingerprint == protection(build_model("llama_mlp_bias")).fingerprint


@deepspeed
@pytest.mark.parametrize("case", ZERO)
def test_zero(torch_engines, zero, case):
    assert_same_losses(torch_engines, zero, case)
    if case in ("zero2", "zero2-peft", "zero3-peft"):  # else the engine's rows are apart
        assert_same_weights(torch_engines, case, load_file(zero / f"{case}.safetensors"))


@deepspeed
@pytest.mark.parametrize("case", ["zero2", "zero3", "zero3-rank", "zero3-protect"])
def test_zero_saves_an_ordinary_checkpoint(torch_engines, zero, case):
    model, info = AutoModelForCausalLM.from_pretrained(zero / case, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert_same_weights(torch_engines, case, model.state_dict())


def test_an_update_to_be_used_is_not_trained_in_shards(one_process, tmp_path):
    """In evaluation mode too, where no hook sees a gradient that FSDP2 scatters."""
    model = build_model("llama_mlp_bias", device="cpu")
    with loki.patch(model, ROWS, protect=protection(model)):
        model.save_pretrained(tmp_path)
    loki.load_adapter(model, tmp_path)
    shard(model.eval())
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        model(ids)
    with pytest.raises(RuntimeError, match="cannot be trained on"):
        model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("way", ["patch", "peft"])
def test_ddp_sends_none_of_our_buffers(one_process, way, tmp_path):
    model = build_model("llama_mlp_bias", device="cpu")
    file = tmp_path / "protection.safetensors"
    protection(model).save(file)
    if way == "patch":
        loki.patch(model, ROWS, protect=file)
    else:
        peft = pytest.importorskip("peft")
        from loki_kernels.peft import LokiConfig

        model = peft.get_peft_model(model, LokiConfig(rows=ROWS, protect=str(file)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    ours = {name for name, _ in model.named_buffers() if ".down_proj." in name}
    assert len(ours) == (12 if way == "patch" else 9)
    assert not ours & wrapped.named_module_buffers.keys()


@deepspeed
@pytest.mark.parametrize("case", ZERO_TRAINER)
def test_zero_trainers(torch_engines, zero, case):
    assert_trainer(torch_engines, zero, case)


@deepspeed
def test_zero_keeps_the_update_itself_where_weights_are_not_gathered(torch_engines, zero):
    """The Trainer saves in one process then, which would wait for the others' parts."""
    assert_same_losses(torch_engines, zero, APART)
    for folder in ("last", "checkpoint-2"):
        assert not list((zero / APART / folder).glob("loki_rows*"))
        assert list((zero / APART / folder).glob("global_step*"))


@deepspeed
def test_zero_goes_on_from_what_was_trained_whole(zero):
    """A parameter is an empty stand-in there; and what fails says why, and not that the weights are
    sharded, which nothing has written."""
    for read, rows, said, left in json.loads((zero / "continued.json").read_text()):
        assert read
        assert rows
        assert "does not fit this model: it was trained on another base" in said
        assert not left


def assert_trainer(alone: Path, out: Path, case: str) -> None:
    """The losses of one process, an ordinary checkpoint or adapter, and an exact resume."""
    assert_same_losses(alone, out, case)
    file = "adapter_model.safetensors" if case.endswith("peft") else "model.safetensors"
    straight = load_file(out / case / "last" / file)
    resumed = load_file(out / case / "resumed" / file)
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
    if case.endswith("peft"):
        assert_same_weights(alone, case, straight)
    else:
        model = AutoModelForCausalLM.from_pretrained(out / case / "last")
        assert_same_weights(alone, case, model.state_dict())
