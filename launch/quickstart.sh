#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a bare clone to a real Llama model on real Megatron-Core, its tensor-parallel traffic stock and compressed,
# on this machine, over gloo: generated text of both, time to first token, bytes, and a table of quality by codec.
#
# Usage:    bash launch/quickstart.sh
# Required: Linux, Python 3.10 or newer with venv, a C++ compiler; a network on the first run only
# Optional: CODEC            codec of the compressed generation (default: int4:32:fp16:hadamard)
#           TP               ranks; must divide the model's 9 heads and 3 key/value heads (default: 3)
#           PROMPT           what to continue
#           MAX_NEW_TOKENS   how far (default: 32)
#           TOKENS, CONTEXT  how much text the table is measured on, and in windows of how many tokens
#           and PYTHON, MEGATRON_COMP_VENV, MEGATRON_COMP_CACHE, DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

CODEC=${CODEC:-int4:32:fp16:hadamard}
TP=${TP:-3}
PROMPT=${PROMPT:-"Tensor parallelism splits every layer of a model over several devices, and after each attention and \
each MLP the devices add up their partial sums. Where the link between the devices is slow, most of the time goes \
into that sum. In short, the way to make it faster is"}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-32}
TOKENS=${TOKENS:-1536}
CONTEXT=${CONTEXT:-512}
CODECS=(int8:32:fp16 mxfp8 nvfp4 mxfp4 int4:32:fp16 int4:32:fp16:hadamard) # evaluate adds the row "none" itself
export CUDA_VISIBLE_DEVICES="" # ranks over gloo on the CPU, also where there are GPUs, but fewer than ranks
RESULTS=$MEGATRON_COMP_CACHE/quickstart

generate() { # CODEC FILE
    run megatron-comp generate --model "$MODEL" --tp "$TP" --prompt "$PROMPT" --new-tokens "$MAX_NEW_TOKENS" \
        --codec "$1" --json "$RESULTS/$2"
}

echo "[1/5] Python environment"
setup_python

echo "[2/5] model and text"
run mkdir -p "$RESULTS"
fetch_data

echo "[3/5] generate, stock communication"
generate none generate-none.json

echo "[4/5] generate, communication in $CODEC"
generate "$CODEC" generate-compressed.json

echo "[5/5] quality by codec, on $TOKENS tokens of prose"
run megatron-comp evaluate --model "$MODEL" --tp "$TP" --text "$TEXT" --tokens "$TOKENS" --context "$CONTEXT" \
    --algorithm gather_sum "${CODECS[@]/#/--codec=}" --json "$RESULTS/evaluate.json"

cat <<END

What these figures show: the bytes that each rank received, and what each codec costs the model's predictions.
What they cannot show: a gain in time. All ranks share this machine, where sending costs next to nothing, so compression
only adds work; it pays on slow links. The same figures as JSON: $RESULTS

Next, in $REPO:
END
next() { # COMMAND...: a line to copy
    local word line=
    for word in "$@"; do
        word=${word#"$REPO"/}
        [[ $word =~ ^[A-Za-z0-9_./:=-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "   $line"
}
next source "$MEGATRON_COMP_VENV/bin/activate"
next megatron-comp evaluate --model "$MODEL" --tp "$TP" --text "$TEXT" --tokens 1024 \
    --policy "$REPO/examples/policies/smollm2-tp3-gather.yaml"
next megatron-comp plan --model llama-2-70b --tp 8 --gpu L4 --link pcie4x16
if [[ $EUID == 0 ]] && type ip tc >/dev/null 2>&1 && unshare --net true 2>/dev/null; then # what links of a given rate need
    next megatron-comp bench ttft --model "$MODEL" --tp "$TP" --codec "$CODEC" --link 100mbit --runs 3
else
    next megatron-comp generate --model "$MODEL" --tp "$TP" --prompt "The three branches of the government are" --codec "$CODEC"
fi
