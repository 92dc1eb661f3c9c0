#!/usr/bin/env bash
# Decomposes some 70 networks of other packages and checks that the supernets do what the networks
# do: scripts/check_zoo.sh [--help] [--jobs N] [--write docs/networks.md] [PART OF A NAME ...]
#
# Needs this package with its extra: pip install --editable ".[zoo]". Weights are random; nothing is
# downloaded. PYTHON names the interpreter (default: .venv/bin/python where it is, else python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD:$PWD/python:$PWD/tests/zoo${PYTHONPATH:+:$PYTHONPATH}"
# run.py says which of the networks' packages are missing, but cannot start without these.
"$python" -c 'import gross, rich, torchvision' || {
  echo "check_zoo: $python lacks what is named above; pip install --editable \".[zoo]\"" >&2
  exit 1
}
exec "$python" tests/zoo/run.py "$@"
