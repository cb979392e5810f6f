# SPDX-License-Identifier: Apache-2.0
"""One rank of tests/layers/test_real_transformer_engine.py: `te_ranks.py WHEEL MODEL OUT`, under torchrun.

A process of its own, since Megatron looks for Transformer Engine when it is first imported.
"""

import sys
import types
from itertools import product
from pathlib import Path

import real_te

wheel, folder, out = map(Path, sys.argv[1:])
own_collectives = real_te.prepare(wheel)

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.extensions.transformer_engine import TERowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.inference_layers import InferenceRowParallelLinear  # noqa: E402
from models import all_logits, policy  # noqa: E402

import megatron_comp as mc  # noqa: E402
from megatron_comp.inference.model import build_model, init_parallel  # noqa: E402

# The class, whether ranks are sequence-parallel, whether linears have biases, and the policy.
CASES = [
    (cls, parallel, bias, codec)
    for cls, parallel, bias in [
        *product([TERowParallelLinear], [False, True], [False, True]),
        (InferenceRowParallelLinear, True, False),
    ]
    for codec in ("mxfp4", "int8:32:fp16")
]


def with_transformer_engine(model, cls, bias):
    """`model` with every row-parallel linear replaced by one of Transformer Engine with the same weights."""
    for layer in model.decoder.layers:
        for part, name, buffer in ((layer.self_attention, "linear_proj", "proj"), (layer.mlp, "linear_fc2", "fc2")):
            local = getattr(part, name)
            linear = cls(
                local.input_size,
                local.output_size,
                config=local.config,
                init_method=local.config.init_method,
                bias=bias,
                input_is_parallel=True,
                skip_bias_add=True,
                is_expert=False,
                tp_comm_buffer_name=buffer,
                tp_group=local.tp_group,
            )
            with torch.no_grad():
                linear.weight.copy_(local.weight)
                if bias:
                    linear.bias.copy_(torch.linspace(-1, 1, len(linear.bias)))
            setattr(part, name, linear.eval())
    return model


def seen(model):
    """Logits of one forward, and what Transformer Engine reduced by itself in it."""
    own_collectives.clear()
    return all_logits(model), list(own_collectives)


def inside(model, cls):
    """What removing compression restores in each linear."""
    linears = [module for module in model.modules() if isinstance(module, cls)]
    return [(type(each).__name__, each.parallel_mode, sorted(each.__dict__)) for each in linears]


def run(cls, sequence_parallel, bias, codec):
    model = with_transformer_engine(build_model(folder, sequence_parallel=sequence_parallel), cls, bias)
    found = {"stock": seen(model), "stock inside": inside(model, cls)}
    mc.apply_compression(model, policy(codec=codec))
    found["compressed"], stats = seen(model), mc.stats(model)
    found["calls"] = {"compressed": stats.compressed.calls, "uncompressed": stats.kept.calls}
    found["received_bytes"] = stats.received_bytes
    mc.apply_compression(model, policy(codec=codec, min_bytes=2**40))
    found["small"] = seen(model)
    found["small calls"] = mc.stats(model).kept.calls
    mc.remove_compression(model)
    found["removed"] = seen(model)
    found["removed inside"] = inside(model, cls)
    if not bias:
        local = build_model(folder, sequence_parallel=sequence_parallel)
        found["local stock"] = all_logits(local)
        mc.apply_compression(local, policy(codec=codec))
        found["local compressed"] = all_logits(local)
        found["local received_bytes"] = mc.stats(local).received_bytes
    return found


init_parallel(2)
# A buffer of Megatron 0.16 for GPUs on one NVLink switch. Here it is empty.
parallel_state._GLOBAL_SYMMETRIC_MEMORY_BUFFER = types.SimpleNamespace(
    maybe_get_tensor=lambda shape, dtype: {"tensor": None, "handle": None}
)
results = {
    (cls.__name__, parallel, bias, codec): run(cls, parallel, bias, codec) for cls, parallel, bias, codec in CASES
}
torch.save(results, out / f"rank{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
