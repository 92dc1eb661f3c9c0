#!/usr/bin/env bash
# Proves and measures the GPU kernels, CUDA C++ and Triton, on the GPU at hand:
# scripts/check_gpu.sh [--sanitize] OUTPUT_DIR
#
# Needs this repository, torch, Triton, nvcc, pytest and pytest-benchmark; no network. Builds for
# this GPU alone, runs the GPU tests, the primitives of the CUDA kernels first, measures, and leaves
# in OUTPUT_DIR: environment.txt, tests.txt, tests.xml, gpu.json, gpu.md, gpu.png (where matplotlib
# is installed), all in at most eight minutes. With --sanitize it runs a few tests under
# compute-sanitizer instead, for memory and for races, and leaves sanitizer.txt; where the device
# refuses it, that file says so.
#
# PYTHON names the interpreter (default: python3).
set -euo pipefail

fail() {
  echo "check_gpu: $*" >&2
  exit 1
}

sanitize=false
if [[ "${1-}" == --sanitize ]]; then
  sanitize=true
  shift
fi
[[ $# -eq 1 && "$1" != -* ]] || fail "usage: scripts/check_gpu.sh [--sanitize] OUTPUT_DIR"
mkdir -p "$1"
output=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"

# Before anything is built: what is missing?
"$python" - <<'EOF' || exit 1
import importlib.util
import sys

needed = ("torch", "triton", "pytest", "pytest_benchmark")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"check_gpu: not installed in {sys.executable}: {', '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit(f"check_gpu: no GPU is available to torch {torch.__version__}")
EOF
toolkit=${CUDA_HOME:-/usr/local/cuda}/bin
command -v nvcc >/dev/null || [[ -x "$toolkit/nvcc" ]] || fail "nvcc is not on the PATH"

# The other tests' conftest needs packages that a GPU machine may lack.
pytest=("$python" -m pytest --confcutdir=tests/gpu -q -p no:cacheprovider)
begin=$SECONDS
# 9.0a has the instructions for warp groups, 9.0 has not.
capability=$("$python" -c 'import torch
print("{}.{}".format(*torch.cuda.get_device_capability()))')
[[ $capability == 9.0 ]] && capability=9.0a
GROSS_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability "$python" setup.py --quiet build_ext --inplace
"$python" -m gross_kernels.environment | tee "$output/environment.txt"

if $sanitize; then
  sanitizer=$(command -v compute-sanitizer || echo "$toolkit/compute-sanitizer")
  if [[ ! -x "$sanitizer" ]]; then
    echo "compute-sanitizer is unavailable: not installed" | tee "$output/sanitizer.txt"
    exit 0
  fi
  probe='import torch; torch.ones(8, device="cuda").sum().item()'
  if ! "$sanitizer" "$python" -c "$probe" >"$output/sanitizer.txt" 2>&1; then
    echo "compute-sanitizer is unavailable: this device refuses it" | tee -a "$output/sanitizer.txt"
    exit 0
  fi
  # Without torch's allocator, which would hide an access beside a tensor but inside its block.
  # racecheck sees shared memory alone, which is where the CUDA kernels exchange everything.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  timeout 240 "$sanitizer" --tool memcheck --error-exitcode 9 "${pytest[@]}" tests/gpu \
    -k "groups or repeated" \
    2>&1 | tee "$output/sanitizer.txt"
  timeout 240 "$sanitizer" --tool racecheck --error-exitcode 9 "${pytest[@]}" \
    tests/gpu/test_cuda.py -k "test_values and groups" \
    2>&1 | tee -a "$output/sanitizer.txt"
  exit 0
fi

tests=0
timeout 240 "${pytest[@]}" tests/gpu/test_{cuda,backends,triton}.py \
  --junitxml="$output/tests.xml" 2>&1 | tee "$output/tests.txt" || tests=$?

# What is left of eight minutes, less half a minute to write it down.
remaining=$((450 - (SECONDS - begin)))
"$python" -m benchmarks.gpu "$output" --seconds "$remaining" || fail "the measurement failed"
echo "check_gpu: $((SECONDS - begin)) s, results in $output"
[[ $tests -eq 0 ]] || fail "tests failed: $output/tests.txt"
