#!/usr/bin/env bash
# A command, once for each of N ranks, each rank in a network namespace of its own on this machine, with links of a given
# rate between them: what a slow network does to it, without one. Anything that joins its ranks by environment variables
# runs on it: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME are set.
#
# The namespaces go when the command ends, however it ends. When one rank fails, the others are ended, and the status is
# that of the first. Links limit the rate, and add no latency and no loss.
#
# Usage:    bash launch/slow_network.sh N RATE -- COMMAND [ARGUMENT...]
#           RATE is as in 100mbit, 1gbit, 2.5gbit, or unshaped: as fast as this machine hands packets on
#           bash launch/slow_network.sh 2 100mbit -- megatron-comp generate --model DIR --tp 2 --prompt TEXT
# Required: root; the commands ip and tc, nsenter and setpriv; the qdisc tbf in the kernel (sch_tbf)
#           the environment that launch/quickstart.sh makes, or SETUP=0
# Optional: SETUP            0 takes PYTHON as it is, with this checkout on PYTHONPATH, in place of MEGATRON_COMP_VENV
#           OMP_NUM_THREADS  threads of each rank (default: its share of this machine's processors)
#           and PYTHON, MEGATRON_COMP_VENV, DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/ranks.sh
. "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

choose_python
[[ ${SETUP:-1} != 1 ]] || export PATH=$MEGATRON_COMP_VENV/bin:$PATH
become "$PYTHON" -m megatron_comp.launcher.slow_network "$@"
