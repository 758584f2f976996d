"""Run under torchrun by test_distributed: trains the same thing with one engine after another.

    torchrun --nproc-per-node 2 -m tests.training.distributed_worker OUT CASE [CASE ...]

The plain cases are trained by the first process alone. Each case writes OUT/CASE.json (losses),
OUT/CASE.safetensors (the whole state dict) and, where it has one, a checkpoint folder OUT/CASE.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

import loki_kernels as loki
from loki_kernels.discovery import find_structure
from loki_kernels.fingerprint import tensors_fingerprint
from loki_kernels.protection import estimate
from loki_kernels.sharding import full_values
from loki_kernels.training import adapters, targets
from tests.models import GQA, build_model
from tests.tiny_training import ROWS, optimizer_of

# To cpu:0 is where transformers 5.0 reads an optimizer's state, which torch.load does not know.
torch.serialization.register_package(
    99, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None
)

STEPS, BATCH, LR = 4, 4, 0.02


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 97, (BATCH, 9), generator=generator) for _ in range(STEPS)]


def patched_or_wrapped(case: str, folder: Path | None = None):
    """(patched model or PeftModel, handle or None); of a checkpoint if a folder is given."""
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    if "experts" in case:
        model = build_experts()
    elif folder is None:
        model = build_model("llama_mlp_bias", dtype=dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rank = 2 if "rank" in case else None
    protect = protection(model) if "protect" in case else None
    torch.manual_seed(1)
    if "peft" in case:
        import peft

        from loki_kernels.peft import LokiConfig

        if protect is None:
            return peft.get_peft_model(model, LokiConfig(rows=ROWS, rank=rank)), None
        with tempfile.TemporaryDirectory() as kept:  # all rows, as by default
            protect.save(Path(kept) / "protection.safetensors")
            config = LokiConfig(protect=str(Path(kept) / "protection.safetensors"))
            return peft.get_peft_model(model, config), None
    handle = loki.patch(model, ROWS, rank=rank, protect=protect)
    return model, handle


def build_experts():
    """A small mixture of experts, the same in every process."""
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **GQA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        )
    )


def protection(model, seed=0):
    """Of directions that mean nothing: all processes have the same of a seed."""
    generator = torch.Generator().manual_seed(seed)
    # no decomposition, whose last bits depend on the number of threads
    drawn = {}
    for down_proj in find_structure(model).projections():
        width = down_proj.in_features
        order = torch.randperm(width, generator=generator)[: width // 4]
        drawn[down_proj.name] = torch.eye(width)[:, order].expand(*down_proj.experts, -1, -1)
    energies = {name: torch.ones_like(held[..., 0, :]) for name, held in drawn.items()}
    return loki.Protection(drawn, energies, dict.fromkeys(drawn, 40.0))


def train_steps(model, optimizer, share, backward=lambda loss: loss.backward(), step=None):
    """Mean losses over all processes; ``share`` takes this process's part of a batch."""
    losses = []
    for batch in batches():
        ids = share(batch)
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        if step is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            step()
        mean = loss.detach().float().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses


def share_of_rank(batch):
    part = BATCH // dist.get_world_size()
    return batch[dist.get_rank() * part :][:part]


def plain(case):
    model, _ = patched_or_wrapped(case)
    losses = train_steps(model, optimizer_of(model, LR), lambda batch: batch)
    return losses, model.state_dict(), None


def ddp(case):
    model, _ = patched_or_wrapped(case)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)

    losses = train_steps(wrapped, optimizer_of(model, LR), share_of_rank)
    return losses, model.state_dict(), model


def fsdp(case, out):
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model, handle = patched_or_wrapped(case)
    base = model.get_base_model() if "peft" in case else model
    kind = {"mesh": dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))}
    if "offload" in case:
        kind["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in base.model.layers:
        fully_shard(layer, **kind)
    fully_shard(model, **kind)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    start = {k: v.clone() for k, v in get_model_state_dict(model, options=options).items()}
    losses = train_steps(model, optimizer_of(model, LR), share_of_rank)
    state = get_model_state_dict(model, options=options)
    if "peft" in case:
        check_merging(model, state, protected="protect" in case)
    else:
        save_in_every_process(model, handle, state, out / case)
        assert moved_by_reading(model, start, state) > 1e-2 or dist.get_rank()
        assert moved_by_reading(model, state, state) < 1e-5
    return losses, state, model


def save_in_every_process(model, handle, state, path):
    """The update by itself, and what a server is sent: of sharded weights each process has a part.

    A LoRA adapter of experts is several times as large, and of PEFT's own versions.
    """
    model.save_pretrained(path.with_name(f"{path.name}-own"), is_main_process=dist.get_rank() == 0)
    with keeping_in_the_first_alone() as factored:
        loki.save_adapter(model, path.with_name(f"{path.name}-adapter"))
        if "experts" not in path.name:
            loki.export_lora(model, path.with_name(f"{path.name}-lora"))
            assert len(factored) == (0 if dist.get_rank() else len(handle.named_layers()))
    sent = dict(handle.merged_parameters())
    assert not any("update" in name or "delta" in name for name in sent)
    for name, tensor in sent.items():
        assert type(tensor) in (torch.Tensor, torch.nn.Parameter), name
        # the first process has the whole state
        want = [state.get(name)]
        dist.broadcast_object_list(want)
        torch.testing.assert_close(tensor.detach().cpu(), want[0], rtol=0, atol=0, msg=name)


@contextlib.contextmanager
def keeping_in_the_first_alone():
    """Every process takes part in gathering an update, and the first alone has it on its host.

    Gives the layers of which this process makes LoRA factors.
    """
    file, gathered, written, factored = adapters.adapter_file, [], [], []
    real = file.adapter_tensors, file.write_tensors, adapters._lora_factors

    def recording(make, calls):
        def call(*arguments, **options):
            calls.append(make(*arguments, **options))
            return calls[-1]

        return call

    file.adapter_tensors = recording(file.adapter_tensors, gathered)
    file.write_tensors = recording(file.write_tensors, written)
    adapters._lora_factors = recording(adapters._lora_factors, factored)
    try:
        yield factored
    finally:
        file.adapter_tensors, file.write_tensors, adapters._lora_factors = real
    assert [bool(tensors) for tensors in gathered] == [dist.get_rank() == 0]
    assert bool(written) == (dist.get_rank() == 0)


_HERE = contextlib.nullcontext()


def check_merging(model, state, gathered=_HERE, protected=False):
    """What TRL does before it sends a sharded PEFT model's weights to a server."""
    from loki_kernels.peft.layer import LokiLayer

    def whole():
        return {k: full_values(p).clone() for k, p in model.named_parameters()}

    with gathered:
        before = whole()
        model.merge_adapter()
        merged = whole()
        for layer in (m for m in model.modules() if isinstance(m, LokiLayer)):
            base, kept = layer.get_base_layer().weight, layer._replaced["default"]
            here = base.to_local() if isinstance(base, DTensor) else full_values(base)
            assert kept.numel() <= here.numel()  # of all rows an eighth, on eight GPUs
        model.unmerge_adapter()
        assert all(torch.equal(p, before[k]) for k, p in whole().items())
    directions = protection(build_model("llama_mlp_bias")).directions if protected else {}
    for layer, rows in enumerate(ROWS if dist.get_rank() == 0 else ()):  # who has the state
        projection = f"model.layers.{layer}.mlp.down_proj"
        name = f"base_model.model.{projection}."
        want = before[f"{name}base_layer.weight"]
        update = state[f"{name}loki_update.default"]
        if protected:  # all rows, of which these inputs are left alone
            want += update * (1 - directions[projection].sum(1))
        else:
            want[sorted(rows)] += update
        assert torch.equal(merged[f"{name}base_layer.weight"], want)


def moved_by_reading(model, read, before):
    """How far reading a full state dict (of rank 0) moves the model's own from ``before``."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {k: v.clone() for k, v in read.items()}, options=options)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    after = get_model_state_dict(model, options=options)
    return max((float((after[k] - before[k]).float().norm()) for k in after), default=0.0)


def zero(case):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed("gloo")
    stage = 3 if "3" in case else 2
    model, _ = patched_or_wrapped(case)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(model, LR),
        config={
            "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    losses = train_steps(
        engine, optimizer, share_of_rank, backward=engine.backward, step=engine.step
    )
    if stage == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
        if "peft" in case:
            gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
            check_merging(model, state, gathered)
        else:
            refuse_saving_without_a_state_dict(model)
        return losses, state, model
    return losses, model.state_dict(), model


def refuse_saving_without_a_state_dict(model):
    """The first process says which one to pass; the others write nothing."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            said = ""
        except RuntimeError as error:
            said = str(error)
        assert ("accelerator.get_state_dict" in said) == (dist.get_rank() == 0), said
        assert not list(Path(folder).glob("*.safetensors"))


def continued(case):
    """Goes on under ZeRO-3 from an update with a module trained whole: its values, and what is said
    of an update that does not fit; a list a process.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }

    def split(seed):
        model = build_model(seed=seed)
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        return model

    with tempfile.TemporaryDirectory() as folder:
        source = build_model()
        with loki.patch(source, ROWS, modules_to_save=["norm"]):
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter.add_(parameter.requires_grad)
            source.save_pretrained(folder)  # in each process
            saved = source.model.norm.weight.tolist()
        model = split(seed=0)
        handle = loki.patch(model, folder)
        read = full_values(model.model.norm.weight).tolist()
        rows = all(float(layer.update.min()) == 1 for _, layer in handle.named_layers())
        other, said = split(seed=1), ""
        try:
            loki.patch(other, folder)
        except ValueError as error:
            said = str(error)
        left = any(isinstance(module, loki.LokiLinear) for module in other.modules())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [read == saved, rows, said, left])
    return everyone, None, None


def _let_accelerate_shard_on_a_cpu():
    """It knows FSDP on accelerators only, and would quietly use DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    init = PartialState.__init__

    def pretend(self, *args, **options):
        init(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend


def trainer(case, out):
    """HF Trainer: plain, or with accelerate's FSDP2 or ZeRO-3; straight on, and resumed halfway."""
    from transformers import Trainer, TrainingArguments

    engine = {}
    if "fsdp2" in case:
        _let_accelerate_shard_on_a_cpu()
        engine["fsdp"] = "full_shard auto_wrap"
        engine["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT" if "sharded" in case else "FULL_STATE_DICT",
        }
    if "zero3" in case:
        engine["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": "apart" not in case,
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    records = [{"input_ids": ids, "labels": ids} for batch in batches() for ids in batch]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(records)

    def run(last, resume=None):
        arguments = TrainingArguments(
            output_dir=str(out / case), max_steps=STEPS, save_steps=STEPS // 2, logging_steps=1,
            learning_rate=LR, weight_decay=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
            per_device_train_batch_size=BATCH // dist.get_world_size(), report_to="none",
            disable_tqdm=True, use_cpu=True, **engine,
        )  # fmt: skip
        # after the arguments, as users do: under ZeRO-3 the base is sharded as it is loaded
        model, handle = patched_or_wrapped(case, out / "base")
        callbacks = [] if handle is None else [handle.trainer_callback()]
        run = InOrder(model=model, args=arguments, train_dataset=records, callbacks=callbacks)
        run.train(resume_from_checkpoint=resume)
        if handle is not None and "fsdp2" in case:  # else every pass forms what the weights hold
            assert not any(layer.written for _, layer in handle.named_layers())
        if "sharded" in case:  # of which the Trainer saves no model
            model.save_pretrained(out / case / last, is_main_process=dist.get_rank() == 0)
        else:
            run.save_model(str(out / case / last))
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    losses = run("last")
    run("resumed", str(out / case / f"checkpoint-{STEPS // 2}"))
    return losses, None, None


# Models that were patched before there was a group, each process with rows of its own, with a
# protection of its own, and with weights of its own.
EARLY = []


def patch_early(rank):
    EARLY.extend(build_model(seed=seed) for seed in (0, 0, rank))
    loki.patch(EARLY[0], [[1 + rank], [2], [3]])
    loki.patch(EARLY[1], ROWS, protect=protection(EARLY[1], rank))
    loki.patch(EARLY[2], ROWS)


def ranks(case):
    """What is said where processes would train different rows, of another base, or protect other
    directions: a list a process of messages.
    """
    rank = dist.get_rank()

    def scores_of_this_process(*_):
        return torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(rank))

    real, targets.cached_attribution = targets.cached_attribution, scores_of_this_process
    handle = loki.patch(build_model(), quota=10)
    targets.cached_attribution = real
    chosen = [rows.tolist() for rows in handle.rows]
    layers = [layer.index.tolist() for _, layer in handle.named_layers()]
    said = [str(chosen == layers)]
    ids = batches()[0]

    def protect():
        model = build_model()
        loki.patch(model, ROWS, protect=protection(model, rank))

    def train(model):
        model.train()(input_ids=ids, labels=ids).loss.backward()

    for attempt in (
        lambda: loki.patch(build_model(), [[1 + rank], [2], [3]]),
        lambda: train(EARLY[0]),
        protect,
        lambda: train(EARLY[1]),
        lambda: loki.patch(build_model(seed=rank), ROWS),
        lambda: train(EARLY[2]),
    ):
        try:
            attempt()
            said.append("")
        except ValueError as error:
            said.append(str(error))
        dist.barrier()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [chosen, *said])
    return everyone, None, None


def estimated(case):
    """Fingerprints of what ``protect=True`` is in each process, and what a failure there says."""
    rank = dist.get_rank()

    def samples_of_this_process(*_, **__):
        return torch.randint(3, 97, (9, 30), generator=torch.Generator().manual_seed(rank)).tolist()

    real = estimate.draw_samples, estimate.openings_of
    estimate.draw_samples, estimate.openings_of = samples_of_this_process, lambda _: []
    with tempfile.TemporaryDirectory() as folder:  # each process has one of its own
        os.environ["LOKI_KERNELS_CACHE"] = folder
        model = build_model()
        own = loki.estimate_protection(model, tokenizer=object()).fingerprint
        handle = loki.patch(model, ROWS, protect=True, tokenizer=object())
        held = {n: x.directions[:, : x.protected].contiguous() for n, x in handle.named_layers()}
        found = [own, tensors_fingerprint(held[n] for n in sorted(held)), len(os.listdir(folder))]

        def fail(*_, **__):
            raise OSError("no samples")

        estimate.draw_samples = fail
        try:
            loki.patch(build_model(seed=1), ROWS, protect=True, tokenizer=object())
        except (OSError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
        del os.environ["LOKI_KERNELS_CACHE"]
    estimate.draw_samples, estimate.openings_of = real
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone, None, None


def efficient(case):
    """What is said under accelerate's cpu_ram_efficient_loading: a list a process of messages."""
    import peft

    from loki_kernels.peft import LokiConfig

    callback = loki.patch(build_model(), ROWS).trainer_callback()
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ |= asked
    said = []
    for attempt in (
        lambda: loki.patch(build_model(), ROWS),
        lambda: peft.get_peft_model(build_model(), LokiConfig(rows=ROWS)),
        lambda: callback.on_init_end(None, None, None),
    ):
        try:
            attempt()
        except loki.UnsupportedModelError as error:
            said.append(str(error))
    for name in asked:
        del os.environ[name]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    return everyone, None, None


def do_not_compile_shared_memory():
    """DeepSpeed would spend two minutes on a C++ extension that gloo does without."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(out: Path, cases: list[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    if any("zero" in case or case == "continued" for case in cases):
        do_not_compile_shared_memory()
    if os.environ["RANK"] == "0":
        build_model("llama_mlp_bias").save_pretrained(out / "base")
        run_cases(out, [case for case in cases if case.startswith("plain")])
    if "ranks" in cases:
        patch_early(int(os.environ["RANK"]))
    dist.init_process_group("gloo")
    dist.barrier()
    run_cases(out, [case for case in cases if not case.startswith("plain")])
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # under DeepSpeed the end of the interpreter aborts now and then


def run_cases(out: Path, cases: list[str]) -> None:
    """Of this process before there is a group, of all processes afterwards."""
    for case in cases:
        kind = case.split("-")[0].removesuffix("2").removesuffix("3")
        run = globals()[kind]
        losses, state, model = run(case, out) if kind in ("trainer", "fsdp") else run(case)
        first = not dist.is_initialized() or dist.get_rank() == 0
        if model is not None and "peft" not in case:
            # by accelerate's lines, in every process; the state dict is None in all but the first
            # under ZeRO-3
            model.save_pretrained(out / case, is_main_process=first, state_dict=state)
        if first:
            (out / f"{case}.json").write_text(json.dumps(losses))
            if state is not None:
                state = {
                    k: v.clone().contiguous() for k, v in state.items() if k != "lm_head.weight"
                }
                save_file(state, out / f"{case}.safetensors")
        print(case, losses, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
