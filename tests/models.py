"""What tests of compressed models share: a policy's defaults for small models, and views of a model."""

import torch
from megatron.core.tensor_parallel import RowParallelLinear

import megatron_comp as mc
from megatron_comp.inference.generate import logits

# Of the fixture `llama`
LAYERS, HIDDEN = 4, 96
IDS = torch.arange(2, 24).view(2, 11)  # 22 rows: no multiple of 3


def policy(**words):
    """mxfp4 everywhere, however small the message."""
    return mc.CompressionPolicy(**{"codec": "mxfp4", "min_bytes": 0} | words)


def message_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def all_logits(model):
    return logits(model, IDS, gather=True)


def inside_view(model):
    """What removing compression restores."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "communication": [m.explicit_expert_comm for m in model.modules() if isinstance(m, RowParallelLinear)],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }
