"""``python -m benchmarks report``: every file of results as tables and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loki_kernels.files import atomic_path
from loki_kernels.plots import picture

from .records import RESULTS, file_of, read_lines

REPORT = RESULTS.parent / "RESULTS.md"

Record = dict[str, Any]


class Curve(NamedTuple):
    """How times grow with ``x``, everything else as in ``case``."""

    suite: str
    x: str
    label: str
    case: Mapping[str, Any]


_SMOLLM2 = {"model": "SmolLM2-135M", "tokens": 128, "layers": 30, "steps": 7}
CURVES = (
    Curve("attribution", "tokens", "prompt tokens T", _SMOLLM2),
    Curve("attribution", "layers", "layers L", _SMOLLM2),
    Curve("attribution", "steps", "path points m", _SMOLLM2),
    Curve("attribution", "samples", "prompts at a time N", _SMOLLM2),
    Curve("row_masked_linear", "tokens", "tokens", {"in_features": 1536, "quota": 10.0}),
    Curve("row_masked_linear", "quota", "rows trained, %", {"in_features": 1536, "tokens": 1024}),
    Curve("selection", "samples", "samples N", {"layers": 32, "nodes": 4096, "quota": 10.0}),
    Curve("selection", "nodes", "nodes D", {"samples": 16, "layers": 32, "quota": 10.0}),
    Curve("selection", "quota", "rows counted, %", {"samples": 16, "layers": 32, "nodes": 4096}),
)


def read_records(folder: Path = RESULTS) -> list[Record]:
    """The records of all machines, of equal ones the newest; compilers' tables have no case."""
    newest: dict[str, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read_lines(path):
            if "case" in record:
                key = [record["device"], record["suite"], record["peer"], record["case"]]
                newest[json.dumps(key)] = record
    return list(newest.values())


def matches(record: Record, suite: str, case: Mapping[str, Any], free: str) -> bool:
    """Whether a record is of this suite and case, whatever its value of ``free``."""
    own = record["case"]
    return (
        record["suite"] == suite
        and all(own.get(name) == value for name, value in case.items() if name != free)
        and own.get("definition", "published") == "published"
    )


def tables(records: Iterable[Record]) -> str:
    """Markdown: for each device what it is, and every record."""
    records = list(records)
    parts = ["# Benchmarks", ""]
    parts += ["Written by `python -m benchmarks report`. Times are medians; ratios are how many"]
    parts += ["times as long the peer takes (20th to 80th percentile of the rounds)."]
    gpus = {record["device"] for record in records if "driver" in record}
    for device in sorted({r["device"] for r in records}, key=lambda d: (d not in gpus, d)):
        own = [record for record in records if record["device"] == device]
        versions = sorted(
            {f"torch {record['torch']}, transformers {record['transformers']}" for record in own}
        )
        commands = sorted({f"`{record['command']}`" for record in own})
        parts += ["", f"## {device}", "", f"{'; '.join(versions)}. {', '.join(commands)}."]
        recounted = {r["case"].get("op", r["suite"]) for r in own if "recounted" in r}
        if recounted:
            parts += ["", f"Counted again since: the floors of {', '.join(sorted(recounted))}."]
        timed = [table_line(record) for record in own if record["suite"] != "ops"]
        if timed:
            parts += ["", "| suite | case | peer | ours | peer's | ratio | of the floor |"]
            parts += ["|---|---|---|---|---|---|---|", *timed]
        ops = [table_line(record) for record in own if record["suite"] == "ops"]
        if ops:
            parts += ["", "| op | case | backend | device | host | of the floor |"]
            parts += ["|---|---|---|---|---|---|", *ops]
    return "\n".join(parts) + "\n"


def table_line(record: Record) -> str:
    """A record as a line of its table, which is another of an op's time than of a suite's."""
    case = ", ".join(f"{name} {value}" for name, value in record["case"].items() if name != "op")
    share = f"{record['of_floor']:.0%}" if "of_floor" in record else ""
    if record["suite"] == "ops":
        device, host = (format_seconds(record[name]["p50"]) for name in ("device_s", "host_s"))
        op = record["case"]["op"]
        return f"| {op} | {case} | {record['peer']} | {device} | {host} | {share} |"
    name = f"{record['peer']} ({record['note']})" if "note" in record else record["peer"]
    if record["suite"] == "memory":
        ours, peer = (f"{record[key] / 2**20:.0f} MiB" for key in ("ours_bytes", "peer_bytes"))
        ratio = f"{record['peer_bytes'] / record['ours_bytes']:.2f}"
        return f"| memory | {case} | {name} | {ours} | {peer} | {ratio} | |"
    ours, peer = (format_seconds(record[name]["p50"]) for name in ("ours_s", "peer_s"))
    spread = record["ratio"]
    ratio = f"{spread['p50']:.3g} ({spread['p20']:.3g} to {spread['p80']:.3g})"
    return f"| {record['suite']} | {case} | {name} | {ours} | {peer} | {ratio} | {share} |"


def format_seconds(seconds: float) -> str:
    """With three digits, in s, ms or µs."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def plot(records: Iterable[Record], device: str, path: Path) -> bool:
    """Write the growth curves of one device as a PNG; False if it has none."""
    records = [
        record for record in records if record["device"] == device and record["suite"] != "memory"
    ]
    drawn = []
    for curve in CURVES:
        lines: dict[str, dict[float, float]] = {}
        for record in records:
            if matches(record, curve.suite, curve.case, free=curve.x):
                x = record["case"][curve.x]
                lines.setdefault(record["peer"], {})[x] = record["peer_s"]["p50"]
                lines.setdefault("ours", {})[x] = record["ours_s"]["p50"]
        if lines and len(lines["ours"]) > 1:
            drawn.append((curve, lines))
    if not drawn:
        return False
    columns = min(3, len(drawn))
    height = -(-len(drawn) // columns)
    with picture(path, 4 * columns, 3.2 * height, dpi=110) as figure:
        figure.suptitle(device)
        axes = figure.subplots(height, columns, squeeze=False)
        for axis, (curve, lines) in zip(axes.flat, drawn, strict=False):
            for name, points in lines.items():
                style = {"color": "black", "linewidth": 2} if name == "ours" else {"linewidth": 1}
                axis.loglog(*zip(*sorted(points.items()), strict=True), "o-", label=name, **style)
            axis.set(title=curve.suite, xlabel=curve.label, ylabel="seconds")
            axis.set_xticks(sorted(lines["ours"]), [f"{x:g}" for x in sorted(lines["ours"])])
            axis.minorticks_off()
            axis.legend(fontsize=7, framealpha=0.5)
        for axis in list(axes.flat)[len(drawn) :]:
            axis.axis("off")
    return True


def write_report() -> None:
    """Write ``benchmarks/RESULTS.md`` and a PNG beside each machine's file."""
    records = read_records()
    text = tables(records)
    for device in sorted({record["device"] for record in records}):
        path = file_of(device).with_suffix(".png")
        if plot(records, device, path):
            text += f"\n![{device}](results/{path.name})\n"
            print(path)
    with atomic_path(REPORT) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(REPORT)
