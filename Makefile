# Everything a developer types. Needs Python >= 3.10 with venv, g++ and make; the rest goes to .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CONSTRAINED := $(RUN) -m pip install --constraint constraints-dev.txt
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# A developer wants to hear of kernels that do not build. On macOS or Windows: SCA_REQUIRE_NATIVE=0.
export SCA_REQUIRE_NATIVE ?= 1
# The kernels in CUDA C++ take minutes to build, so only a machine with a GPU does that unasked. SCA_CUDA=1: always.
export SCA_CUDA ?= $(if $(wildcard /dev/nvidia0),,0)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format compile-gpu gpu gpu-build gpu-test gpu-bench bench bench-check training-proof report sanitize native kernels clean

help: ## list these targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: native ## train a small SCAM on two portraits and exchange their backgrounds; writes a picture
	$(RUN) demo/run.py

# A test computes on one thread, so as many run at a time as there are cores.
PARALLEL := -n auto --dist worksteal
test: native ## all tests, and the benchmarks at small sizes, where they only check results
	$(RUN) -m pytest tests bench -q $(PARALLEL) -m "not triton and not compiles_gpu"
	TRITON_INTERPRET=1 $(RUN) -m pytest tests -q $(PARALLEL) -m triton

lint: $(VENV)/.installed ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.installed ## rewrite the sources in the project's style
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

compile-gpu: $(VENV)/.installed ## compile the kernels for GPUs, which need not be there, and check what came out
	SCA_CUDA=$(if $(shell command -v nvcc),1,0) $(RUN) setup.py -q build_ext --inplace
	$(RUN) -m pytest tests/test_triton_compiled.py tests/test_cuda_compiled.py -q $(PARALLEL)

# On a machine with a GPU. Nothing is installed or downloaded: $(PYTHON) must have PyTorch, Triton and pytest. A part
# that fails or hangs does not keep the next one from running; a table of what became of each comes last.
gpu: ## on a CUDA machine, with $(PYTHON) as it is: the kernels' tests, then their figures
	$(PYTHON) -m bench.gpu.parts

gpu-build:
	$(PYTHON) -m bench.gpu.parts build

gpu-test:
	$(PYTHON) -m bench.gpu.parts build test $(if $(ONLY),--only $(ONLY))

gpu-bench:
	$(PYTHON) -m bench.gpu.parts build bench

bench: native ## the benchmarks at full size
	$(RUN) -m pytest bench/ --benchmark

bench-check: native ## a few benchmarks again: has anything become slower than committed?
	$(RUN) -m bench.check

training-proof: native ## does training do what SCAM promises? docs/training-proof.md, in half an hour
	$(RUN) -m bench.training_proof

report: $(VENV)/.installed ## docs/performance.md and its pictures, from the results of make bench
	$(RUN) -m bench.performance

# Python itself is built without sanitizers, so their runtimes must be loaded before it starts;
# libstdc++ too, or AddressSanitizer does not find the function that throws C++ exceptions. pytest
# must leave the standard error stream alone: a finding ends the process, and its report with it.
SANITIZED := build/sanitize
SANITIZER_RUNTIMES = $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))
SANITIZER_TESTS ?= tests
sanitize: $(VENV)/.installed ## run the kernels' tests under AddressSanitizer and UBSan
	SCA_CUDA=0 SCA_SANITIZE=address,undefined $(RUN) setup.py -q build_ext \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)
	SCA_NATIVE_PATH=$$(echo $(CURDIR)/$(SANITIZED)/sca_kernels/_native*.so) \
	SCA_CUDA_EMULATION_PATH=$$(echo $(CURDIR)/$(SANITIZED)/native-*/cuda_emulation/_cuda_emulation*.so) \
	LD_PRELOAD="$(SANITIZER_RUNTIMES)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	$(RUN) -m pytest $(SANITIZER_TESTS) -q --capture=sys -p no:faulthandler -p no:cacheprovider \
		-m "not slow_under_sanitizer and not compiled and not subprocess and not compiles_gpu"

native: kernels $(VENV)/.installed

# Does nothing when csrc/ is as it was. It takes no PyTorch: with --jobs=2 that is installed meanwhile.
kernels: $(VENV)/.build-tools
	@$(RUN) setup.py -q build_ext --inplace

$(VENV)/.build-tools: constraints-dev.txt
	@$(PYTHON) -m venv $(VENV) || { echo "error: '$(PYTHON) -m venv' failed: install Python's venv \
	module (often a package named python3-venv) or name another Python: make PYTHON=..." >&2; exit 1; }
	$(CONSTRAINED) "setuptools>=77.0.3" "ninja>=1.11" "pybind11>=2.12"
	@touch $@

# PyTorch goes first and by its exact version, so that nothing else chooses one. The kernels are built elsewhere.
$(VENV)/.installed: pyproject.toml setup.py constraints-dev.txt | $(VENV)/.build-tools
	$(CONSTRAINED) torch
	SCA_CPU=0 SCA_CUDA=0 $(CONSTRAINED) --no-build-isolation --editable ".[dev]"
	@touch $@

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info sca_kernels/_native*.so sca_kernels/_cuda*.so demo/output
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
