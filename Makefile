# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler and the package index;
# everything else they install.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup demo test lint sanitize benchmark docs clean

setup: .venv/installed

# Without build isolation: the kernels are built against the torch that they will run with.
.venv/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; got = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) \
	  and f"make: got Python {got}, accepted is 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja "torch>=2.10"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

# What an extra names, beside the package that is installed already.
.venv/demo .venv/test .venv/dev .venv/bench: .venv/%: .venv/installed
	$(BIN)/python -m pip install --quiet "gross-kernels[$*]"
	touch $@

demo: .venv/demo
	$(BIN)/python examples/resnet18.py
	$(BIN)/python examples/digits.py

# Two processes, each test with one thread. `make test MARKS="not sweep"` adds what compiles longer.
MARKS ?= not build and not sweep
test: .venv/test
	$(BIN)/python -m pytest tests -n 2 --dist worksteal -m "$(MARKS)"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernels alone, against plain loops, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: build/sanitized
	for isa in portable avx2 avx512 avx512bf16; do GROSS_KERNELS_ISA=$$isa ./build/sanitized || exit 1; done

SANITIZE := $(CXX) -std=c++17 -Og -g -DGROSS_POISON -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
SANITIZED := $(patsubst csrc/cpu/%.cpp,build/sanitizer/%.o,$(wildcard csrc/cpu/*.cpp)) build/sanitizer/test.o

build/sanitized: $(SANITIZED)
	$(SANITIZE) $^ -o $@

build/sanitizer/%.o: csrc/cpu/%.cpp $(wildcard csrc/*.h csrc/cpu/*.h)
	@mkdir -p $(@D)
	$(SANITIZE) -c $< -o $@

build/sanitizer/test.o: tests/native/kernels.cpp $(wildcard csrc/*.h csrc/cpu/*.h)
	@mkdir -p $(@D)
	$(SANITIZE) -c $< -o $@

benchmark: .venv/bench
	$(BIN)/python -m pytest benchmarks --benchmark-only

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv build site *.egg-info gross_kernels/*.so
