"""What setup.py builds, and how the package explains what it did not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loki_kernels import _native, environment

ROOT = Path(__file__).parents[1]


def without_choices():
    """The environment, without what would change what setup.py builds."""
    return {n: v for n, v in os.environ.items() if not n.startswith("LOKI_KERNELS_")}


def build(tmp_path, *, before="", **variables):
    """Run ``setup.py build_py`` after the statement ``before``; the result, and its report."""
    code = (
        f"import runpy, sys; {before}\n"
        f"sys.argv = ['setup.py', '-q', 'build_py', '--build-lib', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=without_choices() | variables,
        capture_output=True,
        text=True,
    )
    report = tmp_path / "loki_kernels" / "_build.json"
    return run, json.loads(report.read_text()) if report.is_file() else None


@pytest.mark.parametrize(
    ("before", "libraries", "message"),
    [
        ("sys.modules['torch'] = None", {"cuda", "cpp"}, "without sight of torch"),
        ("sys.modules['pybind11'] = None", {"cuda", "cpp"}, "pybind11 was not installed"),
        ("import shutil; shutil.which = lambda *_: None", {"cuda", "cpp"}, "no C++ compiler"),
        (
            "import torch; torch.version.cuda = None",
            {"cuda"},
            "is a build without CUDA; install one with CUDA",
        ),
        (
            "import torch.utils.cpp_extension as e; torch = sys.modules['torch']; "
            "torch.version.cuda = '13.0'; e.CUDA_HOME = None",
            {"cuda"},
            "nvcc was not found",
        ),
    ],
)
def test_what_is_missing_is_left_out_and_said(before, libraries, message, tmp_path):
    run, report = build(tmp_path, before=before)
    assert run.returncode == 0, run.stderr
    assert set(report) == libraries
    assert all(message in reason for reason in report.values())
    assert (tmp_path / "loki_kernels" / "ops" / "count_lowest" / "cuda_impl.py").is_file()


def fake_nvcc(folder, release):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return (
        "import torch.utils.cpp_extension as e; torch = sys.modules['torch']; "
        f"torch.version.cuda = '13.0'; e.CUDA_HOME = {str(folder)!r}"
    )


def test_another_cuda_version_is_left_out(tmp_path):
    run, report = build(tmp_path, before=fake_nvcc(tmp_path / "cuda", "12.4"))
    assert run.returncode == 0, run.stderr
    assert "nvcc 12.4 does not fit torch's CUDA 13.0" in report["cuda"]


def test_skipping_cuda(tmp_path):
    before = fake_nvcc(tmp_path / "cuda", "13.0")
    run, report = build(tmp_path, before=before)
    assert (run.returncode, report) == (0, {})
    older = tmp_path / "loki_kernels" / "_cuda.abi3.so"
    older.write_bytes(b"of an earlier build")
    run, report = build(tmp_path, before=before, LOKI_KERNELS_SKIP_CUDA="1")
    assert run.returncode == 0
    assert not older.exists()
    assert "LOKI_KERNELS_SKIP_CUDA=1 was set" in report["cuda"]


@pytest.mark.parametrize(
    ("available", "wheel", "given", "built_for"),
    [
        (True, True, None, "every"),  # of the machine's own GPU it would be of no use to others
        (True, True, "9.0a", "9.0a"),
        (False, False, "", "every"),  # as a Dockerfile's ARG without a value
    ],
)
def test_architectures(available, wheel, given, built_for, tmp_path):
    before = (
        f"{fake_nvcc(tmp_path / 'cuda', '13.0')}; torch.cuda.is_available = lambda: {available}"
    )
    variables = {"LOKI_KERNELS_WHEEL": "1"} if wheel else {}
    if given is not None:
        variables["TORCH_CUDA_ARCH_LIST"] = given
    run, report = build(tmp_path, before=before, **variables)
    assert run.returncode == 0, run.stderr
    if wheel:
        found = report["build"]["architectures"]
        assert (len(found.split(";")) > 3) == (built_for == "every")
        assert built_for in ("every", found)


def test_forcing_cuda_fails_loudly(tmp_path):
    before = "import torch; torch.version.cuda = None"
    run, _ = build(tmp_path, before=before, LOKI_KERNELS_FORCE_CUDA="1")
    assert run.returncode != 0
    assert "LOKI_KERNELS_FORCE_CUDA=1, but not compiled: torch" in run.stderr


def test_a_wheel_for_all_pythons_holds_its_build_information_in_json(tmp_path, monkeypatch):
    run, report = build(tmp_path, LOKI_KERNELS_WHEEL="1", LOKI_KERNELS_SKIP_CUDA="1")
    assert run.returncode == 0, run.stderr
    assert set(report) == {"cuda", "build"}
    assert report["build"]["torch"] == torch.__version__
    monkeypatch.setattr(_native, "_FOLDER", tmp_path / "loki_kernels")
    monkeypatch.setitem(sys.modules, "loki_kernels._build_info", None)
    assert _native.build_info() == report["build"]
    compiler = report["build"]["compiler"]
    assert environment.environment()["build"].startswith(f"C++ by {compiler} -O3")


def test_a_wheel_where_the_compiler_is_called_otherwise(tmp_path):
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 12.3.4\n")
    compiler.chmod(0o755)
    before = f"import os; os.environ['PATH'] = {str(compiler.parent)!r}; os.environ.pop('CXX', '')"
    run, report = build(tmp_path, before=before, LOKI_KERNELS_WHEEL="1", LOKI_KERNELS_SKIP_CUDA="1")
    assert run.returncode == 0, run.stderr
    assert report["build"]["compiler"] == "12.3.4"


def test_a_wheel_is_not_made_without_compiled_code(tmp_path):
    run, report = build(tmp_path, before="sys.modules['torch'] = None", LOKI_KERNELS_WHEEL="1")
    assert run.returncode != 0
    assert report is None
    assert "LOKI_KERNELS_WHEEL=1, but nothing can be compiled: pip built" in run.stderr


def test_a_library_that_is_not_there_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    why_not = _native.why_not.__wrapped__
    assert "never installed" in why_not("cuda")
    (tmp_path / "_build.json").write_text('{"cuda": "nvcc was not found."}')
    assert why_not("cuda").startswith("not compiled: nvcc was not found. To compile it")
    assert "pip install --no-build-isolation" in why_not("cuda")


def test_a_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    (tmp_path / "_cpp.abi3.so").write_bytes(b"not a library")
    message = _native.why_not.__wrapped__("cpp")
    assert message.startswith(f"_cpp.abi3.so does not load with torch {torch.__version__}: ")
    assert "too short" in message or "invalid ELF" in message  # what the loader said
    assert "pip install --no-build-isolation" in message


def test_environment_tells_how_it_was_built(monkeypatch):
    info = {
        "revision": "abc",
        "torch": "2.11.0",
        "compiler": "12.2.0",
        "flags": "-O3",
        "cuda": "13.0",
        "architectures": "9.0a",
    }
    monkeypatch.setattr(_native, "build_info", lambda: info)
    report = environment.environment()
    assert report["build"] == (
        "CUDA 13.0 for 9.0a, C++ by 12.2.0 -O3, against torch 2.11.0, git abc"
    )
    monkeypatch.setattr(_native, "build_info", lambda: None)
    assert environment.environment()["build"] == "pure Python, nothing is compiled"


def test_code_that_does_not_compile_is_left_out(tmp_path):
    """A copy of the project with a mistake in it: the install goes on and says what failed."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.so", "tests", "demo-output", "site", "__pycache__"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "csrc" / "count_lowest.cpp").write_text("no C++")
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(command, cwd=copy, env=without_choices(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    package = tmp_path / "lib" / "loki_kernels"
    report = json.loads((package / "_build.json").read_text())
    assert report["cpp"].startswith("compiling it failed (")
    assert not list(package.glob("_cpp*"))
    assert (package / "training" / "linear.py").is_file()
