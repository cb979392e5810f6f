# SPDX-License-Identifier: Apache-2.0
"""One rank of tests/layers/test_modelopt.py: `modelopt_ranks.py PACKAGES OUT`, under torchrun.

A process of its own: ModelOpt registers its classes for Megatron's when it is first imported.
"""

import sys
from pathlib import Path

packages, out = map(Path, sys.argv[1:])
sys.path.append(str(packages))

import torch  # noqa: E402

torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args: None  # ModelOpt's, which are errors without a GPU

import modelopt.torch.opt as mto  # noqa: E402
import modelopt.torch.quantization as mtq  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from stock_gpt import build_model  # noqa: E402

import megatron_comp as mc  # noqa: E402

IDS = torch.arange(2, 34)[None]
POSITIONS, MASK = torch.arange(32)[None], torch.ones(1, 1, 32, 32, dtype=torch.bool).triu(1)
POLICY = mc.CompressionPolicy(codec="int8:32:fp16", min_bytes=0)


def made():
    torch.manual_seed(1)
    return build_model(torch.distributed.get_world_size())


def compressed():
    return mc.apply_compression(made(), POLICY)


def by_hand(model):
    """What compression amounts to here: Megatron's switch for partial sums, and a hook that sums them."""

    def reduce(linear, _inputs, output):
        return mc.all_reduce(output[0], POLICY.codec, linear.tp_group), output[1]

    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.explicit_expert_comm = True
            module.register_forward_hook(reduce)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, POSITIONS, MASK, runtime_gather_output=True)


def quantized(model):
    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, logits)


def seen(model):
    """Names of its quantizers, its logits, and how many sums of one forward were ours."""
    names = sorted(name for name, _ in model.named_modules() if name.endswith("quantizer"))
    before = mc.stats(model).compressed.calls
    return {"quantizers": names, "logits": logits(model), "sums": mc.stats(model).compressed.calls - before}


torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)

stock = quantized(made())
state, weights = mto.modelopt_state(stock), stock.state_dict()
results = {"stock": seen(stock), "keys": sorted(weights)}

before = quantized(compressed())
results["compressed, then quantized"] = seen(before) | {"by hand": logits(quantized(by_hand(made())))}

restored = mto.restore_from_modelopt_state(compressed(), state)
results["missing"] = restored.load_state_dict(weights, strict=False).missing_keys
after = {"by hand": logits(by_hand(quantized(made())))}
results["compressed, then restored"] = seen(restored) | after
results["quantized, then compressed"] = seen(mc.apply_compression(stock, POLICY)) | after
results["compressed keys"] = sorted(stock.state_dict())
results["removed"] = seen(mc.remove_compression(stock))

torch.save(results, out / f"rank{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
