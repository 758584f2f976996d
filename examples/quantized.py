"""Train rows over an 8-bit base, by torchao and PEFT, and merge them into an ordinary model.

python examples/quantized.py --data library.txt --rows rows.json --out adapter

`loki-kernels attribute` and `loki-kernels select` make the row file, once, in full precision.
"""

import argparse
from pathlib import Path

import peft
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from loki_kernels.peft import LokiConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", required=True, help=".txt, a text a paragraph")
parser.add_argument("--rows", required=True, help="row file")
parser.add_argument("--out", default="adapter")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--epochs", type=int, default=3)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(options.model)
int8 = TorchAoConfig(Int8WeightOnlyConfig())
model = AutoModelForCausalLM.from_pretrained(
    options.model, quantization_config=int8, device_map=device
)
model = peft.get_peft_model(model, LokiConfig(rows=options.rows))
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
texts = Path(options.data).read_text(encoding="utf-8").split("\n\n")
for epoch in range(options.epochs):
    for text in filter(str.strip, texts):
        ids = tokenizer(text.strip(), return_tensors="pt")["input_ids"].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss of the last text {loss.item():.3f}")
model.save_pretrained(options.out)

# Onto the base in full precision, so that nothing is rounded twice.
base = AutoModelForCausalLM.from_pretrained(options.model)
merged = peft.PeftModel.from_pretrained(base, options.out).merge_and_unload()
merged.save_pretrained(f"{options.out}-merged")
tokenizer.save_pretrained(f"{options.out}-merged")
print(f"adapter -> {options.out}, merged model -> {options.out}-merged")
