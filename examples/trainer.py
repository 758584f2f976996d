"""Fine-tune on your own text with HF Trainer: all rows, but protected, and watch what is forgotten.

python examples/trainer.py --data book.txt --out tuned

The text is read as one stream of tokens and cut into records. What is protected is estimated from
samples of the model, which wants a GPU, or from general texts of yours.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import loki_kernels as loki

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", required=True, help="text file")
parser.add_argument("--general", help=".txt to protect, a text a paragraph (default: own samples)")
parser.add_argument("--measure", help="texts to measure forgetting on (default: own questions)")
parser.add_argument("--out", default="tuned")
parser.add_argument("--quota", type=float, default=100.0, help="percentage of rows")
parser.add_argument(
    "--lr", type=float, default=5e-4, help="larger models want less, 10 %% of the rows more"
)
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--length", type=int, default=256, help="tokens of a record")
options = parser.parse_args()

on_gpu = torch.cuda.is_available()
dtype = "auto" if on_gpu else torch.float32  # the update is float32 all the same
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(options.model)

ids = tokenizer(Path(options.data).read_text(encoding="utf-8"))["input_ids"]
length = min(options.length, len(ids))
records = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
dataset = [{"input_ids": record, "labels": record} for record in records]
print(f"{len(records)} records of {length} tokens")

general = None
if options.general:
    general = Path(options.general).read_text(encoding="utf-8").split("\n\n")
protection = loki.estimate_protection(model, general, tokenizer=tokenizer)
handle = loki.patch(model, tokenizer=tokenizer, quota=options.quota, protect=protection)
print(handle.report)

trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=options.lr,
        warmup_steps=options.steps // 10,
        weight_decay=0.0,
        gradient_checkpointing=on_gpu,
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    data_collator=default_data_collator,  # all records are equally long
    callbacks=[handle.trainer_callback()],
)
trainer.add_callback(loki.DriftCallback(trainer, options.measure, every=20, tokens=2000))
trainer.train()
trainer.save_model(options.out)
print(loki.drift(handle, texts=options.measure, tokenizer=tokenizer, tokens=2000))
