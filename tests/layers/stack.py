# SPDX-License-Identifier: Apache-2.0
"""Prefill of a stack of Megatron layers as rank 0 of a tensor-parallel group that is not there, on one GPU.

By default layers are as large as those of Llama-3 70B; weights are random. Collectives carry nothing: each is a pause
of the device, as long as a link of the given rate takes for the bytes that the rank would receive, without latency.
Python, launches, matrix products and codecs are real: stock and compressed sums are compared as on such a link.

Usage: python tests/layers/stack.py [--tokens 2048]... [--link 100]... [--codec mxfp4]... [--csv FILE]

Prints the milliseconds until the logits are there, the median of the rounds, and how many of them are pauses. Without a
GPU it runs on the CPU, where a pause takes no time and is only added up.
"""

import argparse
import csv
import importlib.util
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

COLUMNS = ["tokens", "link_gbit", "codec", "algorithm", "ttft_ms", "wire_ms", "speedup"]
SLEEP = 10_000_000  # cycles, to find out how long one is


class Work:
    """A collective that is over for the host: the device has its pause in the stream."""

    def wait(self) -> None:
        pass


class Wire:
    """Stands in for the collectives of torch.distributed. `seconds`: of all pauses so far."""

    def __init__(self, ranks: int, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.bytes_per_second, self.seconds, self.cycles_per_second = 1.0, 0.0, 0.0
        if device.type == "cuda":
            for _ in range(2):  # the first one warms up
                milliseconds = measure_ms(lambda: torch.cuda._sleep(SLEEP), device)
            self.cycles_per_second = SLEEP / milliseconds * 1e3

    def pause(self, nbytes: float) -> Work:
        """As long as the link takes to bring so many bytes."""
        seconds = nbytes / self.bytes_per_second
        self.seconds += seconds
        if self.device.type == "cuda":
            torch.cuda._sleep(int(seconds * self.cycles_per_second))
        return Work()

    def all_reduce(self, x, *_, **__) -> Work:
        return self.pause(2 * x.nbytes * (self.ranks - 1) / self.ranks)  # a ring

    def all_gather(self, out, x, *_, **__) -> Work:
        return self.pause(out.nbytes - x.nbytes)

    def all_to_all(self, out, x, *_, **__) -> Work:
        return self.pause(out.nbytes * (self.ranks - 1) / self.ranks)

    def install(self) -> None:
        """Before wire/exchange.py takes collectives by name."""
        dist.all_reduce = self.all_reduce
        dist.all_gather_single = dist.all_gather_into_tensor = self.all_gather
        dist.all_to_all_single = self.all_to_all


def measure_ms(call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def build(args, device: torch.device) -> torch.nn.Module:
    """Rank 0's part of a GPT with random weights in bf16."""
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_comp.inference import cpu
    from megatron_comp.inference.attention import CausalAttention

    cpu.prepare()
    parallel_state.initialize_model_parallel(args.ranks, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_attention_heads=args.heads,
        num_query_groups=args.ranks,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.ranks,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **cpu.config_options(),
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    model = GPTModel(config, spec, 128 * args.ranks, max(args.tokens), position_embedding_type="rope")
    model.to(device, torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def prefill(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with torch.inference_mode():
        return model(ids, positions, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", action="append", type=int, help="of the prompt (default: 512 and 4096)")
    parser.add_argument("--link", action="append", type=float, help="Gbit/s of each rank (default: 25, 100 and 400)")
    parser.add_argument("--codec", action="append", help="default: mxfp4 and int4:32:fp16:hadamard")
    parser.add_argument("--algorithm", default="two_step", choices=("two_step", "gather_sum"))
    parser.add_argument("--ranks", type=int, default=8, help="of the group that is not there (default: 8)")
    parser.add_argument("--layers", type=int, default=8, help="default: 8")
    parser.add_argument("--hidden", type=int, default=8192, help="default: 8192")
    parser.add_argument("--ffn", type=int, default=28672, help="default: 28672")
    parser.add_argument("--heads", type=int, default=64, help="default: 64")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    args = parser.parse_args()
    args.tokens, args.link = args.tokens or [512, 4096], args.link or [25.0, 100.0, 400.0]
    args.codec = args.codec or ["mxfp4", "int4:32:fp16:hadamard"]
    if importlib.util.find_spec("megatron") is None:
        print("Megatron-Core is not installed: its layers are left out")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
    wire = Wire(args.ranks, device)
    wire.install()
    import megatron_comp as mc

    model, table = build(args, device), []
    print(*(f"{column:>21}" for column in COLUMNS))
    for tokens in args.tokens:
        ids, stock_ms = torch.zeros(1, tokens, dtype=torch.long, device=device), {}
        for codec in ["none", *args.codec]:
            mc.remove_compression(model)
            if codec != "none":
                mc.apply_compression(model, mc.CompressionPolicy(codec=codec, algorithm=args.algorithm, min_bytes=0))
            prefill(model, ids)  # compiles, and makes plans
            for link in args.link:
                wire.bytes_per_second, wire.seconds = link * 1e9 / 8, 0.0
                ms = statistics.median(measure_ms(partial(prefill, model, ids), device) for _ in range(args.rounds))
                stock = stock_ms.setdefault(link, ms)
                wire_ms = wire.seconds / args.rounds * 1e3
                how = "all_reduce" if codec == "none" else args.algorithm
                row = [tokens, link, codec, how, round(ms, 3), round(wire_ms, 3), round(stock / ms, 2)]
                print(*(f"{value!s:>21}" for value in row), flush=True)
                table.append(row)
            if codec != "none" and mc.stats(model).kept.calls:
                sys.exit(f"{codec}: {mc.stats(model).kept.calls} sums were not compressed")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, *table])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
