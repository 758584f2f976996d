"""Two tasks in a row: the second update leaves alone what general text and the first task use.

python examples/two_tasks.py --first library.txt --second menu.txt --out both

The texts are paragraphs of .txt files.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loki_kernels as loki

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--first", required=True, help=".txt, a text a paragraph")
parser.add_argument("--second", required=True, help=".txt, a text a paragraph")
parser.add_argument("--general", help=".txt (default: the bundled questions)")
parser.add_argument("--out", default="both")
parser.add_argument("--lr", type=float, default=5e-4)
parser.add_argument("--epochs", type=int, default=3)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(options.model)


def paragraphs(path: str) -> list[str]:
    """The texts of a file."""
    texts = Path(path).read_text(encoding="utf-8").split("\n\n")
    return [text.strip() for text in texts if text.strip()]


def train(handle: loki.Patch, texts: list[str]) -> None:
    """A text a step, the whole of it."""
    update = [p for p in handle.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(update, lr=options.lr, weight_decay=0.0, fused=True)
    for _ in range(options.epochs):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
            handle.model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


first, second = paragraphs(options.first), paragraphs(options.second)
if options.general:
    general = paragraphs(options.general)
else:
    general = [question.text() for question in loki.load_questions()]

protection = loki.estimate_protection(model, general, tokenizer=tokenizer)
handle = loki.patch(model, protect=protection)
train(handle, first)
model = handle.merge()

protection = loki.estimate_protection(model, first, tokenizer=tokenizer, earlier=protection)
handle = loki.patch(model, protect=protection)
train(handle, second)
print("the second task moved the model, on the first task's texts by")
print(loki.drift(handle, texts=first, tokenizer=tokenizer).overall)
handle.merge().save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
print(f"merged model -> {options.out}")
