#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A model, tensor-parallel on one or several machines with compressed communication: the text for a prompt with its
# speed, what codecs do to the model's predictions, and what the link costs. The folder's config.json tells which model.
#
# Usage:    MODEL=DIR NPROC_PER_NODE=8 bash launch/model.sh generate --prompt TEXT [--codec C] [more options]
#           MODEL=DIR NPROC_PER_NODE=8 bash launch/model.sh evaluate --text FILE [--codec C]... [more options]
#           NPROC_PER_NODE=8 bash launch/model.sh calibrate [--codec C]...    # needs no model; search and bench ttft do
#           on several machines the same on each, with NNODES, MASTER_ADDR and its own NODE_RANK
#           all options: megatron-comp generate --help, megatron-comp evaluate --help
# Required: MODEL            folder of a checkpoint that `megatron-comp generate --model` takes, on every machine; the
#                            number of ranks must divide its heads
#           a GPU for each rank that holds its share of the weights; without GPUs the ranks run on CPUs over gloo
#           the environment that launch/quickstart.sh makes, or SETUP=0
# Optional: NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, TP, SETUP, GLOO_SOCKET_IFNAME and
#           NCCL_SOCKET_IFNAME of launch/ranks.sh; PYTHON, MEGATRON_COMP_VENV and DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/ranks.sh
. "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

run_model "$@"
