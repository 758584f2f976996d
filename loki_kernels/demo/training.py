"""Fine-tuning on the function-calling task with HF Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from .function_calls import Example

Encoded = dict[str, list[int]]


def encode(example: Example, tokenizer: Any) -> Encoded:
    """Token ids, with labels on the call and its end mark alone."""
    return encode_answer(example.prompt(), example.call + tokenizer.eos_token, tokenizer)


def encode_answer(messages: list[dict[str, str]], answer: str, tokenizer: Any) -> Encoded:
    """Token ids of a chat and its answer, which alone is labelled."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}


def collate(batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Right-pad a batch; padding is masked and unlabelled."""
    ids = [torch.tensor(example["input_ids"]) for example in batch]
    labels = [torch.tensor(example["labels"]) for example in batch]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def fine_tune(
    model: nn.Module,
    examples: Sequence[Encoded],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 4,
    progress: bool = True,
) -> None:
    """Train with AdamW, no weight decay, a tenth of the steps as warm-up and linear decay."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 10),
            lr_scheduler_type="linear",
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            seed=0,
            disable_tqdm=not progress,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=list(examples), data_collator=collate
        )
        trainer.train()
    model.eval()
