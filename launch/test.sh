#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole test suite, in the environment and on the model and text that quickstart uses.
#
# Usage:    bash launch/test.sh [pytest arguments, such as tests/wire or -k packing]
# Required: what launch/quickstart.sh requires
# Optional: WORKERS          test processes (default: 2; many tests start ranks of their own)
#           MEGATRON_CORE    another version of Megatron-Core to test on, such as 0.19.2; without arguments
#                            then only the tests in SEAMS below run, those of what differs between versions
#           and PYTHON, MEGATRON_COMP_VENV, MEGATRON_COMP_CACHE, DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
WORKERS=${WORKERS:-2}
# Linears, dispatchers, specs, contexts and engines of Megatron, each where it is compressed; not what codecs compute.
SEAMS=(
    tests/test_megatron_line.py
    tests/test_run.py
    tests/layers/test_apply.py
    tests/layers/test_families.py
    tests/layers/test_inference_experts.py
    tests/layers/test_moe.py
    tests/layers/test_phases.py
    tests/layers/test_pipeline.py
    tests/layers/test_predictor.py
    tests/layers/test_predictor_experts.py
    tests/layers/test_real_transformer_engine.py
    tests/layers/test_row_parallel.py
    tests/layers/test_shared_experts.py
    tests/layers/test_sync_drop.py
    tests/layers/test_sync_drop_places.py
    tests/inference/test_engine.py
    tests/inference/test_model.py
    tests/inference/test_stages.py
)

echo "[1/3] Python environment"
setup_python

echo "[2/3] model and text"
fetch_data # here, so that test processes do not race for it

cd "$REPO"
if [[ -n ${MEGATRON_CORE:-} ]]; then
    echo "      Megatron-Core $MEGATRON_CORE"
    fetch_megatron "$MEGATRON_CORE"
    export MEGATRON_CORE PYTHONPATH=$MEGATRON_PATH${PYTHONPATH:+:$PYTHONPATH}
    (($#)) || set -- "${SEAMS[@]}"
fi

echo "[3/3] tests"
# worksteal keeps neighbouring tests, and so their shared fixtures, in one process until another runs out of work.
# Ranks over gloo on the CPU, the same everywhere; what needs a GPU has the marker `gpu` and its own run.
CUDA_VISIBLE_DEVICES="" run python -m pytest -q -n "$WORKERS" --dist worksteal --durations 10 "$@"
if command -v nvidia-smi >/dev/null; then
    echo "tests on the GPU"
    run python -m pytest -q -m gpu tests
fi
