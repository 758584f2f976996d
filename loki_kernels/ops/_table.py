"""`Backends`: a mapping that prints as a table."""

from __future__ import annotations


class Backends(dict[str, dict[str, str]]):
    """For every op, the state of each backend by its name; its repr is a table.

    A state's reason is a note below the table, once for all the ops that share it; ``-`` stands
    where an op has no such kernel. There is no colour and nothing but ASCII, so that it reads alike
    in a terminal, a log and a notebook.
    """

    def __repr__(self) -> str:
        notes: dict[str, int] = {}  # a reason, and its number
        header = ["", *next(iter(self.values()), ())]
        lines = [header, *([op, *(_cell(s, notes) for s in self[op].values())] for op in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *(f"[{number}] {note}" for note, number in notes.items())])


def _cell(state: str, notes: dict[str, int]) -> str:
    short, _, reason = state.partition(": ")
    if reason.startswith("it has no "):
        return "-"
    return f"{short} [{notes.setdefault(reason, len(notes) + 1)}]" if reason else short
