# SPDX-License-Identifier: Apache-2.0
"""A server of the structure of Megatron's text generation server, compressed by `megatron_comp.run`."""

import json
import os
import socket
import sys
from pathlib import Path

import commands
import pytest
from characters import character_llama

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "examples" / "stock_engine.py"
RANKS, NEW = 2, 5
# Ends rank 0 by a signal, as whoever started a server does, once it has answered.
ASKS = """
import json, os, runpy, signal, sys, threading, time, urllib.request

def ask(port):
    body = json.dumps({{"prompts": ["water", "steam"], "tokens_to_generate": {new}}}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{{port}}/api", body, method="PUT")
    while True:
        try:
            print(urllib.request.urlopen(request).read().decode(), flush=True)
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

if os.environ["RANK"] == "0":
    threading.Thread(target=ask, args=[sys.argv[-1]], daemon=True).start()
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory):
    folder = character_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "~"}))  # Megatron pads with it
    return folder


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def test_a_server_answers_and_reports_when_a_signal_ends_it(tied_llama, tmp_path):
    client = tmp_path / "asks.py"
    client.write_text(ASKS.format(new=NEW, script=str(SCRIPT)))
    command = [sys.executable, "-m", "megatron_comp.run", "--codec", "int8:32:fp16", "--min-bytes", "0"]
    command += [client, "--model", tied_llama, "--serve", free_port()]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = commands.run(commands.on_ranks(RANKS, command), environment)
    assert done.returncode != 0, done.stderr  # of the signal
    (answer,) = [json.loads(line)["text"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answer) == 2 and answer[0].startswith("water ") and answer[1].startswith("steam ")
    *_, built, sent = [line for line in done.stderr.splitlines() if line.startswith("megatron_comp: ")]
    assert built.startswith("megatron_comp: GPTModel: 6 of 6 sums have a codec")
    assert sent.startswith(f"megatron_comp: GPTModel: {6 * NEW} sums compressed (gather_sum {6 * NEW})")
