#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What has to be seen on a GPU, in one call of at most eight minutes: versions, the tests that need one, times of
# encode, decode and sum beside a plain copy, times of whole sums of many ranks but for the wire, and the prefill of
# Megatron layers as one of 8 ranks, with the wire replaced by pauses of the predicted length.
#
# Each step runs whatever became of the one before, and ends at its limit. The exit status is the worst of all steps.
#
# Usage:    bash launch/gpu_check.sh [more options of megatron-comp bench codec, such as --peers]
# Required: an NVIDIA GPU with some 40 GB free and its driver; what launch/quickstart.sh requires, or with SETUP=0
#           a Python with torch for this GPU, triton, numpy, matplotlib, rich, tqdm, PyYAML, pytest, pytest-xdist,
#           hypothesis and ml_dtypes. Without Megatron-Core its layers are left out.
# Optional: SETUP            0 takes PYTHON as it is, with this checkout on PYTHONPATH: nothing is fetched or installed
#           OUT              folder of the results (default: <cache>/gpu_check)
#           TESTS            what pytest -m gpu runs (default: the files with that marker that need no Megatron)
#           WORKERS          test processes (default: 12), most of whose time is Triton's compiler
#           SHAPES, CODECS, RANKS, BACKENDS   lists for the bench; BACKENDS leaves out the reference, which is slow,
#                            but is what all are compared with before they are timed
#           LIMITS           seconds that tests, bench, sums and layers may take (default: "190 130 80 70")
#           and PYTHON, MEGATRON_COMP_VENV, MEGATRON_COMP_CACHE, DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

SETUP=${SETUP:-1}
OUT=$(realpath -m "${OUT:-$MEGATRON_COMP_CACHE/gpu_check}")
CODECS=${CODECS:-mxfp4 nvfp4 int4:32:fp16 int4:32:fp16:hadamard}
SHAPES=${SHAPES:-1024x8192 8192x8192} # bf16: 16 MB, 128 MB
RANKS=${RANKS:-2 8}
BACKENDS=${BACKENDS:-triton}
WORKERS=${WORKERS:-12}
read -r tests_limit bench_limit sums_limit layers_limit <<<"${LIMITS:-190 130 80 70}"
cd "$REPO"
rooms=(tests/wire tests/kernels tests/bench tests/commands/test_bench*.py)
TESTS=${TESTS:-$(grep -rl --include='test_*.py' 'mark\.gpu' "${rooms[@]}" 2>/dev/null)} || : # a room may be empty

gpus=$(nvidia-smi -L 2>/dev/null) || gpus=
if [[ ${DRY_RUN:-0} != 1 && $gpus != GPU* ]]; then
    echo "gpu_check: there is no GPU here: nvidia-smi is missing or lists none" >&2
    exit 1
fi

echo "[1/6] Python environment"
if [[ $SETUP == 1 ]]; then
    setup_python
    PYTHON=$MEGATRON_COMP_VENV/bin/python
else
    export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 # a run that is cut short leaves its log
run mkdir -p "$OUT"

versions() {
    run nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    run "$PYTHON" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} sees no CUDA device")
import triton
capability = ".".join(map(str, torch.cuda.get_device_capability()))
print(f"{torch.cuda.get_device_name()}, capability {capability}")
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}")'
}

each() { # OPTION "WORD WORD ...": --OPTION=WORD, a line a word
    local word
    for word in $2; do
        echo "--$1=$word"
    done
}

worst=0
step() { # TITLE SECONDS COMMAND...: the command, ended after so many seconds; its status counts but stops nothing
    local status=0
    echo "$1"
    run timeout --kill-after=10 "$2" "${@:3}" || status=$?
    case $status in
    0) ;;
    124 | 137) echo "gpu_check: ended at its limit of $2 s: ${1#* }" ;;
    *) echo "gpu_check: failed with status $status: ${1#* }" ;;
    esac
    worst=$((status > worst ? status : worst))
}

all_steps() {
    echo "[2/6] versions"
    versions || return # without a GPU for torch nothing else can run

    # shellcheck disable=SC2086 # a list of files
    step "[3/6] tests" "$tests_limit" "$PYTHON" -m pytest -q -m gpu -n "$WORKERS" $TESTS

    mapfile -t options < <(
        each shape "$SHAPES" && each codec "$CODECS" && each tp "$RANKS" && each backend "$BACKENDS"
    )
    step "[4/6] megatron-comp bench codec" "$bench_limit" \
        "$PYTHON" -m megatron_comp.cli bench codec --device cuda --dtype bf16 "${options[@]}" \
        --json "$OUT/codec.json" --csv "$OUT/codec.csv" --figure "$OUT/codec.svg" "$@"

    mapfile -t options < <(each codec "$CODECS")
    step "[5/6] whole sums of 8 ranks without the wire" "$sums_limit" \
        "$PYTHON" tests/kernels/chain.py "${options[@]}" --csv "$OUT/sums.csv"

    step "[6/6] Megatron layers as one of 8 ranks with a wire of pauses" "$layers_limit" \
        "$PYTHON" tests/layers/stack.py --csv "$OUT/layers.csv"
    return "$worst"
}

status=0
all_steps "$@" 2>&1 | if [[ ${DRY_RUN:-0} == 1 ]]; then cat; else tee "$OUT/log.txt"; fi || status=$?
echo "Results: $OUT"
exit "$status"
