# make test    ruff, mypy and the tests        make bench    how fast it is here, in four minutes
# make docs    the site, into site/            make bench-all    more cases and more seeds
# make sanitize    the tests of csrc under ASan and UBSan
# make release-check    what a release would have, built and tried in fresh environments
# make arm64-check    the wheel for Linux on arm64, built and tested under qemu, on Debian 12
# Each sets up its own virtual environment first; Python >= 3.10, g++ and make are all it needs.

PYTHON ?= python3
VENV ?= .venv
# Without an NVIDIA driver, the torch that continuous integration runs; with one, the newest.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
BIN := $(VENV)/bin
# Two files at a time, none of the long ones last; threads that wait sleep, and do not spin.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# What the oldest Triton may do otherwise: compile, of the slowest to compile for Hopper alone, and
# read Python by its own interpreter.
TRITON36_TESTS := $(wildcard tests/kernels/test_offline_*.py) tests/kernels/test_stacks.py \
	tests/kernels/test_diag.py tests/kernels/test_formats.py tests/kernels/test_lowbit.py \
	tests/kernels/test_packing.py -k "(offline or specification or to_the_bit) and not sm_80 and not \
	(sm_100 and (offline_matrix or offline_rootfree_shampoo))"
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

# What the sanitizers of g++ look for in csrc; without vptr, which asks torch for its types.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
SANITIZED := build/sanitized

.PHONY: test lint bench bench-all docs sanitize release-check arm64-check clean

test:
	$(MAKE) --jobs 2 docs lint $(VENV)/triton36
	$(PYTEST)
	PYTHONPATH=$(VENV)/triton36 $(PYTEST) $(TRITON36_TESTS)

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Ends with one table and where the plots lie. Of uncommitted code: make bench FLAGS=--dirty
bench: $(VENV)/installed
	$(BIN)/python -m bench diag --short $(FLAGS)
	$(BIN)/python -m bench matrix --short --seconds 4 $(FLAGS)
	$(BIN)/python -m bench train --tasks digits --seeds 2 $(FLAGS)
	$(BIN)/python -m bench report --rows bench/out

bench-all: $(VENV)/installed
	$(BIN)/python -m bench diag $(FLAGS)
	$(BIN)/python -m bench matrix $(FLAGS)
	$(BIN)/python -m bench train --tasks digits text --seeds 2 $(FLAGS)
	$(BIN)/python -m bench report --rows bench/out

# Without a network; a warning is an error (mkdocs.yml).
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# AddressSanitizer and UndefinedBehaviorSanitizer over csrc: two to seven minutes, so not in `make test`.
# pytest and not python -m pytest: the sources in this folder would hide what was built.
sanitize: $(VENV)/installed
	CFLAGS="$(SANITIZE) -fno-omit-frame-pointer -g1" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q \
		build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib \
		OMP_WAIT_POLICY=passive $(BIN)/pytest tests/csrc tests/optimizer/test_known_tensors.py

# Of the commit that is checked out, into dist/; shares nothing with $(VENV).
release-check:
	$(PYTHON) tests/helpers/release.py "$(TORCH)"

# Into build/arm64. Of some tests alone: make arm64-check FLAGS=tests/csrc/test_diag.py
arm64-check:
	$(PYTHON) tests/helpers/arm64.py $(FLAGS)

$(VENV)/base:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \"Python >= 3.10 is needed; make PYTHON=python3.x\")"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/base $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,bench,triton,examples,docs]"
	$(BIN)/python -m pip install --quiet --no-deps timm==1.0.31  # its torchvision would bring another torch
	touch $@

# The oldest Triton that is supported, beside the newest in the environment itself.
$(VENV)/triton36: $(VENV)/base
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

clean:
	rm -rf $(VENV) build dist site *.egg-info rootfree_fused/*.so
