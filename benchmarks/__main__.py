"""``python -m benchmarks [SUITE ...]``: time ours against what one would use instead.

Records are appended to this machine's file under ``benchmarks/results/``; ``python -m benchmarks
report`` turns all files into tables and plots.
"""

from __future__ import annotations

import argparse
import importlib

from .measure import attempt, finish, run_to_the_end
from .records import append_record, describe_machine
from .report import table_line, write_report

# Suite -> its module here. The peers, other libraries', are timed where they are named.
SUITES = {
    "attribution": "attribution",
    "training_step": "training.step",
    "memory": "training.memory",
    "ops": "ops.suite",
    "row_masked_linear": "ops.row_masked_linear",
    "selection": "selection",
    "peers": "ops.peers",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; report")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_true", help="without the growth curves")
    scope.add_argument("--dry-run", action="store_true", help="tiny shapes, nothing is kept")
    arguments = parser.parse_args()
    suites = arguments.suites or [suite for suite in SUITES if suite != "peers"]
    if suites == ["report"]:
        write_report()
        return
    unknown = sorted(set(suites) - set(SUITES))
    if unknown:
        parser.error(
            f"unknown suite {', '.join(unknown)}; choose of {', '.join(SUITES)}, or report"
        )
    machine = describe_machine()
    for suite in suites:
        chosen = "dry" if arguments.dry_run else "quick" if arguments.quick else "full"
        with attempt(suite):
            module = importlib.import_module(f".{SUITES[suite]}", __package__)
            for record in module.run(chosen):
                if not arguments.dry_run:
                    append_record(machine | record)
                print(table_line(record), flush=True)
    finish()


if __name__ == "__main__":
    run_to_the_end(main)
