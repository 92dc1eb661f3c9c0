# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler and the package index;
# everything else they install.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup demo test lint sanitize headers oldest-headers dry-gpu benchmark docs clean

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

# -g1: lines without variables, whose places take a third of the compiler's time.
SANITIZE := $(CXX) -std=c++17 -Og -g1 -DGROSS_POISON -DGROSS_WIDE -Wno-psabi \
	-fsanitize=address,undefined -fno-sanitize-recover=all -pthread
HEADERS := $(wildcard csrc/*.h csrc/cpu/*.h)
SANITIZED := $(patsubst %.cpp,build/sanitizer/%.o,$(wildcard csrc/cpu/*.cpp tests/native/*.cpp))

# Every header of csrc/cpu parses on its own, for every instruction set.
headers: $(patsubst csrc/cpu/%.h,build/parsed/%,$(wildcard csrc/cpu/*.h))

AVX2 := -DGROSS_ISA=avx2 -DGROSS_VECTOR_BYTES=32 -DGROSS_VECTOR_REGISTERS=16 -mavx2 -mfma
AVX512 := -DGROSS_ISA=avx512 -DGROSS_VECTOR_BYTES=64 -DGROSS_VECTOR_REGISTERS=32 \
	-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma
PORTABLE := -DGROSS_ISA=portable -DGROSS_VECTOR_BYTES=16 -DGROSS_VECTOR_REGISTERS=16

PARSE := $(CXX) -std=c++17 -Wall -Werror -fsyntax-only -I.
# What all headers read before anything of their own, and most of what is to be parsed, once for each
# further instruction set.
FIRST := build/parsed/first.avx2.h.gch build/parsed/first.avx512.h.gch

build/parsed/first.avx2.h.gch: FLAGS := $(AVX2)
build/parsed/first.avx512.h.gch: FLAGS := $(AVX512)
build/parsed/first.%.h.gch: $(HEADERS)
	@mkdir -p $(@D)
	@echo '#include "csrc/cpu/includes.h"' >$(@:.gch=)
	@$(CXX) -std=c++17 -Wall -Werror -I. $(FLAGS) -x c++-header $(@:.gch=) -o $@

ifeq ($(shell uname -m),x86_64)
$(patsubst csrc/cpu/%.h,build/parsed/%,$(wildcard csrc/cpu/*.h)): $(FIRST)
endif

build/parsed/%: csrc/cpu/%.h $(HEADERS)
	@mkdir -p $(@D)
	@echo '#include "$<"' | $(PARSE) $(PORTABLE) -x c++ -
ifeq ($(shell uname -m),x86_64)
	@echo '#include "$<"' | $(PARSE) $(AVX2) -include build/parsed/first.avx2.h -x c++ -
	@echo '#include "$<"' | $(PARSE) $(AVX512) -include build/parsed/first.avx512.h -x c++ -
endif
	@touch $@

build/sanitized: $(SANITIZED)
	$(SANITIZE) $^ -o $@

build/sanitizer/%.o: %.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(SANITIZE) -c $< -o $@

# Every source that includes torch, against the headers of the oldest torch.
oldest-headers: .venv/installed
	PYTHON=$(BIN)/python scripts/check_versions.sh --headers

# The check of GPUs, on a CPU that plays one.
dry-gpu: .venv/test
	PYTHON=$(CURDIR)/$(BIN)/python scripts/check_gpu.sh --dry build/check_gpu

benchmark: .venv/bench
	$(BIN)/python -m pytest benchmarks --benchmark-only

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv build site *.egg-info gross_kernels/*.so
