# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp plan`: predicted times of a prompt and of decoding, and whether to compress."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..launcher import output
from ..policy import CompressionPolicy
from ..predict import measured
from ..predict.advice import (
    advice,
    best_of,
    best_rows,
    decode_advice,
    how_to_check,
    layouts_advice,
    logits_advice,
    memory_advice,
    predictor_advice,
    recommended,
)
from ..predict.calibrations import calibration_of
from ..predict.hardware import GPUS, WIRES, Shares, gpu_of
from ..predict.layouts import Layout, layouts_of
from ..predict.machines import Machines
from ..predict.models import Model, load
from ..predict.rows import Predictor, Setting, settings_of, with_speedups
from ..predict.times import Job
from ..spd.blocks import dropped_blocks, layers_that_drop
from ..wire.codec import Codec, parse_codec
from ..wire.topology import Islands
from ..wire.traffic import step_codecs
from . import checks, setup
from .arguments.plan import CODECS

COLUMNS = {
    "codec": ("codec", ""),
    "algorithm": ("algorithm", ""),
    "ttft_ms": ("TTFT ms", ".1f"),
    "speedup_vs_none": ("x none", ".2f"),
    "share_of_sums": ("sums", ".0%"),
    "decode_ms": ("decode ms/token", ".1f"),
    "decode_speedup": ("x none", ".2f"),
    "compressed": ("compressed", "d"),
    "kept": ("kept", "d"),
    "dropped": ("dropped", "d"),
}
# Of several machines, where a table has the best rows of every layout.
ACROSS = {
    "layout": ("layout", ""),
    "codec": ("codec", ""),
    "algorithm": ("algorithm", ""),
    "bits_per_value": ("bits", ".2f"),
    "mb_across": ("MB across", ",.0f"),
    "ttft_ms": ("TTFT ms", ".1f"),
    "speedup_vs_none": ("x first", ".2f"),
    "decode_ms": ("decode ms/token", ".1f"),
    "decode_speedup": ("x first", ".2f"),
}


def check(args: argparse.Namespace) -> None:
    checks.check_written(args)
    checks.at_least_one(args, "batch", "prompt_tokens")
    _check_machines(args)
    if args.ranks is None:
        raise ValueError("give --tp, the number of ranks, or --machines and --gpus-per-machine")
    if args.ranks < 1:
        raise ValueError(f"--tp {args.ranks}: at least one is needed")
    if (args.gpu is None) == (args.compute_ms is None) and not (args.measured and args.gpu is None):
        raise ValueError("give --gpu, one of " + ", ".join(GPUS) + ", or --compute-ms, and not both")
    if args.drop is not None and not 0 < args.drop <= 100:
        raise ValueError(f"--drop {args.drop:g}: allowed are percents above 0, up to 100")
    if args.compute_ms is not None and not args.compute_ms > 0:
        raise ValueError(f"--compute-ms {args.compute_ms}: a time above 0 is needed")
    if args.compute_ms is not None and args.calibration is None:
        raise ValueError("--compute-ms needs --calibration, since codecs take time on that machine too")
    if args.wire is None and args.calibration is None:
        raise ValueError("give --link, a name (" + ", ".join(WIRES) + ") or a rate, or --calibration")


def _check_machines(args: argparse.Namespace) -> None:
    """Settles those of ranks, machines and GPUs per machine that follow from the others."""
    checks.at_least_one(args, "cards", *(["gpus_per_machine"] if args.gpus_per_machine is not None else []))
    if args.machines is None and args.gpus_per_machine is not None and args.ranks is not None:
        if args.ranks % args.gpus_per_machine:
            raise ValueError(f"--tp {args.ranks}: does not fill machines of {args.gpus_per_machine} GPUs")
        if args.ranks > args.gpus_per_machine:
            args.machines = args.ranks // args.gpus_per_machine
    if args.machines is None:
        if args.inside or args.rtt != "0" or args.cards > 1 or args.gpus_per_machine and args.ranks is None:
            raise ValueError("--inside, --cards and --rtt describe several machines: give --machines")
        return
    if args.machines < 2:
        raise ValueError(f"--machines {args.machines}: two are needed; for one machine leave it out and give --tp")
    if args.gpus_per_machine is None:
        args.gpus_per_machine = max(1, (args.ranks or 0) // args.machines)
    ranks = args.machines * args.gpus_per_machine
    if args.ranks not in (None, ranks):
        raise ValueError(f"--tp {args.ranks}: {args.machines} machines of {args.gpus_per_machine} have {ranks} ranks")
    args.ranks = ranks
    if args.calibration:
        if args.wire or args.inside or args.rtt != "0" or args.cards > 1:
            raise ValueError(
                "--calibration knows the links between machines: leave out --link, --inside, --cards, --rtt"
            )
    elif args.gpus_per_machine > 1 and args.inside is None:
        raise ValueError(f"give --inside, the link between GPUs of a machine: a name ({', '.join(WIRES)}) or a rate")


def run(args: argparse.Namespace) -> None:
    check(args)
    rows = _plan(args)
    output.write_json(args.json, vars(args), rows)


def _plan(args: argparse.Namespace) -> list[dict]:
    job = Job(load(args.model), args.ranks, args.batch, args.prompt_tokens, _itemsize(args))
    job.model.check_ranks(args.ranks)
    policy = CompressionPolicy.from_file(args.policy) if args.policy else None
    if policy:
        policy.check_layers(job.model.layers)
    predicted = predictor_advice(policy.predictor, job, policy) if policy and policy.predictor else None
    dropped = blocks_to_drop(job.model, args.drop) if args.drop else []
    if job.model.experts and (dropped or policy and dropped_blocks(policy)):
        raise ValueError(f"--model {args.model}: a mixture of experts cannot do without attention's sums")
    names = args.codec or list(CODECS)
    codecs = [codec for name in names for codec in step_codecs(parse_codec(name))] + (policy.codecs() if policy else [])
    machines = _machines(args)
    layouts = _layouts(args, machines, codecs, job)
    gpu = gpu_of(args.gpu) if args.gpu else None
    predict = Predictor(job, gpu, args.compute_ms and args.compute_ms / 1e3, machines)
    if args.measured:
        compute = predict.compute_of(job) if gpu or predict.compute else None
        rows = measured.rows(args.measured, job, compute, layouts[0].calibration, layouts[0].islands)
        output.show(f"plan --measured {args.measured}", measured.COLUMNS, rows)
        return rows
    tried = settings_of(names, layouts[0])
    rows = [predict.row(layouts[0], setting) for setting in tried]
    layers = layers_that_drop(dropped)
    both = [tried[n] for n in dict.fromkeys((0, rows.index(recommended(rows)))) if dropped]
    dropping = [replace(setting, policy=replace(setting.policy, layers=layers)) for setting in both]
    rows += [predict.row(layouts[0], Setting(args.policy, "policy", policy))] if policy else []
    with_drops = [predict.row(layouts[0], setting) for setting in dropping]
    others = [predict.row(layout, setting) for layout in layouts[1:] for setting in settings_of(names, layout)]
    with_speedups([*rows, *with_drops, *others])
    if machines is not None:
        output.say(layouts_advice([*rows, *others]))
    output.say((f"With {layouts[0].name}: " if others else "") + advice(rows, with_drops))
    if gpu is not None and args.ranks > 1:
        output.say(decode_advice(rows))
        output.say(logits_advice(replace(job, phase="decode"), rows[0]["decode_ms"], policy, layouts[0].calibration))
    if predicted:
        output.say(predicted)
    _show(args, rows, with_drops, others)
    if machines is not None:
        output.say(memory_advice(layouts, job, gpu))
        for line in how_to_check(best_of(rows, "ttft_ms"), args.ranks, job.itemsize):
            output.say(line)
    return rows + with_drops + others


def _show(args: argparse.Namespace, rows: list[dict], with_drops: list[dict], others: list[dict]) -> None:
    """others: of other layouts of several machines."""
    where = f"{args.gpu or 'measured compute'}, {args.wire or args.calibration}"
    if args.machines:
        inside = f", {args.inside} inside" if args.inside else ""
        where += f" between {args.machines} machines of {args.gpus_per_machine}{inside}"
    columns = COLUMNS if args.gpu else {name: COLUMNS[name] for name in COLUMNS if not name.startswith("decode")}
    shown = rows
    if others:
        columns, shown = ACROSS | ({"dropped": COLUMNS["dropped"]} if with_drops else {}), best_rows([*rows, *others])
    title = f"plan: {args.model}, TP={args.ranks}, {args.batch}x{args.prompt_tokens} tokens, {where}"
    output.show(title, columns, shown + with_drops)
    if args.machines is None and not args.calibration and args.ranks > 1:
        output.say(
            f"Assumed: each of the {args.ranks} ranks has its own link of {args.wire} to the others. If several are on "
            "one machine and others on another, give --gpus-per-machine."
        )


def _machines(args: argparse.Namespace) -> Machines | None:
    """None for one machine, and where a calibration says what its links take."""
    if args.machines is None or args.calibration:
        return None
    return Machines.of_options(
        args.machines, args.gpus_per_machine, args.wire, args.inside or args.wire, args.cards, args.rtt
    )


def _layouts(args: argparse.Namespace, machines: Machines | None, codecs: Sequence[Codec], job: Job) -> list[Layout]:
    """Tensor parallel over all ranks first; other layouts where the links of each machine are known."""
    if machines is not None:
        return layouts_of(machines, gpu_of(args.gpu), Shares(), codecs, job)
    known = calibration_of(args.calibration, args.gpu, args.wire, codecs, args.ranks, job.itemsize)
    islands = Islands.of_size(args.ranks, args.gpus_per_machine) if args.machines else None
    if islands and islands.have_two_levels and not known.inside:
        raise ValueError(
            f"--calibration {args.calibration}: knows no links inside and across machines; calibrate on the machines"
        )
    return [Layout(f"TP={args.ranks}", args.ranks, known, islands)]


def _itemsize(args: argparse.Namespace) -> int:
    return getattr(torch, setup.dtype_name(args)).itemsize


def blocks_to_drop(model: Model, percent: float) -> list[int]:
    """So much of the blocks, the last ones: which ones makes no difference to the time."""
    count = round(model.layers * percent / 100)
    return list(range(model.layers - count, model.layers))
