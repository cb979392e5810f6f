# SPDX-License-Identifier: Apache-2.0
"""The dtypes that benches take, and what a row's figures hold for."""

import datetime
import platform
import re
import sys
from pathlib import Path

import torch

from ..launcher import output

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def circumstances(device: torch.device) -> dict[str, str | None]:
    """What a row's figures hold for: the columns that CSV files add to it."""
    versions = output.versions()
    named = {name: versions.get(name) for name in ("torch", "triton", "megatron_comp")}
    return {"device": device_name(device), **named, "date": datetime.date.today().isoformat()}


def device_name(device: torch.device) -> str:
    """Of the GPU; of the processor, with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{found[1] if found else platform.machine()}, threads: {torch.get_num_threads()}"
