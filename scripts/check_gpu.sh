#!/usr/bin/env bash
# Proves and measures the GPU kernels, CUDA C++ and Triton, on the GPU at hand:
#
#   scripts/check_gpu.sh [--prebuilt] [--dry] [--sanitize] [--triton-cache FILE] OUTPUT_DIR
#
# In this order, each with its share of the time printed as it goes: the libraries (5 s where they
# are built already), correctness (90 s: tests/gpu, CUDA first, Triton apart), then
# benchmarks.gpu: kernels (150 s), layers and networks (60 s), every plan of six layers (60 s),
# Nsight Compute's counters of eight kernels (40 s). A test or an entry that fails is recorded, and
# the rest goes on; one that hangs or loses the device costs its own process alone.
#
# In OUTPUT_DIR: environment.txt, tests.txt, tests_cuda.xml, tests_triton.xml, gpu.json, gpu.md
# (both whole after every entry), gpu.png (where matplotlib is installed). It ends with status 1 if
# anything failed. Needs torch, Triton, pytest, pytest-benchmark, pytest-timeout and pytest-xdist,
# and nvcc; no network.
#
#   --prebuilt           take gross_kernels/gross_cpu.so and gross_cuda.so as they are
#   --triton-cache FILE  what scripts/fill_triton_cache.py wrote: Triton then compiles nothing
#   --sanitize           run a few tests under compute-sanitizer instead, for memory and for races,
#                        and leave sanitizer.txt; where the device refuses it, that file says so
#   --dry                no GPU, nothing measured: the same commands on a CPU that plays one, with
#                        tiny shapes and with every fault that a card may have
#
# PYTHON names the interpreter (default: python3).
set -euo pipefail

fail() {
  echo "check_gpu: $*" >&2
  exit 1
}

usage="usage: scripts/check_gpu.sh [--prebuilt] [--dry] [--sanitize]"
usage+=" [--triton-cache FILE] OUTPUT_DIR"
prebuilt=false dry=false sanitize=false cache=
while [[ "${1-}" == -* ]]; do
  case $1 in
    --prebuilt) prebuilt=true ;;
    --dry) dry=true ;;
    --sanitize) sanitize=true ;;
    --triton-cache)
      [[ -f "${2-}" ]] || fail "--triton-cache: got '${2-}', accepted is a file that is there"
      cache=$(realpath "$2")
      shift
      ;;
    *) fail "$usage" ;;
  esac
  shift
done
[[ $# -eq 1 ]] || fail "$usage"
mkdir -p "$1"
output=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
shared=$PWD/tests
export PYTHONPATH="$PWD:$PWD/python:$shared/definition:$shared/gpu:$shared/cuda_on_host\
:$shared/gross_kernels/triton${PYTHONPATH:+:$PYTHONPATH}"
# With deterministic algorithms torch's matrix products need it.
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1
if $dry; then
  # One thread a process: the shapes are tiny, and the machine may have two cores.
  export CUDA_VISIBLE_DEVICES= GROSS_CHECK_DRY=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi

# Before anything is built: what is missing?
DRY=$dry "$python" - <<'PY' || exit 1
import importlib.util
import os
import sys

needed = ("torch", "triton", "pytest", "pytest_benchmark", "pytest_timeout", "xdist")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"check_gpu: not installed in {sys.executable}: {', '.join(missing)}")
import torch

if os.environ["DRY"] == "false" and not torch.cuda.is_available():
    sys.exit(f"check_gpu: no GPU is available to torch {torch.__version__}")
PY
toolkit=${CUDA_HOME:-/usr/local/cuda}/bin
$dry || command -v nvcc >/dev/null || [[ -x "$toolkit/nvcc" ]] || fail "nvcc is not on the PATH"

begin=$SECONDS
failed=()
# stage NAME SECONDS: says what begins, and how much time it has.
stage() { echo "check_gpu: [$((SECONDS - begin)) s] $1, $2 s"; }

stage libraries 5
if ! $prebuilt && ! $dry; then
  # 9.0a has the instructions for warp groups, 9.0 has not.
  capability=$("$python" -c 'import torch
print("{}.{}".format(*torch.cuda.get_device_capability()))')
  [[ $capability == 9.0 ]] && capability=9.0a
  GROSS_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability \
    "$python" setup.py --quiet build_ext --inplace
fi
"$python" -m gross_kernels.environment | tee "$output/environment.txt"
if ! $dry; then
  "$python" - <<'PY' || exit 1
import sys

import torch

from gross_kernels import ops
from gross_kernels.backends import cuda

if ops.load_error is not None or cuda.load_error is not None:
    sys.exit(f"check_gpu: a library does not load: {ops.load_error or cuda.load_error}")
if not cuda.available():
    sys.exit(f"check_gpu: {cuda.LIBRARY} is missing, or torch is no CUDA build")
capability, built = torch.cuda.get_device_capability(), torch.ops.gross_cuda.build()[2]
if not cuda.runs_on(10 * capability[0] + capability[1], built):
    sys.exit(f"check_gpu: {cuda.LIBRARY} is for {built}, the GPU has {capability}")
if capability == (9, 0) and "9.0a" not in built:
    sys.exit(f"check_gpu: {cuda.LIBRARY} is for {built}; for this GPU it has to be for 9.0a")
PY
fi

if [[ -n "$cache" ]]; then
  "$python" scripts/fill_triton_cache.py --unpack "$cache"
fi

# The other tests' conftest needs packages that a GPU machine may lack. Hanging tests end their
# process: a thread that waits for a kernel cannot be interrupted.
longest=60
# A CPU that plays the card may be a busy one.
if $dry; then longest=300; fi
pytest=("$python" -m pytest --confcutdir=tests/gpu -q -p no:cacheprovider --tb=short
  --timeout="$longest" --timeout-method=thread)

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
  timeout 240 "$sanitizer" --tool memcheck --error-exitcode 9 "${pytest[@]}" --timeout=0 tests/gpu \
    -k "groups or repeated" \
    2>&1 | tee "$output/sanitizer.txt"
  timeout 240 "$sanitizer" --tool racecheck --error-exitcode 9 "${pytest[@]}" --timeout=0 \
    tests/gpu/test_cuda.py -k "test_values and groups" \
    2>&1 | tee -a "$output/sanitizer.txt"
  exit 0
fi

rm -f "$output"/gpu.{json,md,png} "$output"/tests*
# run_tests NAME SECONDS PROCESSES PYTEST_ARGUMENT...: results in tests_NAME.xml.
run_tests() {
  local name=$1 seconds=$2 processes=$3
  shift 3
  stage "tests of $name" "$seconds"
  timeout -k 5 "$seconds" "${pytest[@]}" -n "$processes" "$@" \
    --junitxml="$output/tests_$name.xml" 2>&1 | tee -a "$output/tests.txt" \
    || failed+=("tests of $name")
}

correctness=90 processes=6
if $dry; then correctness=900 processes=1; fi
tests_begin=$SECONDS
run_tests cuda "$correctness" "$processes" tests/gpu -k "not triton"
left=$((correctness - (SECONDS - tests_begin)))
if [[ $left -lt 30 ]]; then left=30; fi
# Where the first kernel is compiled, 140 more will be.
if ! $dry && ! "$python" scripts/fill_triton_cache.py --filled; then processes=8; fi
run_tests triton "$left" "$processes" tests/gpu -k triton

# measure PART SECONDS: adds to gpu.json. Status 3 is a device that was lost or hung: what is left
# goes on in a new process.
measure() {
  local part=$1 seconds=$2 status=3
  if $dry; then seconds=$((4 * seconds)); fi
  local end=$((SECONDS + seconds))
  stage "$part" "$seconds"
  local arguments=("$output" --part "$part")
  if $dry; then arguments+=(--dry); fi
  while [[ $status -eq 3 && $SECONDS -lt $end ]]; do
    status=0
    timeout -k 5 $((end - SECONDS + 10)) "$python" -m benchmarks.gpu "${arguments[@]}" \
      --seconds $((end - SECONDS)) || status=$?
  done
  [[ $status -eq 0 ]] || failed+=("$part (status $status)")
}

measure kernels 150
measure networks 60
measure sweep 60
measure profile 40
if $dry; then measure faults 60; fi

cat "$output/gpu.md" || true
"$python" - "$output/gpu.json" "$dry" <<'PY' || failed+=("entries of gpu.json")
import json
import sys

path, dry = sys.argv[1:]
parts = json.load(open(path, encoding="utf-8"))["parts"]
wrong = [(part, e) for part, entries in parts.items() for e in entries if "error" in e]
if dry == "true":
    # Everything has to be there, and the faults have to be seen; there is no ncu to be found.
    seen = {e.get("fault"): e.get("error", "") for _, e in wrong if "fault" in e}
    expected = {"raises": "no kernel image", "loses the device": "lost", "hangs": "no answer"}
    assert seen.keys() == expected.keys(), seen
    assert all(word in seen[fault] for fault, word in expected.items()), seen
    assert [e for e in parts["faults"] if e == {"fault": "none"}], parts["faults"]
    missing = {"host", "kernels", "networks", "search", "sweep", "profile"} - parts.keys()
    assert not missing, missing
    wrong = [(part, e) for part, e in wrong if part != "faults" and "ncu is not" not in e["error"]]
print(f"check_gpu: {sum(map(len, parts.values()))} entries, {len(wrong)} failed")
sys.exit(bool(wrong))
PY
echo "check_gpu: $((SECONDS - begin)) s, results in $output"
[[ ${#failed[@]} -eq 0 ]] || fail "failed: $(IFS=';'; echo "${failed[*]}")"
