# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp plan`: predicted times of a prompt and of decoding, and whether to compress."""

import argparse

from ...predict.hardware import GPUS, WIRES
from ...predict.models import MODELS
from .. import options

CODECS = ("mxfp4", "int4:32:fp16:hadamard", "int5:32:fp16:hadamard", "int8:32:fp16")


DESCRIPTION = """\
Predict time to first token and time per decoded token on GPUs and links, stock and compressed, and say whether to
compress. On several machines, compare tensor parallelism over all of them with one machine and with a pipeline. Needs
no GPU.
"""


RENAMED = {"--tokens": "--prompt-tokens"}


EPILOG = f"""\
models: {", ".join(MODELS)}
GPUs:   {", ".join(GPUS)}
links:  {", ".join(WIRES)} or a rate, as in 100mbit

Example:
  megatron-comp plan --model llama-2-70b --tp 8 --gpu L4 --link pcie4x16
  megatron-comp plan --model llama-3-70b --gpu A100-PCIe --machines 2 --gpus-per-machine 8 --link 100gbit \\
      --inside pcie4x16-p2p

Another GPU: take the nearest in flops and memory rate, or measure there and give --calibration and --compute-ms. The
latter is the stock row of `bench ttft --tp N` less its sums: two per layer, each as long as the all_reduce in
`calibrate --tp N --hidden H --tokens 1 --tokens 1024`.

The model of cost: compute is the larger of flops over 60 % of the GPU's peak and bytes of weights over 80 % of its
memory's rate; a sum takes its bytes over what is reached of the link (NVLink 80 %, a network 90 %, PCIe through the
host's memory 20 %, PCIe from GPU to GPU 60 %: give a rate where your GPUs reach more), and a codec moves its bytes
at half of the memory's rate. The last two are assumptions: nobody has measured them here. --calibration takes link and
codecs from a file of `megatron-comp calibrate` instead. Decoding is that of one token after the prompt, without CUDA
graphs. Quality is not predicted: `megatron-comp evaluate` measures that.

Several machines: --link is the link of one network card, and --cards says how many a machine has, whose load its GPUs
share. The table has stock sums and the best codec of each layout; --json has all rows. MB across: what a machine
receives in a prefill. One request at a time: a pipeline that several requests fill is faster than said here. A pipeline
takes a prompt in chunks, as `generate --pp` does, so that its stages work at the same time. The
formulas are in `megatron_comp/predict/machines.py` and `layouts.py`.

--measured prints the error of every row of `megatron-comp bench ttft --json`; then --compute-ms is the time of an
unshaped run without its sums, unless the file has unshaped rows (`--link unshaped`) itself.
The errors on published measurements: `python -m research.published` in a checkout.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", action=options.Moved, to="python -m research.published")
    options.add_model(parser, "A name below, the folder of a checkpoint, or a config.json.", "MODEL")
    # Not where other subcommands leave --tp and --link: this one starts no ranks.
    add(
        "--tp", dest="ranks", type=int, metavar="N", help="Number of tensor-parallel ranks (with --machines: all GPUs)."
    )
    add("--batch", type=int, default=1, metavar="B", help="Number of prompts (default 1).")
    options.add_prompt_tokens(parser, "Number of tokens in each prompt")
    options.add_dtype(parser, "Data type of weights and sums (default bf16).", "bf16")
    add("--gpu", metavar="NAME", help="The GPU of each rank: a name below.")
    add("--compute-ms", type=float, metavar="MS", help="Measured time of all but the sums, in place of --gpu.")
    add(
        "--link",
        dest="wire",
        metavar="LINK",
        help="The link of each rank, with --machines of each network card: a name below or a rate, such as 10gbit.",
    )
    add(
        "--machines",
        type=int,
        metavar="M",
        help="Number of machines. Give --machines and --gpus-per-machine. If you give neither, plan assumes one link "
        "per GPU.",
    )
    add(
        "--gpus-per-machine",
        type=int,
        metavar="G",
        help="GPUs of each machine (default: --tp over --machines, or 1). With --tp alone, it tells how many machines.",
    )
    add("--inside", metavar="LINK", help="With --machines: the link of each GPU inside its machine, named as --link.")
    add("--cards", type=int, default=1, metavar="K", help="With --machines: network cards per machine (default 1).")
    add("--rtt", default="0", metavar="TIME", help="With --machines: a round trip's time on the wire, such as 1ms.")
    add("--calibration", metavar="FILE", help="Link and codecs as `megatron-comp calibrate` measured them.")
    add(
        "--codec",
        action="append",
        metavar="C",
        help=f"A codec or preset. Repeat it for more rows (default: {' '.join(CODECS)}).",
    )
    add("--policy", metavar="FILE", help="A YAML policy: one more row, by its min_bytes and dropped sums.")
    add(
        "--drop",
        type=float,
        metavar="PERCENT",
        help="Add two rows, alone and beside the best codec, in which this share of the layers, above 0 and up to 100, "
        "leave out attention's sum.",
    )
    add(
        "--measured",
        metavar="FILE",
        help="JSON of `megatron-comp bench ttft`: show the errors of the predictions of its rows instead.",
    )
    options.add_json(parser)
