#!/usr/bin/env bash
# What has to be seen on a GPU, in one call of some minutes: versions, the tests that need one, and `bench codec` from
# partial sums that fit a cache to ones that fill memory, with a plain copy as the roofline and what others have.
#
# Usage:    bash launch/gpu_check.sh [more options of megatron-comp bench codec]
# Required: an NVIDIA GPU with some 40 GB free and its driver; what launch/quickstart.sh requires, or with SETUP=0
#           a Python with torch for this GPU, triton, numpy, matplotlib, rich, tqdm, PyYAML, pytest, hypothesis and
#           ml_dtypes; Megatron is not needed, torchao only for its own rows
# Optional: SETUP            0 takes PYTHON as it is, with this checkout on PYTHONPATH: nothing is fetched or installed
#           OUT              folder of the results (default: <cache>/gpu_check)
#           TESTS            what pytest -m gpu runs (default: the files with that marker that need no Megatron)
#           SHAPES, CODECS, RANKS, BACKENDS   lists for the bench; BACKENDS leaves out the reference, which is slow,
#                            but is what all are compared with before they are timed
#           and PYTHON, MEGATRON_COMP_VENV, MEGATRON_COMP_CACHE, DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

SETUP=${SETUP:-1}
OUT=$(realpath -m "${OUT:-$MEGATRON_COMP_CACHE/gpu_check}")
CODECS=${CODECS:-mxfp4 mxfp8 int4:32:fp16 nvfp4 int4:32:fp16:hadamard int5:32:fp16:hadamard flash-int4}
SHAPES=${SHAPES:-1024x4096 8x4096 128x4096 2048x4096 4096x8192 16384x8192} # bf16: 8 MB; 64 KB, 1, 16, 64, 256 MB
RANKS=${RANKS:-2 8}
BACKENDS=${BACKENDS:-triton}
cd "$REPO"
rooms=(tests/wire tests/kernels tests/bench tests/commands/test_bench*.py)
TESTS=${TESTS:-$(grep -rl --include='test_*.py' 'mark\.gpu' "${rooms[@]}" 2>/dev/null)} || : # a room may be empty

if [[ ${DRY_RUN:-0} != 1 ]] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "gpu_check: there is no GPU here: nvidia-smi is missing or lists none" >&2
    exit 1
fi

echo "[1/4] Python environment"
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

{
    echo "[2/4] versions"
    versions

    echo "[3/4] tests"
    # shellcheck disable=SC2086 # a list of files
    run "$PYTHON" -m pytest -q -m gpu $TESTS

    echo "[4/4] megatron-comp bench codec"
    mapfile -t options < <(
        each shape "$SHAPES" && each codec "$CODECS" && each ranks "$RANKS" && each backend "$BACKENDS"
    )
    run "$PYTHON" -m megatron_comp.cli bench codec --device cuda --dtype bf16 "${options[@]}" --peers \
        --json "$OUT/codec.json" --csv "$OUT/codec.csv" --figure "$OUT/codec.svg" "$@"
} 2>&1 | if [[ ${DRY_RUN:-0} == 1 ]]; then cat; else tee "$OUT/log.txt"; fi

echo "Results: $OUT"
