"""Files that other programs and people read: they parse, and say what the project says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import loki_kernels

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
YAML = [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_nothing_that_is_read_can_run_code():
    """As SECURITY.md says."""
    files = sorted((ROOT / "loki_kernels").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        text = path.read_text(encoding="utf-8")
        found = re.search(r"torch\.load\(|^\s*(import|from) (pickle|dill|marshal)", text, re.M)
        assert not found, path
        assert "trust_remote_code=True" not in text, path


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_files_of_other_programs_parse(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", sorted(GITHUB.glob("workflows/*.yml")), ids=lambda p: p.name)
def test_workflows_run_what_there_is(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([\w./-]+):", read("Makefile"), re.M)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 240
        for step in job["steps"]:
            if "uses" in step:  # by commit, which nobody can move
                assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            for target in re.findall(r"\bmake ([\w./-]+)", step.get("run", "")):
                assert target in targets
            for test in re.findall(r"\btests/[\w./-]+|\.ci/\w+", step.get("run", "")):
                assert (ROOT / test).exists(), test


def test_the_oldest_versions_are_the_lower_bounds():
    nightly = yaml.safe_load((GITHUB / "workflows" / "nightly.yml").read_text(encoding="utf-8"))
    oldest, newest = nightly["jobs"]["versions"]["strategy"]["matrix"]["include"]
    pins = dict(pin.split("==") for pin in oldest["install"].split())
    bounds = dict(text.split(">=") for text in PROJECT["dependencies"] if ">=" in text)
    bounds["peft"] = PROJECT["optional-dependencies"]["peft"][0].split(">=")[1]
    for package, version in pins.items():
        assert f"{version}.".startswith(f"{bounds[package]}."), package
    assert f"OLD_PEFT := {pins['peft']}\n" in read("Makefile")
    assert PROJECT["requires-python"] == f">={oldest['python']}"
    assert set(newest["install"].split()) == set(pins)


def test_the_changelog_has_this_version():
    assert re.search(
        rf"^## .*\b{re.escape(loki_kernels.__version__)}\b", read("CHANGELOG.md"), re.M
    )


def test_a_wheel_carries_its_licences():
    assert PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    assert "Redistributions in binary form must reproduce" in read("NOTICE")
    shipped = {p.name for p in (ROOT / "loki_kernels" / "data").iterdir()}
    assert all(name in read("docs/licences.md") for name in shipped)


def test_the_paper_is_cited():
    paper = yaml.safe_load(read("CITATION.cff"))["preferred-citation"]
    assert paper["doi"] == "10.1609/aaai.v40i39.40651"
    assert paper["identifiers"][0]["value"] == "arXiv:2505.22120"
