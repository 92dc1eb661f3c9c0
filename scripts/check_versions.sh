#!/usr/bin/env bash
# Holds the package to the versions that pyproject.toml promises:
# scripts/check_versions.sh [--headers] [oldest] [newest]
#
#   --headers  compiles every source that includes torch's headers against those of the oldest
#              torch: 80 MB of download, seconds
#   oldest     in a fresh environment with the oldest torch and Triton (the last releases of their
#              minor versions): builds the CPU kernels, compiles each Triton kernel once, and runs
#              the tests of the kernels, Triton's in its interpreter
#   newest     the same with the newest torch and Triton on the package index
#
# Without arguments all three, and then the oldest torch with the library that was built for the
# newest: setup.py promises that one build serves all. Environments and copies of the sources are
# in build/versions, 6 GB each, and go when everything has passed. The CUDA kernels meet the oldest
# torch in their headers alone. Needs git, a C++ compiler and the package index; PYTHON names the
# interpreter (default: python3).
set -euo pipefail

fail() {
  echo "check_versions: $*" >&2
  exit 1
}

[[ $# -gt 0 ]] || set -- --headers oldest newest
for name in "$@"; do
  [[ "$name" =~ ^(--headers|oldest|newest)$ ]] ||
    fail "got $name, accepted are --headers, oldest and newest"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}") || fail "PYTHON: ${PYTHON:-python3} is not there"
folder=$PWD/build/versions
mkdir -p "$folder"

# "2.10" for torch, from "torch>=2.10" among the package's dependencies.
oldest_of() {
  "$python" - "$1" <<'EOF'
import re
import sys
import tomllib

dependencies = " ".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])
print(re.search(rf"\b{sys.argv[1]}>=([\d.]+)", dependencies)[1])
EOF
}
torch=$(oldest_of torch)
triton=$(oldest_of triton)

# The headers are the same in all wheels of a release, but for CUDA's and Metal's own, which nothing
# here includes; the one for macOS is a tenth of the others' size.
fetch_headers() {
  local wheels=$folder/wheels
  [[ -d $folder/torch-$torch/include ]] && return
  rm -rf "$wheels"
  "$python" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.11 \
    --platform macosx_11_0_arm64 --dest "$wheels" "torch==$torch.*"
  "$python" - "$wheels" "$folder/torch-$torch.partial" <<'EOF'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("torch-*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if name.startswith("torch/include/")]
    archive.extractall(sys.argv[2], names)
EOF
  mv "$folder/torch-$torch.partial/torch" "$folder/torch-$torch"
  rm -r "$wheels" "$folder/torch-$torch.partial"
}

check_headers() {
  fetch_headers
  local include=$folder/torch-$torch/include compile sources=() toolkit
  compile=("${CXX:-c++}" -std=c++17 -fsyntax-only -fvisibility=hidden -Wall -Werror
    -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000 '-DGROSS_BUILD_FLAGS=""'
    -isystem "$include" -isystem "$include/torch/csrc/api/include")
  toolkit=${CUDA_HOME:-/usr/local/cuda}/include
  # What a source reads, by itself or through other headers; those that are not found count, too.
  local read
  while read -r source; do
    read=$("${CXX:-c++}" -std=c++17 -M -MG -x c++ "$source")
    if [[ $read == *torch/* ]]; then sources+=("$source"); fi
  done < <(find csrc -name '*.cpp' -o -name '*.cu' | sort)
  ((${#sources[@]} >= 2)) || fail "the sources that include torch are not found: ${sources[*]}"
  for source in "${sources[@]}"; do
    echo "check_versions: $source against the headers of torch $torch"
    if [[ $source == csrc/cuda/* ]]; then
      "${compile[@]}" -DGROSS_ON_HOST -Itests/cuda_on_host "$source"
      if [[ -f $toolkit/cuda_runtime_api.h ]]; then
        "${compile[@]}" -DUSE_CUDA '-DGROSS_CUDA_ARCHITECTURES=""' -isystem "$toolkit" "$source"
      else
        echo "check_versions: no CUDA toolkit in CUDA_HOME or /usr/local/cuda: for the host alone"
      fi
    else
      "${compile[@]}" "$source"
    fi
  done
}

# An environment and a copy of the working tree, so that nothing is built in place.
# prepare NAME TORCH TRITON: in $folder/NAME.
prepare() {
  local here=$folder/$1
  rm -rf "$here"
  mkdir -p "$here/source"
  git ls-files -z --cached --others --exclude-standard |
    tar --create --null --files-from=- --ignore-failed-read |
    tar --extract --directory "$here/source"
  "$python" -m venv "$here/environment"
  local pip=("$here/environment/bin/python" -m pip install --quiet)
  "${pip[@]}" "$2" "setuptools>=77" ninja numpy pytest pytest-xdist hypothesis expecttest
  # Torch asks for one version of Triton, its own; others work as well.
  "${pip[@]}" --no-deps --upgrade "$3"
  "$here/environment/bin/python" -c 'import torch, triton
print("check_versions: torch", torch.__version__, "and Triton", triton.__version__)'
}

# run_tests NAME TESTS...
run_tests() {
  local here=$folder/$1
  (cd "$here/source" && PYTHONPATH=$PWD "$here/environment/bin/python" -m pytest "${@:2}" \
    -n 2 --dist worksteal)
}

check() {
  prepare "$@"
  (cd "$folder/$1/source" &&
    GROSS_KERNELS_CUDA=0 "$folder/$1/environment/bin/python" setup.py --quiet build_ext --inplace)
  run_tests "$1" tests/gross_kernels --ignore tests/gross_kernels/cuda
}

for name in "$@"; do
  case $name in
    --headers) check_headers ;;
    oldest) check oldest "torch==$torch.*" "triton==$triton.*" ;;
    newest) check newest "torch>=$torch" "triton>=$triton" ;;
  esac
done

library=source/gross_kernels/gross_cpu.so
if [[ " $* " == *" oldest "* && " $* " == *" newest "* ]]; then
  echo "check_versions: the newest torch's library in the oldest"
  cp "$folder/newest/$library" "$folder/oldest/$library"
  run_tests oldest tests/gross_kernels/test_operator.py
fi
for name in "$@"; do
  rm -rf "${folder:?}/$name"
done
echo "check_versions: passed: $*"
