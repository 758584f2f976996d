"""``python -m benchmarks.forgetting``: run what is left of the study; ``report``: draw it.

A piece that was interrupted runs again. Records go to ``benchmarks/results/forgetting/``.
``constants`` prints what the best answer scores that is the same for every record.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import transformers

from loki_kernels.cache import cache_folder

from ..records import RESULTS, SHARED, describe_machine
from .constants import constants
from .pieces import pieces, run
from .results import Results
from .study import Study
from .workshop import Workshop

HERE = Path(__file__).parent
_WHAT = ("run", "list", "report", "constants")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting", description=__doc__)
    parser.add_argument("what", nargs="?", choices=_WHAT, default="run")
    parser.add_argument("--study", type=Path, default=HERE / "study.toml")
    parser.add_argument("--results", type=Path, help="JSON lines to read and append to")
    parser.add_argument("--data", type=Path, default=SHARED, help="the evaluation data")
    parser.add_argument("--work", type=Path, default=cache_folder() / "forgetting")
    parser.add_argument("--only", default="", help="pieces whose names start so")
    parser.add_argument("--minutes", type=float, help="start no piece after so long")
    arguments = parser.parse_args()
    study = Study.load(arguments.study)
    path = arguments.results or RESULTS / "forgetting" / f"{arguments.study.stem}.jsonl"
    results = Results(path)
    if arguments.what == "report":
        from .report import write_study_report

        for piece in pieces(study, results):
            results.claim(piece)
        write_study_report(study, results)
        return
    if arguments.what == "list":
        for piece in pieces(study, results):
            print("done" if results.claim(piece) else "    ", piece.name)
        return
    if not arguments.data.is_dir():
        raise SystemExit(f"the evaluation data is not in {arguments.data}; name it with --data.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start, machine = time.monotonic(), describe_machine()
    shop = Workshop(arguments.work, arguments.data, path.parent, study)
    if arguments.what == "constants":
        print("\n".join(constants(study, shop)))
        return
    for piece in pieces(study, results):
        if results.claim(piece) or not piece.name.startswith(arguments.only):
            continue
        if arguments.minutes and time.monotonic() - start > 60 * arguments.minutes:
            return
        record = run(piece, shop)
        results.add(machine | record)
        print(f"{piece.name}: {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
