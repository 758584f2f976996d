"""Fine-tune a chat model on your own conversations with TRL, training rows of its FFNs.

python examples/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --out tuned

`chats.jsonl` has an object a line: {"messages": [{"role": "user", "content": ...}, ...]}.
"""

import argparse

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from loki_kernels.peft import LokiConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", required=True, help="jsonl with messages")
parser.add_argument("--out", default="tuned")
parser.add_argument("--rows", help="row file (default: all rows, protected)")
parser.add_argument("--quota", type=float, help="percentage of rows, of an analysis")
parser.add_argument("--protect", help="file of `loki-kernels protection MODEL FILE`")
parser.add_argument(
    "--lr", type=float, default=5e-4, help="larger models want less, 10 %% of the rows more"
)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=4)
options = parser.parse_args()

trainer = SFTTrainer(
    options.model,
    SFTConfig(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=options.steps // 10,
        bf16=torch.cuda.is_available(),
        model_init_kwargs={"dtype": "auto" if torch.cuda.is_available() else "float32"},
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    peft_config=LokiConfig(rows=options.rows, quota=options.quota, protect=options.protect),
)
trainer.model.print_trainable_parameters()
trainer.train()
trainer.save_model(options.out)

base = AutoModelForCausalLM.from_pretrained(options.model)
merged = PeftModel.from_pretrained(base, options.out).merge_and_unload()
merged.save_pretrained(f"{options.out}-merged")
AutoTokenizer.from_pretrained(options.out).save_pretrained(f"{options.out}-merged")
print(f"adapter -> {options.out}, merged model -> {options.out}-merged")
