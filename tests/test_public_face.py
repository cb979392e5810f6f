# SPDX-License-Identifier: Apache-2.0
"""`import megatron_comp as mc`: its names, and what importing it costs."""

import subprocess
import sys

import pytest

import megatron_comp as mc


@pytest.mark.parametrize("name", mc.__all__)
def test_every_name_is_there(name):
    assert getattr(mc, name) is not None
    assert name in dir(mc)


def test_every_lazy_name_is_public():
    assert set(mc._HOMES) | {"__version__"} == set(mc.__all__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="'megatron_comp' has no attribute 'al_reduce'"):
        mc.al_reduce  # noqa: B018
    with pytest.raises(ImportError, match="apply_compresion"):
        from megatron_comp import apply_compresion  # noqa: F401


def test_codecs_and_policies_do_not_import_megatron():
    uses = "mc.__version__, mc.Codec.parse('mxfp4'), mc.CompressionPolicy(codec='mxfp4')"
    script = (
        f"import sys, megatron_comp as mc; {uses}; print([m for m in sys.modules if m.split('.')[0] == 'megatron'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
