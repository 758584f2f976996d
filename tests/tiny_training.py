"""A few steps of training on random tokens, by hand and by HF Trainer."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments

ROWS = [[1, 5, 40], [0], [7, 3]]


def data(count=16):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 97, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model, steps=3, lr=0.05):
    """A bare loop over every parameter, with weight decay."""
    batch = torch.stack([row["input_ids"] for row in data(4)])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1
    )
    for _ in range(steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=data(1)[0]["input_ids"][None]).logits


def trainer(model, folder, steps, callbacks=(), **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, learning_rate=0.02,
        lr_scheduler_type="constant", per_device_train_batch_size=2, report_to="none",
        disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data(),
        eval_dataset=data(4),
        callbacks=list(callbacks),
    )


class WordTokenizer:
    """Words to ids; enough for the bundled questions."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [hash_word(word) for word in text.split()][:40]}


def hash_word(word):
    return sum(map(ord, word)) % 97
