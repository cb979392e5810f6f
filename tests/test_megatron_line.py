# SPDX-License-Identifier: Apache-2.0
"""Which Megatron-Core the tests run on: what launch/test.sh was told in MEGATRON_CORE, in ranks and scripts too."""

import os
import subprocess
import sys

import megatron.core
from ranks import run_ranks


def version(rank, world_size):
    import megatron.core

    return megatron.core.__version__, megatron.core.__file__


def test_every_process_has_the_megatron_that_was_asked_for():
    here = megatron.core.__version__, megatron.core.__file__
    release = here[0].partition("+")[0]  # 0.19 adds the commit of the checkout that it is imported in
    assert release == os.environ.get("MEGATRON_CORE", release)
    assert run_ranks(version, 1, init=False) == [here]
    # Found, not imported, which would take seconds.
    script = "from importlib.util import find_spec; print(find_spec('megatron.core').origin)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == here[1], done.stderr
