"""Where analyses are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from loki_kernels.cache import cache_folder, read_cached


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"LOKI_KERNELS_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/loki_kernels"),
        ({}, "/home/someone/.cache/loki_kernels"),
        ({"LOKI_KERNELS_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/loki_kernels"),
        ({"LOKI_KERNELS_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/someone/.cache/loki_kernels"),
        ({"LOKI_KERNELS_CACHE": "~/own"}, "/home/someone/own"),
        ({"XDG_CACHE_HOME": "~/xdg"}, "/home/someone/xdg/loki_kernels"),
    ],
)
def test_the_folder_of_the_cache(variables, folder, monkeypatch):
    for name in ("LOKI_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path(folder)


@pytest.mark.parametrize("variable", ["LOKI_KERNELS_CACHE", "XDG_CACHE_HOME"])
def test_a_process_without_a_home_has_the_folder_that_is_named(variable, monkeypatch):
    """As in a container that runs under a number of its own."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOKI_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/named")
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder().is_relative_to("/named")


def test_a_file_that_another_user_alone_may_read_is_made_again(tmp_path, caplog):
    def load(_path):
        raise PermissionError("not yours")

    path = tmp_path / "file"
    assert read_cached(path, load) is None
    assert not caplog.text
    path.touch()
    assert read_cached(path, load) is None
    assert "not yours; it is made again" in caplog.text
