# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler and the package index;
# everything else they install.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup demo test lint sanitize headers benchmark docs clean

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
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/mypy

# The kernels alone, against plain loops, under AddressSanitizer and UndefinedBehaviorSanitizer:
# every instruction set that the processor has, and AVX-512's as the compiler lowers it to any.
sanitize: build/sanitized headers
	./build/sanitized

SANITIZE := $(CXX) -std=c++17 -Og -g -DGROSS_POISON -DGROSS_WIDE -Wno-psabi \
	-fsanitize=address,undefined -fno-sanitize-recover=all -pthread
HEADERS := $(wildcard csrc/*.h csrc/cpu/*.h)
SANITIZED := $(patsubst %.cpp,build/sanitizer/%.o,$(wildcard csrc/cpu/*.cpp tests/native/*.cpp))

# Every header of csrc/cpu parses on its own, for every instruction set.
headers: $(patsubst csrc/cpu/%.h,build/parsed/%,$(wildcard csrc/cpu/*.h))

AVX2 := -DGROSS_ISA=avx2 -DGROSS_VECTOR_BYTES=32 -DGROSS_VECTOR_REGISTERS=16 -mavx2 -mfma
AVX512 := -DGROSS_ISA=avx512 -DGROSS_VECTOR_BYTES=64 -DGROSS_VECTOR_REGISTERS=32 \
	-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma
PORTABLE := -DGROSS_ISA=portable -DGROSS_VECTOR_BYTES=16 -DGROSS_VECTOR_REGISTERS=16

build/parsed/%: csrc/cpu/%.h $(HEADERS)
	@mkdir -p $(@D)
	@echo '#include "$<"' | $(CXX) -std=c++17 -Wall -Werror -fsyntax-only -I. $(PORTABLE) -x c++ -
ifeq ($(shell uname -m),x86_64)
	@echo '#include "$<"' | $(CXX) -std=c++17 -Wall -Werror -fsyntax-only -I. $(AVX2) -x c++ -
	@echo '#include "$<"' | $(CXX) -std=c++17 -Wall -Werror -fsyntax-only -I. $(AVX512) -x c++ -
endif
	@touch $@

build/sanitized: $(SANITIZED)
	$(SANITIZE) $^ -o $@

build/sanitizer/%.o: %.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(SANITIZE) -c $< -o $@

benchmark: .venv/bench
	$(BIN)/python -m pytest benchmarks --benchmark-only

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv build site *.egg-info gross_kernels/*.so
