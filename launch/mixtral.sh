#!/usr/bin/env bash
# A Mixtral of any size, 8x7B or 8x22B, on one or several machines: as launch/llama.sh, which says how it is used.
#
# Each expert is split over all ranks like the rest of the model, so experts too leave partial sums, which the token
# dispatcher adds up: that sum is compressed like the others, and `sites: {experts: ...}` of a --policy file gives it
# a codec of its own.
#
# Usage:    MODEL=DIR NPROC_PER_NODE=8 bash launch/mixtral.sh generate --prompt TEXT [--codec C] [more options]
#           MODEL=DIR NPROC_PER_NODE=8 bash launch/mixtral.sh evaluate --text FILE [--codec C]... [more options]
# Required: MODEL            folder of a Hugging Face Mixtral checkpoint, on every machine; else as launch/llama.sh
# Optional: as launch/llama.sh
set -euo pipefail
# shellcheck source=launch/ranks.sh
. "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

run_model mixtral "$@"
