# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp convert`: a distributed checkpoint of Megatron from one of Hugging Face."""

import argparse
import math
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from .. import files
from ..launcher import output, ranks
from ..notices import notice
from . import checks, options

COLUMNS = {
    "tp": ("tensor-parallel ranks that wrote", "d"),
    "dtype": ("of the weights", ""),
    "parameters": ("parameters", ",d"),
    "bytes": ("bytes on disk", ",d"),
    "seconds": ("seconds", ".1f"),
}

# What a model needs beside its weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)


# What Megatron's rule for Llama 3 takes besides a factor.
MEGATRON_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def check(args: argparse.Namespace) -> None:
    checks.check_files(args)
    out = Path(args.out)
    check_empty(out)
    if not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist")
    files.check_free(out)


def check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder")


def start(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs the ranks of this machine. Where they were killed, what they wrote is removed."""
    out = Path(args.out).resolve()
    try:
        return ranks.start(args.tp, [sys.executable, "-m", "megatron_comp.cli", *argv])
    finally:
        with suppress(files.InUse), files.locked(out):  # else it is another command's
            remove(partial_of(out))


def run(args: argparse.Namespace) -> None:
    from ..inference.model import destroy_parallel, init_parallel

    check(args)
    init_parallel(args.tp, args.timeout)
    row = convert(args.model, Path(args.out).resolve(), args.dtype)
    destroy_parallel()
    if output.is_first_rank():
        output.show_one("convert", COLUMNS, row)
        output.write_json(args.json, vars(args), [row])


def convert(model_dir: str, out: Path, dtype_name: str) -> dict:
    """Writes beside `out` and renames at the end, so that nothing half-written ever goes by its name.

    Raises ValueError, on every rank, if `out` is not free.
    """
    with ranks.alone(str(out)):
        check_empty(out)  # another command may have been faster
        return _convert(model_dir, out, dtype_name)


def _convert(model_dir: str, out: Path, dtype_name: str) -> dict:
    from ..inference import checkpoint, hf, model_files
    from ..inference.model import build_model

    began = time.perf_counter()
    config = hf.read_config(model_dir)
    dtype = getattr(torch, options.DTYPES[dtype_name]) if dtype_name != "auto" else config.dtype or torch.float32
    check_space(out, parameter_count(config) * dtype.itemsize)
    partial, first = partial_of(out), output.is_first_rank()
    if first:
        remove(partial)  # of a run that was killed
    model = build_model(model_dir, dtype=dtype)
    torch.distributed.barrier()
    try:
        common = {"checkpoint_version": 3.0, "iteration": 0, "args": megatron_args(model)}
        checkpoint.save(model, partial / model_files.RELEASE, **common)
        if first:
            copy_companions(Path(model_dir), partial)
            (partial / model_files.TRACKER).write_text(model_files.RELEASE)
            os.replace(partial, out)  # onto nothing, or onto an empty folder
        torch.distributed.barrier()
    finally:
        if first:
            remove(partial)
    return {
        "tp": model.config.tensor_model_parallel_size,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameter_count(config),
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "seconds": time.perf_counter() - began,
    }


def partial_of(out: Path) -> Path:
    """Where it is written before it has its name."""
    return out.with_name(f".{out.name}.partial")


def remove(path: Path) -> None:
    """A folder with all in it, or a file; nothing if there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def parameter_count(config) -> int:
    """Of the whole model."""
    from ..inference import shards

    pieces = [piece for pieces in shards.plan(config, shards.WHOLE).values() for piece in pieces]
    return sum(math.prod(stop - start for start, stop in (p.rows, p.columns or (0, 1))) for p in pieces)


def check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ValueError(f"--out {out}: the weights take {needed:,} bytes, free are {free:,}")


def copy_companions(source: Path, target: Path) -> None:
    for pattern in COMPANIONS:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copy(file, target)


def rope_args(rope: dict) -> dict[str, object]:
    """Megatron's words for scaled rotary frequencies: one for positions, one for Llama 3's rule, whose parameters other
    than the factor it fixes.

    Raises ValueError for a rule that they cannot say.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return {"use_rope_scaling": False}
    if kind == "linear":
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": rope["factor"]}
    given = {key: rope.get(key) for key in MEGATRON_ROPE}
    if kind == "llama3" and given == MEGATRON_ROPE:
        return {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise ValueError(f"Megatron has no words for the rope type {kind!r} with {given}; its own has {MEGATRON_ROPE}")


def megatron_args(model) -> argparse.Namespace:
    """The command line of Megatron's training for this model, which its scripts read from a checkpoint.

    Warns of what that command line cannot say.
    """
    config = model.config
    try:
        rope = rope_args(model.hf_config.rope_parameters)
    except ValueError as error:
        notice(f"{error}. The checkpoint's args leave it out: a script that goes by them alone has other frequencies")
        rope = {}
    if config.moe_router_topk == 1 and config.num_moe_experts:
        notice("Megatron's command line weights one expert per token by its share of all, not by 1 as this model does")
    return argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_query_groups < config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        seq_length=model.max_sequence_length,
        max_position_embeddings=model.max_sequence_length,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rotary_percent=1.0,
        **rope,
        normalization=config.normalization,
        norm_epsilon=config.layernorm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        num_experts=config.num_moe_experts,
        moe_router_topk=config.moe_router_topk,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        padded_vocab_size=model.vocab_size,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=1,
    )
