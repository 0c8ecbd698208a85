# make test    ruff, mypy and the tests        make bench    the benchmarks on this machine
# Each sets up its own virtual environment first; Python >= 3.10, g++ and make are all it needs.

PYTHON ?= python3
VENV ?= .venv
# Without an NVIDIA driver, the torch that continuous integration runs; with one, the newest.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
BIN := $(VENV)/bin
# Two files at a time; the threads of each then sleep while they wait, not spin.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: test bench clean

test: $(VENV)/installed $(VENV)/triton36
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST)
	PYTHONPATH=$(VENV)/triton36 $(PYTEST) $(wildcard tests/test_kernels_*.py tests/test_offline_*.py)

bench: $(VENV)/installed
	$(BIN)/python -m bench diag
	$(BIN)/python -m bench train --seeds 2
	$(BIN)/python -m bench report --rows bench/out

$(VENV)/base:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \"Python >= 3.10 is needed; make PYTHON=python3.x\")"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/base $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,bench,triton]"
	touch $@

# The oldest Triton that is supported, beside the newest in the environment itself.
$(VENV)/triton36: $(VENV)/base
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

clean:
	rm -rf $(VENV) build *.egg-info rootfree_fused/*.so
