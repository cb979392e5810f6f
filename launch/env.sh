# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts here: the defaults, each in one place, and the Python environment.
#
# Optional environment:
#   PYTHON                interpreter that makes the virtual environment, 3.10 or newer (default: python3)
#   MEGATRON_COMP_VENV    virtual environment to use, made when missing (default: <repository>/.venv)
#   MEGATRON_COMP_CACHE   where model, text and results go (default: <repository>/.cache); calibrations too, if it is set
#   DRY_RUN               1 prints the commands instead of running them
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply, for instance to choose a CPU-only build of torch.
# Threads are left as they are: set OMP_NUM_THREADS to change them.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
MEGATRON_COMP_VENV=$(realpath -m "${MEGATRON_COMP_VENV:-$REPO/.venv}")
MEGATRON_COMP_CACHE=$(realpath -m "${MEGATRON_COMP_CACHE:-$REPO/.cache}")
export MEGATRON_COMP_VENV
# MEGATRON_COMP_CACHE is exported only if it came from the environment. Otherwise calibrations and the compiled library go
# to megatron_comp's own default folder, where commands that are started without these scripts find them too.

# run COMMAND...: the command, or only its text under DRY_RUN=1.
run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# become COMMAND...: like run, but in place of this shell, so that a signal for the one reaches the other.
become() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        run "$@"
    else
        exec "$@"
    fi
}

# setup_python: the virtual environment with the pinned packages and this checkout in it, first on PATH.
# A stamp in the environment names what it was made from; while that stays the same nothing is installed.
setup_python() {
    local stamp=$MEGATRON_COMP_VENV/.megatron-comp inputs
    inputs=$(echo "$REPO" && cd "$REPO" && sha256sum launch/requirements.txt pyproject.toml)
    if [[ ! -f $stamp || $(<"$stamp") != "$inputs" ]]; then
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "$PYTHON is missing or older than 3.10; set PYTHON to a newer one" >&2
            return 1
        }
        if ! "$MEGATRON_COMP_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
            run "$PYTHON" -m venv "$MEGATRON_COMP_VENV"
        fi
        local install=("$MEGATRON_COMP_VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
        echo "      installing the pinned packages into $MEGATRON_COMP_VENV (minutes, once)"
        run "${install[@]}" -r "$REPO/launch/requirements.txt"
        run "${install[@]}" --no-deps --no-build-isolation -e "$REPO"
        [[ ${DRY_RUN:-0} == 1 ]] || echo "$inputs" >"$stamp"
    fi
    export PATH=$MEGATRON_COMP_VENV/bin:$PATH
}

# fetch_data: the model and the text that quickstart and tests use, into the cache; sets MODEL and TEXT to them.
fetch_data() {
    MODEL=$MEGATRON_COMP_CACHE/smollm2
    TEXT=$MEGATRON_COMP_CACHE/sotu.txt
    run python "$REPO/examples/fetch.py" model "$MODEL"
    run python "$REPO/examples/fetch.py" text "$TEXT"
}

# fetch_megatron VERSION: another Megatron-Core than the pinned one, into the cache; sets MEGATRON_PATH, for PYTHONPATH.
# Unpacked, not installed: wheels of 0.19 declare Python 3.12, while what is used of them runs on 3.11 too.
fetch_megatron() {
    MEGATRON_PATH=$MEGATRON_COMP_CACHE/megatron-core-$1
    if [[ ! -d $MEGATRON_PATH ]]; then
        local partial=$MEGATRON_PATH.partial
        run rm -rf "$partial"
        run mkdir -p "$partial"
        run python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --python-version 3.12 --dest "$partial/wheel" "megatron-core==$1" || {
            echo "megatron-core==$1 could not be downloaded; pip says why above" >&2
            return 1
        }
        run python -m zipfile -e "$partial"/wheel/megatron_core-*.whl "$partial/unpacked"
        run mv "$partial/unpacked" "$MEGATRON_PATH" # so that half of one is never taken for it
        run rm -rf "$partial"
    fi
}
