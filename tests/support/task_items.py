# SPDX-License-Identifier: Apache-2.0
"""Multiple choice made up for tests, in the format of BIG-bench's task.json."""

from examples import fetch

ITEMS = [
    ("The capital of France is", ["Paris", "a kind of bread", "the colour green"], 0),
    ("Two and two make", ["four", "seventeen and a half", "yesterday"], 0),
    ("A bird that cannot fly is the", ["swallow", "ostrich", "sparrow"], 1),
    ("To put out a small fire in a pan one should", ["add oil to it", "cover it with a lid", "sing to it"], 1),
    ("Ice is frozen", ["water", "sand", "music"], 0),
    ("He was tired, so he went to", ["bed", "Jupiter", "the ceiling"], 0),
    ("The opposite of hot is", ["spicy", "cold", "yellow"], 1),
    ("A week has as many days as", ["seven", "forty", "none"], 0),
    ("Snow falls mostly in", ["summer", "kitchens", "winter"], 2),
    ("One reads a", ["book", "spoon", "puddle"], 0),
    ("Fish live in", ["trees", "water", "envelopes"], 1),
    ("The sun rises in the", ["east", "west", "fridge"], 0),
]


def task_json():
    examples = [
        {"input": question, "target_scores": {choice: int(place == right) for place, choice in enumerate(choices)}}
        for question, choices, right in ITEMS
    ]
    return {"examples": examples, "canary": "made up"}


def write_tasks(folder):
    """`made_up`, whose items are there, and `lost`, whose items are not."""
    for name in ("made_up", "lost"):
        fetch.write_task(folder, name, fetch.bigbench_items(name, task_json(), "{}"))
    (folder / "lost.jsonl").unlink()
