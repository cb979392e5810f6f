# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts that run a model on several ranks of one or more machines: what they share, and its defaults.
#
# Optional environment:
#   NPROC_PER_NODE        ranks on each node (default: its GPUs, or 1 where there are none)
#   NNODES                nodes (default: 1; the job's under Slurm)
#   NODE_RANK             which of them this is, from 0 on (needed for several nodes; Slurm's own under Slurm)
#   MASTER_ADDR           address of node 0 (needed for several nodes; asked of Slurm under Slurm)
#   MASTER_PORT           a port that is free there (default: 29500; of the job's number under Slurm)
#   TP                    tensor-parallel ranks; all ranks are, so this only checks (default: NPROC_PER_NODE x NNODES)
#   SETUP                 0 takes PYTHON as it is, with this checkout on PYTHONPATH, in place of MEGATRON_COMP_VENV
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface of the ranks, where the one that they find is wrong
# shellcheck shell=bash
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

gpus() { # how many this machine has, or 1
    local count
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || count=1
    echo "$count"
}

fail() { # MESSAGE: one line, and the status of wrong usage
    echo "launch: $*" >&2
    exit 2
}

# run_model COMMAND OPTIONS...: that command of megatron-comp, for the checkpoint in MODEL, on this node's share of the
# ranks. calibrate needs no checkpoint.
run_model() {
    local command=("${1:-}") name ranks
    case ${1:-} in
    generate | evaluate | search | calibrate) ;;
    bench)
        [[ ${2:-} == ttft ]] || fail "of bench, ttft runs a model"
        command+=(ttft)
        shift
        ;;
    *) fail "the first argument is '${1:-}': it has to be generate, evaluate, search, calibrate or bench ttft" ;;
    esac
    shift
    if [[ ${command[0]} != calibrate ]]; then
        [[ -n ${MODEL:-} ]] || fail "set MODEL to the folder of a checkpoint"
        [[ ${DRY_RUN:-0} == 1 || -f $MODEL/config.json ]] ||
            fail "MODEL=$MODEL: no such folder on $(uname -n), or no config.json in it"
        command+=(--model "$MODEL")
    fi

    NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(gpus)}}
    NNODES=${NNODES:-1}
    for name in NPROC_PER_NODE NNODES; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: a whole number from 1 on is needed"
    done
    ranks=$((NPROC_PER_NODE * NNODES))
    [[ ${TP:-$ranks} == "$ranks" ]] ||
        fail "TP=$TP, but NPROC_PER_NODE=$NPROC_PER_NODE x NNODES=$NNODES are $ranks ranks, and all share the model"

    local nodes=(--standalone --local-addr 127.0.0.1) # this machine's name need not resolve
    if ((NNODES > 1)); then
        NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
        [[ $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $NNODES ]] ||
            fail "NODE_RANK='$NODE_RANK': with NNODES=$NNODES it is 0 to $((NNODES - 1)), another one on each node"
        [[ -n ${MASTER_ADDR:-} ]] || fail "set MASTER_ADDR to the address of the node with NODE_RANK=0"
        nodes=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi

    choose_python
    # torchrun, of that interpreter
    become "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "${nodes[@]}" \
        -m megatron_comp.cli "${command[@]}" --tp "$ranks" "$@"
}

# The environment is not made here: nodes that share it would all write into it.
choose_python() {
    if [[ ${SETUP:-1} == 1 ]]; then
        PYTHON=$MEGATRON_COMP_VENV/bin/python
        [[ -x $PYTHON ]] || fail "no Python environment in $MEGATRON_COMP_VENV: bash launch/quickstart.sh makes it," \
            "or set SETUP=0 and PYTHON"
    else
        export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
    fi
}

# on_every_node SCRIPT ARGUMENTS...: the script as one task on each node of this Slurm job. The first task that fails
# ends them all, and the job with its status.
on_every_node() {
    [[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: sbatch submits this file, bash $1 runs without Slurm"
    if [[ -z ${MASTER_ADDR:-} ]]; then
        local first
        read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        # The address that Slurm itself uses, as a node's name need not resolve.
        MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs may share a node
    NNODES=$SLURM_JOB_NUM_NODES
    export MASTER_ADDR MASTER_PORT NNODES
    unset NODE_RANK # each task's own: SLURM_NODEID
    # srun no longer takes the CPUs of a task over from sbatch.
    become srun --export=ALL --nodes="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash "$@"
}
