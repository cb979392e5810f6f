#!/usr/bin/env bash
# The whole test suite, in the environment and on the model and text that quickstart uses.
#
# Usage:    bash launch/test.sh [pytest arguments, such as tests/wire or -k packing]
# Required: what launch/quickstart.sh requires
# Optional: WORKERS          test processes (default: 2; many tests start ranks of their own)
#           and PYTHON, MEGATRON_COMP_VENV, MEGATRON_COMP_CACHE, DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
WORKERS=${WORKERS:-2}

echo "[1/3] Python environment"
setup_python

echo "[2/3] model and text"
fetch_data # here, so that test processes do not race for it

echo "[3/3] tests"
cd "$REPO"
# worksteal keeps neighbouring tests, and so their shared fixtures, in one process until another runs out of work.
# Ranks over gloo on the CPU, the same everywhere; what needs a GPU has the marker `gpu` and its own run.
CUDA_VISIBLE_DEVICES="" run python -m pytest -q -n "$WORKERS" --dist worksteal --durations 10 "$@"
if command -v nvidia-smi >/dev/null; then
    echo "tests on the GPU"
    run python -m pytest -q -m gpu tests
fi
