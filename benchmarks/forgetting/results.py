"""A piece of the study, and the file of JSON lines that says which have run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records import read_lines
from .workshop import Workshop


@dataclass(frozen=True)
class Piece:
    """One run: its name, everything it depends on, and how to get its figures."""

    name: str
    spec: dict[str, Any]
    run: Callable[[Workshop], dict[str, Any]]


class Results:
    """A JSON-lines file, one line a piece; of several lines for one spec the last counts.

    A record is known once its piece claims it: what an older study file asked for is not. A
    training that two stages ask for runs once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self._stored: dict[tuple[str, str], dict[str, Any]] = {}
        if path.is_file():
            for record in read_lines(path):
                self._stored[_key(record["piece"], record["spec"])] = record

    def find(self, name: str) -> dict[str, Any] | None:
        return self.records.get(name)

    def count(self) -> int:
        """How many pieces have run; a training of two stages is one."""
        return len({id(record) for record in self.records.values()})

    def claim(self, piece: Piece) -> bool:
        """Whether the piece has been run as it is asked for now."""
        record = self._stored.get(_key(piece.name, piece.spec))
        if record is None:
            return False
        self.records[piece.name] = record
        return True

    def add(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records[record["piece"]] = self._stored[_key(record["piece"], record["spec"])] = record


def _key(name: str, spec: dict[str, Any]) -> tuple[str, str]:
    """A training's figures depend on its spec alone, whatever the stage's name."""
    return "" if "lessons" in spec else name, json.dumps(spec, sort_keys=True)
