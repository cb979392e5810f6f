# SPDX-License-Identifier: Apache-2.0
"""Items files for tests: written out by hand, or drawn from a seed as a model and the same model with noise."""

import json

import numpy as np

HEADER = {
    "kind": "items",
    "model": "a-model",
    "policy": None,
    "setting": "none",
    "tp": 2,
    "dtype": "float32",
    "versions": {"megatron_comp": "1"},
    "command": "megatron-comp evaluate --tasks a",
}


def item(task, number, choices, gold=0, lengths=None):
    return {"task": task, "item": number, "choices": choices, "lengths": lengths or [10] * len(choices), "gold": gold}


def write_items(path, setting, items, **header):
    lines = [HEADER | {"setting": setting} | header, *items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def drawn_items(noise, tasks=("a", "b"), count=200):
    """Four choices per item; noise: of each log-probability, in nats. The choices without noise are the same ones."""
    model, codec = np.random.default_rng(1), np.random.default_rng(2)
    made = []
    for task in tasks:
        for number in range(count):
            choices = -20 + 3 * model.normal(size=4)
            lengths, gold = model.integers(5, 40, 4).tolist(), int(model.integers(4))
            made.append(item(task, number, (choices + noise * codec.normal(size=4)).tolist(), gold, lengths))
    return made
