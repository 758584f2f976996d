"""What the site has beside docs/: README as its home, files that pages link to, the commands' help.

Pages are written for the repository, where `../benchmarks/NOTES.md` of docs/x.md is a file; in the
site docs/ is the root, and the repository's other files lie in it under their own paths.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
_HOME = "README.md"


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/, and what those link to in turn."""
    waiting = [(f"docs/{f.src_uri}", _read(f)) for f in files.documentation_pages()]
    waiting += [(name, (ROOT / name).read_text("utf-8")) for name in ("CONTRIBUTING.md", _HOME)]
    seen = {"CONTRIBUTING.md", _HOME}
    while waiting:
        source, text = waiting.pop()
        if not source.startswith("docs/"):
            files.append(File.generated(config, _in_site(source), content=_moved(source, text)))
        for _, link, _ in _LINK.findall(text):
            target = _target(source, link)
            if target is None or target.startswith("docs/") or target in seen:
                continue
            seen.add(target)
            path = ROOT / target
            if path.suffix == ".md":
                waiting.append((target, path.read_text("utf-8")))
            else:
                files.append(File.generated(config, _in_site(target), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of docs/ as they are in the site; and the commands' help."""
    uri = page.file.src_uri
    if page.file.generated_by is None:
        markdown = _moved(f"docs/{uri}", markdown)
    return markdown.replace("<!-- commands -->", _commands()) if uri == "cli.md" else markdown


def _read(file: File) -> str:
    return Path(file.abs_src_path or "").read_text("utf-8")


def _target(source: str, link: str) -> str | None:
    """The file of the repository that a page's link names, as a path from its root."""
    if ":" in link or not link:
        return None
    path = os.path.normpath(PurePosixPath(source).parent / link)
    return path if (ROOT / path).is_file() else None


def _in_site(path: str) -> str:
    return "index.md" if path == _HOME else path.removeprefix("docs/")


def _moved(source: str, text: str) -> str:
    """A page's text with the links that its place in the site asks for."""

    def link(match: re.Match[str]) -> str:
        target = _target(source, match[2])
        if target is None:
            return match[0]
        folder = PurePosixPath(_in_site(source)).parent
        return f"{match[1]}{os.path.relpath(_in_site(target), folder)}{match[3]}"

    return _LINK.sub(link, text)


def _commands() -> str:
    sys.path.insert(0, str(ROOT))
    from loki_kernels.cli import _parser

    os.environ["COLUMNS"] = "80"
    subparsers = next(
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return "\n\n".join(
        f"## {name}\n\n```text\n{parser.format_help().strip()}\n```"
        for name, parser in subparsers.choices.items()
    )
