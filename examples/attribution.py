"""Which rows of a model matter? Scores of every FFN node, a heatmap, a row file, and an ablation.

python examples/attribution.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out analysis
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loki_kernels as loki

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--questions", help="csv, jsonl or parquet (default: the bundled ones)")
parser.add_argument("--per-subject", type=int, default=1, help="of the bundled ones, 57 subjects")
parser.add_argument("--definition", default="published", choices=["published", "paper", "captum"])
parser.add_argument("--quota", type=float, default=10.0, help="percentage of rows")
parser.add_argument("--text", default="The capital of France is Paris.", help="for the ablation")
parser.add_argument("--out", type=Path, default=Path("analysis"))
options = parser.parse_args()
options.out.mkdir(exist_ok=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
tokenizer = AutoTokenizer.from_pretrained(options.model)
if options.questions:
    questions = loki.read_questions(options.questions)
else:
    questions = loki.load_questions(options.per_subject)

scores = loki.attribute(
    model,
    [question.prompt(tokenizer) for question in questions],
    tokenizer=tokenizer,
    definition=options.definition,
    out=options.out / "scores.safetensors",  # a run that is killed goes on from here
)
scores.heatmap(options.out / "heatmap.png", options.quota)
rows = loki.select(scores, options.quota)
rows.save(options.out / "rows.json")
print(f"{scores}\n{rows}")
for layer, size in enumerate(scores.scores.abs().mean((0, 2))):
    print(f"layer {layer:3}: mean |score| {size:.2e}")

ids = tokenizer(options.text, return_tensors="pt")["input_ids"].to(device)


def loss() -> float:
    """Of the text, nats a token."""
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


print(f"loss of {options.text!r}: {loss():.3f}")
for name, strategy, criterion in [
    ("nearest to zero", "layer_balanced", "magnitude"),
    ("random", "random", "magnitude"),
    ("most negative", "layer_balanced", "signed"),
]:
    chosen = loki.select(scores, options.quota, strategy, criterion)
    with loki.suppress(model, chosen):
        print(f"without {options.quota:g} % of the rows, {name}: {loss():.3f}")
print(f"scores.safetensors, heatmap.png and rows.json -> {options.out}")
