# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler and the package index; everything else they install.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cpp csrc/cuda/*.cu csrc/cuda/*.h)

.PHONY: setup demo test lint sanitize benchmark clean

setup: .venv/installed

.venv/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"make: {sys.executable} is Python {sys.version.split()[0]}, 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja "torch>=2.10"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[gross,test]"
	touch $@

demo: setup
	$(BIN)/python examples/resnet18.py
	$(BIN)/python examples/digits.py

# Two processes, each test with one thread. `make test MARKS="not sweep"` adds what compiles longer.
MARKS ?= not build and not sweep
test: setup
	$(BIN)/python -m pytest tests -n 2 --dist worksteal -m "$(MARKS)"

lint: setup
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

benchmark: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf .venv build *.egg-info gross_kernels/*.so
