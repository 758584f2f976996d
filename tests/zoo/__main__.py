"""``python -m tests.zoo [NAME ...] [--write]``: every generation class, and docs/models.md."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, a thread each

import torch
import transformers

import loki_kernels

from .build import MOST_PARAMETERS, class_names
from .check import POINTS, TIME_LIMIT, TOLERANCE, TRIALS, Outcome, Verdict, check_all

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="classes; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}; takes all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds a class")
    options = parser.parse_args()
    mappings = class_names()
    everything = sorted({name for names in mappings.values() for name in names})
    unknown = sorted(set(options.names) - set(everything))
    if unknown:
        parser.error(f"no generation class: {', '.join(unknown)}")
    if options.names and options.write:
        parser.error("--write takes all classes")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    names = options.names or everything
    outcomes: list[Outcome] = []
    for outcome in check_all(names, options.workers, options.time_limit):
        outcomes.append(outcome)
        print(f"[{len(outcomes)}/{len(names)}] {outcome}", flush=True)
    outcomes.sort(key=lambda outcome: outcome.name)
    print(*_summary(outcomes, mappings), sep="\n")
    if options.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text("\n".join(_document(outcomes, mappings)) + "\n")
    return int(any(outcome.failures for outcome in outcomes))


def _summary(outcomes: Sequence[Outcome], mappings: dict[str, list[str]]) -> list[str]:
    built = {outcome.name for outcome in outcomes if outcome.not_built is None}
    lines = ["", *_built_lines(outcomes, mappings)]
    for what in TRIALS:
        verdicts = [getattr(outcome, what) for outcome in outcomes if outcome.name in built]
        counts = Counter(verdict.kind for verdict in verdicts)
        for mapping, names in mappings.items() if len(outcomes) > 50 else ():
            lines.append(_share(what, mapping, names, outcomes))
        lines.append(f"{what}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    for outcome in outcomes:
        for what, verdict in outcome.failures:
            lines.append(f"{verdict.kind} {outcome.name} {what}: {verdict.text}")
    return lines


def _share(what: str, mapping: str, names: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Of every class that is named, unbuilt ones counted as failures."""
    found = {outcome.name: getattr(outcome, what) for outcome in outcomes}
    word = TRIALS[what]
    good = sum(found[n] is not None and found[n].kind == word for n in names)
    return f"{mapping}: {good} of {len(names)} {word} ({good / len(names):.0%})"


def _built_lines(outcomes: Sequence[Outcome], mappings: dict[str, list[str]]) -> list[str]:
    """How many classes of each mapping were built, of those that were tried."""
    lines = []
    for mapping, names in mappings.items():
        tried = [outcome for outcome in outcomes if outcome.name in names]
        built = sum(outcome.not_built is None for outcome in tried)
        lines.append(f"{mapping}: {built} of {len(tried)} classes built")
    return lines


def _document(outcomes: Sequence[Outcome], mappings: dict[str, list[str]]) -> list[str]:
    built = [outcome for outcome in outcomes if outcome.not_built is None]
    lines = [
        "# Models",
        "",
        "Every generation class of transformers that could be built small (random weights, "
        f"float32, at most {MOST_PARAMETERS // 10**6} M parameters), and what this library does "
        "with it. Written by `python -m tests.zoo --write`; do not edit.",
        "",
        f"- Attribution is *exact* if the `published` scores (m = {POINTS}) of one prompt in a "
        "batch of two lengths equal naive re-forwards of the whole model at the output of each "
        f"layer's FFN to {TOLERANCE:.0e}, relative and in every layer. The number is the worst "
        "layer's error. *By staircase*, *decode* or *reforward* is the engine (see analysis.md); "
        "the last one has to be asked for.",
        "- Training is *trained* if three steps of AdamW with weight decay on a patched model move "
        "the selected rows of every FFN down-projection and no other number, the logits before "
        "are those of the model, and `unpatch` restores every bit.",
        "- Protection is *protected* if directions are estimated from six texts of random tokens "
        "and three such steps move the rows outside of them alone, to 1e-4 of the update.",
        "- *Refused* is the library's `UnsupportedModelError`, with the model as it was.",
        "",
        f"loki-kernels {loki_kernels.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}.",
        "",
        *(f"- {line}." for line in _built_lines(outcomes, mappings)),
        *(
            f"- {_share(what, mapping, names, outcomes)}, of all that are named."
            for what in TRIALS
            for mapping, names in mappings.items()
        ),
        "",
        "| class | attribution | training | protection | reason |",
        "|---|---|---|---|---|",
    ]
    lines += [_table_line(outcome) for outcome in built]
    lines += ["", "## Not tried", "", "These could not be built small by themselves.", ""]
    lines += [
        f"- {outcome.name}: {_cell(outcome.not_built)}"
        for outcome in outcomes
        if outcome.not_built is not None
    ]
    return lines


def _table_line(outcome: Outcome) -> str:
    verdicts = dict(outcome.verdicts)
    kinds = {what: verdict.kind for what, verdict in verdicts.items()}
    if kinds["attribution"] == "exact":
        _, error, *_, engine = verdicts["attribution"].text.split()
        kinds["attribution"] += f" by {engine} ({error})"
    reasons = [
        _reason(verdict) for what, verdict in verdicts.items() if verdict.kind != TRIALS[what]
    ]
    reason = " / ".join(dict.fromkeys(reasons))
    return f"| {outcome.name} | {' | '.join(kinds.values())} | {_cell(reason)} |"


def _reason(verdict: Verdict) -> str:
    """The first sentence."""
    return verdict.text.split(". ")[0].rstrip(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
