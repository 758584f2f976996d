"""The site: pages are in its menu, links lead somewhere, public names are described."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import loki_kernels
import loki_kernels.ops
from loki_kernels.errors import ENTRIES, explained

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def _headings(path):
    """As GitHub and the site make anchors of them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        if anchor and target.suffix == ".md":
            assert anchor in set(_headings(target)), link


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]+\.md", menu.partition("\nnav:")[2]))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= named


def test_every_public_name_is_described():
    described = set(re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text("utf-8"), re.M))
    public = {f"loki_kernels.{n}" for n in loki_kernels.__all__ if n != "__version__"}
    ops = {f"loki_kernels.ops.{n}" for n in loki_kernels.ops.__all__ if n.islower()}
    assert public | ops | {"loki_kernels.peft.LokiConfig"} <= described


def _strings(code):
    """Every string of a piece of code, with what is put into it left out."""
    for node in ast.walk(code):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (getattr(value, "value", None) for value in node.values)
            yield "\0".join(part for part in parts if isinstance(part, str))


def _messages():
    for path in Path(loki_kernels.__file__).parent.rglob("*.py"):
        yield from _strings(ast.parse(path.read_text(encoding="utf-8")))


# A class, and what torch and PEFT say.
NOT_OURS = {
    "UnsupportedModelError",
    "CUDA out of memory",
    "has been modified by an inplace operation",
    "KeyError: 'LOKI'",
    "Your setup doesn't support bf16/gpu",
}


def test_messages_are_those_of_the_package():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    said = "\n".join(_messages())
    titles = re.findall(r"^### (`.*`)$", text, re.M)
    assert len(titles) > 15
    for message in re.findall(r"`(.*?)`", " ".join(titles)):
        assert message in said or message in NOT_OURS


@pytest.mark.parametrize("entry", [*ENTRIES, "why"])
def test_an_error_names_its_entry(entry):
    (note,) = loki_kernels.UnsupportedModelError(f"a model {entry} 1").__notes__
    page, _, anchor = note.rpartition(" ")[2].partition("#")
    title = "unsupportedmodelerror" if entry == "why" else entry.lower().replace(" ", "-")
    assert anchor == re.sub(r"[^\w-]", "", title)
    assert anchor in set(_headings(ROOT / page))


def test_an_error_without_an_entry_names_none():
    assert not hasattr(explained(ValueError("it has another rank or width there")), "__notes__")


def test_every_error_that_has_an_entry_is_raised_with_it():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    titles = set(re.findall(r"^### `(.*)`$", text, re.M))
    assert titles - set(ENTRIES) == {
        "is the model's prediction for", "this CPU has no instructions for products of", *NOT_OURS,
    }  # fmt: skip
    for path in Path(loki_kernels.__file__).parent.rglob("*.py"):
        for code in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(code, ast.FunctionDef):
                continue
            said = "\n".join(s for s in _strings(code) if s != ast.get_docstring(code, clean=False))
            calls = {getattr(n.func, "id", "") for n in ast.walk(code) if isinstance(n, ast.Call)}
            if any(isinstance(n, ast.Raise) for n in ast.walk(code)):
                for entry in ENTRIES:
                    assert entry not in said or calls & {"explained", "UnsupportedModelError"}, said
