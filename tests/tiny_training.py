"""A few steps of training on random tokens, by hand and by HF Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments

import loki_kernels as loki
from tests import models

ROWS = [[1, 5, 40], [0], [7, 3]]
# How a model is trained in them.
WAYS = ["patch", "peft", "patch, protected", "peft, protected"]


def token_records(count=16):
    """Records of 9 random tokens, on the CPU, where a DataLoader wants them."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 97, (count, 9), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def token_batch(count=1):
    """Their ids ``[count, 9]``, on the models' device."""
    return models.to_device(torch.stack([record["input_ids"] for record in token_records(count)]))


def load_model(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).to(models.DEVICE)


def protection_of(model, seed=0, share=0.7):
    """Of random texts: as many directions as hold the share."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, 97, (8, 20), generator=generator).tolist()
    return loki.estimate_protection(model, texts, share=share, max_directions=10**6)


def protection_file(folder):
    """A protection of the model in a folder, in a file beside it."""
    path = Path(folder).with_name(f"{Path(folder).name}-protection.safetensors")
    if not path.exists():
        texts = [[3 + (7 * i + j * j) % 90 for j in range(20)] for i in range(8)]
        loki.estimate_protection(load_model(folder), texts, max_directions=20).save(path)
    return str(path)


def optimizer_of(model, lr=0.05):
    """Of every parameter that is trained, with weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)


def train(model, steps=3, lr=0.05, **inputs):
    """A bare loop over every parameter, with weight decay; of random tokens, or what is given."""
    batch = token_batch(4).to(next(model.parameters()).device)
    inputs = inputs or {"input_ids": batch, "labels": batch}
    optimizer = optimizer_of(model, lr)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_averaged(model, use_buffers=True):
    """(torch's average of a model that trains four steps, what its trained parameters should be).

    It averages integer buffers too, and rounds down what comes out.
    """
    average = get_ema_multi_avg_fn(0.9)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    want = {}
    for _ in range(4):
        train(model, 1)
        averaged.update_parameters(model)
        for name, p in model.named_parameters():
            if p.requires_grad:
                want[name] = 0.9 * want.get(name, p.detach()) + 0.1 * p.detach()
    return averaged.module, want


def logits(model):
    """Of one sequence, on the CPU, whatever the model's device."""
    with torch.no_grad():
        ids = token_batch().to(next(model.parameters()).device)
        return model.eval()(input_ids=ids).logits.cpu()


# By itself continuous batching fills most of the memory with its cache, in half a minute.
SMALL_BATCHES = {"num_blocks": 8, "max_batch_tokens": 64}


def batch_answers(generate_batch):
    """What a ``generate_batch`` answers to two prompts, greedily."""
    from transformers import ContinuousBatchingConfig  # transformers 5.0 has none

    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(**SMALL_BATCHES)
    answers = generate_batch(
        [[1, 2, 3], [4, 5]], generation_config=config, continuous_batching_config=small
    )
    return [answer.generated_tokens for answer in answers.values()]


def tiny_trainer(model, folder, steps, callbacks=(), **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, learning_rate=0.02,
        lr_scheduler_type="constant", per_device_train_batch_size=2, report_to="none",
        disable_tqdm=True, use_cpu=models.DEVICE.type == "cpu", **options,
    )  # fmt: skip
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=token_records(),
        eval_dataset=token_records(4),
        callbacks=list(callbacks),
    )


def start(way, folder, fuse_mlp=False, rows=ROWS):
    """(model to be trained in these rows, callbacks)."""
    import peft

    from loki_kernels.peft import LokiConfig

    model = load_model(folder)
    protect = protection_file(folder) if "protected" in way else None
    if way.startswith("patch"):
        handle = loki.patch(model, rows, fuse_mlp=fuse_mlp, protect=protect)
        return model, [handle.trainer_callback()]
    return peft.get_peft_model(model, LokiConfig(rows=rows, protect=protect)), []


def assert_ordinary(way, folder, base_folder, rows=ROWS):
    """A checkpoint, or an adapter of the base, with the selected rows changed and no others."""
    if way.startswith("peft"):
        from peft import PeftModel

        merged = PeftModel.from_pretrained(load_model(base_folder), folder).merge_and_unload()
        folder = folder / "merged"
        merged.save_pretrained(folder)
    assert models.changed_rows(folder, base_folder) == rows[0]


def straight_and_resumed(run, folder):
    """State dicts of ``run(folder, resume)``: of six steps, and again from the third's checkpoint.

    What runs has to save after three.
    """
    straight = run(folder)
    return straight, run(folder, resume=str(folder / "checkpoint-3"))


class WordTokenizer:
    """Words to ids; enough for the bundled questions."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [hash_word(word) for word in text.split()][:40]}


def hash_word(word):
    return sum(map(ord, word)) % 97
