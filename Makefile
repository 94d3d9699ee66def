# One-word targets; all but gpu-check and clean make their own environment first. Overridable: PYTHON, VENV, VENV_FLAGS, PIP_FLAGS, WORKERS.
# Without network, where the dependencies are installed already: make test VENV_FLAGS=--system-site-packages PIP_FLAGS=--no-deps
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
PIP_FLAGS ?=
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS)
TOOLS := "setuptools>=77" "torch>=2.11" $(foreach tool,cmake ninja,$(if $(shell command -v $(tool)),,$(tool)))
INSTALLED := $(VENV)/.fastib-installed
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/* kernels/common/* kernels/cpu/* kernels/cuda/*)
CPP := $(wildcard csrc/* kernels/common/* kernels/cpu/* kernels/cuda/* tests/cpp/*)

.PHONY: demo test bench lint format sanitize gpu-check clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python -m fastib.train.demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest -q benchmarks --benchmark-only

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The C++ kernels and their tests alone, under AddressSanitizer with UBSan, then under ThreadSanitizer.
sanitize: $(INSTALLED)
	PATH="$$PATH:$(abspath $(BIN))"; for kind in address,undefined thread; do \
	  folder=build/sanitize-$${kind%,*}; \
	  cmake -G Ninja -S . -B $$folder -DFASTIB_SANITIZE=$$kind && \
	  cmake --build $$folder && ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

gpu-check:
	bash benchmarks/gpu_check.sh

clean:
	rm -rf build fastib/*.so fastib/_native_absent.txt *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

# Tools of the build and torch first, so that the package is built against the torch it will run with.
$(INSTALLED): pyproject.toml $(NATIVE) | $(BIN)/python
	$(PIP) $(TOOLS)
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@
