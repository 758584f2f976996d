"""``python -m benchmarks [SUITE ...]``: time ours against what one would use instead.

Records are appended to this machine's file under ``benchmarks/results/``; ``python -m benchmarks
report`` turns all files into tables and plots.
"""

from __future__ import annotations

import argparse
import importlib

from .measure import attempt, finish, run_to_the_end
from .records import append_record, describe_machine
from .report import format_seconds, write_report

# Suite -> its module here.
SUITES = {
    "attribution": "attribution",
    "ops": "ops.suite",
    "row_masked_linear": "ops.row_masked_linear",
    "training_step": "training.step",
    "selection": "selection",
    "memory": "training.memory",
}
PEERS = "ops.peers"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; report")
    parser.add_argument(
        "--peers", action="store_true", help="of the ops: other libraries' and ours, few shapes"
    )
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_true", help="without the growth curves")
    scope.add_argument("--dry-run", action="store_true", help="tiny shapes, nothing is kept")
    arguments = parser.parse_args()
    suites = arguments.suites or list(SUITES)
    if suites == ["report"]:
        write_report()
        return
    unknown = sorted(set(suites) - set(SUITES))
    if unknown:
        parser.error(
            f"unknown suite {', '.join(unknown)}; choose of {', '.join(SUITES)}, or report"
        )
    if arguments.peers and suites != ["ops"]:
        parser.error("--peers goes with the suite ops alone")
    machine = describe_machine()
    for suite in suites:
        name = PEERS if arguments.peers else SUITES[suite]
        chosen = "dry" if arguments.dry_run else "quick" if arguments.quick else "full"
        with attempt(suite):
            module = importlib.import_module(f".{name}", __package__)
            for record in module.run(chosen):
                if not arguments.dry_run:
                    append_record(machine | record)
                print(_line(record), flush=True)
    finish()


def _line(record: dict) -> str:
    case = " ".join(f"{name}={value}" for name, value in record["case"].items())
    if record["suite"] == "memory":
        ours, peer = record["ours_bytes"] / 2**20, record["peer_bytes"] / 2**20
        return f"memory {case}: ours {ours:.0f} MiB, {record['peer']} {peer:.0f} MiB"
    if record["suite"] == "ops":
        device, host = (format_seconds(record[name]["p50"]) for name in ("device_s", "host_s"))
        share = f"{record['of_floor']:.0%} of the floor"
        return f"ops {case}: {record['peer']} device {device}, host {host}, {share}"
    ratio = record["ratio"]
    text = (
        f"{record['suite']} {case}: ours {record['ours_s']['p50'] * 1e3:.3g} ms, {record['peer']} "
        f"{record['peer_s']['p50'] * 1e3:.3g} ms, ratio {ratio['p50']:.3g} "
        f"({ratio['p20']:.3g} to {ratio['p80']:.3g})"
    )
    return text + (f", {record['of_floor']:.0%} of the floor" if "of_floor" in record else "")


if __name__ == "__main__":
    run_to_the_end(main)
