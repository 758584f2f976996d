"""``python -m benchmarks.demo_rates METHOD RATE ...``: how the demo's learning rates were chosen.

Trains one method at each rate on the split of seed 1 (other functions held out) and
prints a line of figures for every share of the update. ``--folder`` keeps the protection between
calls.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import loki_kernels as loki
from loki_kernels.demo.evaluation import Examination, general_text
from loki_kernels.demo.function_calls import generate_examples
from loki_kernels.demo.main import FULL_SIZE, spread
from loki_kernels.demo.methods import FULL, LOKI, LORA, Update, trainable
from loki_kernels.demo.model import load_samples, load_smollm2
from loki_kernels.demo.training import encode, fine_tune
from loki_kernels.questions import CALIBRATION_PER_SUBJECT

# More than the demo has time for.
WINDOWS, QUESTIONS, SHARES = 8, 19, (1.0, 0.75, 0.5)
METHODS = {"full": FULL, "lora": LORA, "loki": LOKI}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_rates", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("rates", type=float, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    size, folder = FULL_SIZE, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_smollm2()
    train, test = generate_examples(size.train, size.test, seed=1)
    examples, task = ([encode(e, tokenizer) for e in part] for part in (train, test))
    if not (folder / "protection.safetensors").is_file():
        loki.estimate_protection(model, load_samples()).save(folder / "protection.safetensors")
    protection = loki.Protection.load(folder / "protection.safetensors")
    held_out = spread(loki.load_questions(1, skip=CALIBRATION_PER_SUBJECT), QUESTIONS)
    exam = Examination(model, tokenizer, task, general_text(tokenizer, WINDOWS, 256), held_out)
    for rate in arguments.rates:
        with trainable(METHODS[arguments.method], model, protection) as learner:
            update, start = Update(learner), time.monotonic()
            fine_tune(learner, examples, steps=size.steps, learning_rate=rate, progress=False)
            seconds = round(time.monotonic() - start)
            for share in SHARES:
                update.keep(share)
                start = time.monotonic()
                figures = exam.evaluate(learner)
                line = {
                    "method": arguments.method,
                    "rate": rate,
                    "share": share,
                    "exact": figures.exact,
                    "loss": round(figures.loss, 4),
                    "kl": round(figures.kl, 5),
                    "text": round(figures.text_kl, 5),
                    "questions": round(figures.questions_kl, 5),
                    "train": seconds,
                    "measure": round(time.monotonic() - start),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
