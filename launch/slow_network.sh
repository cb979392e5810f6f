#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A command, once for each rank, on a slow network of several machines, each a network namespace on this one, with a link
# of a given rate and latency: what such a network does to it, without one. Ranks of one machine meet by loopback. Anything that joins its ranks by environment variables
# runs on it: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME are set.
#
# The namespaces go when the command ends, however it ends. When one rank fails, the others are ended, and the status is
# that of the first. Links limit the rate, and lose nothing.
#
# Usage:    bash launch/slow_network.sh MACHINES RATE [--rtt TIME] -- COMMAND [ARGUMENT...]
#           MACHINES is as in 4, four of one rank each, 2x4, two of four ranks, or 2+3, which are unequal
#           RATE is as in 100mbit, 1gbit, 2.5gbit, or unshaped: as fast as this machine hands packets on; with commas
#           between them one for each machine
#           TIME is what a small packet takes to another machine and back, as in 200us or 1ms (default 0)
#           bash launch/slow_network.sh 2 100mbit -- megatron-comp generate --model DIR --tp 2 --prompt TEXT
#           bash launch/slow_network.sh 2x2 1gbit --rtt 1ms -- megatron-comp calibrate --ranks 4
# Required: root; the commands ip and tc, nsenter and setpriv; the qdisc tbf in the kernel (sch_tbf)
#           the environment that launch/quickstart.sh makes, or SETUP=0
# Latency is a relay's, a process that takes 5 % of a core at 100 Mbit/s and 25 % at 1 Gbit/s, also from the ranks.
# Optional: SETUP            0 takes PYTHON as it is, with this checkout on PYTHONPATH, in place of MEGATRON_COMP_VENV
#           OMP_NUM_THREADS  threads of each rank (default: its share of this machine's processors)
#           and PYTHON, MEGATRON_COMP_VENV, DRY_RUN of launch/env.sh
set -euo pipefail
# shellcheck source=launch/ranks.sh
. "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

choose_python
[[ ${SETUP:-1} != 1 ]] || export PATH=$MEGATRON_COMP_VENV/bin:$PATH
become "$PYTHON" -m megatron_comp.launcher.slow_network "$@"
