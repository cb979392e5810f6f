# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness (package lm_eval) on a model under policies, item by item."""

import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..inference.weight_overrides import WeightOverrides
from ..layers.apply import remove_compression, stats
from ..layers.meter import ModelStats
from .journal import Journal, of_first_rank
from .judge import Trial

FEWSHOT_SEED = 1234  # the harness's own default; set again for each setting, so that all see the same examples
BOOTSTRAPS = 100  # of the standard errors that the harness has no formula for


def check_installed() -> None:
    """Raises ValueError without the package."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'megatron-comp[tasks]'")


@dataclass(slots=True)
class TaskRun:
    """One setting's way through the tasks. Of rank 0: on others `results` and `items` are empty."""

    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task: its metrics and their standard errors, under the harness's names such as `acc,none`."""
    items: list[dict] = field(default_factory=list)
    """See `items_of`."""
    traffic: ModelStats = field(default_factory=lambda: ModelStats([]))
    seconds: float = 0.0


class Tasks:
    """Tasks by name, loaded once for all settings: on rank 0, which runs the harness. All ranks make one together.

    include_path: a folder of tasks in YAML, beside those that the package describes. limit: items per task, from the
    start; None: all.

    Raises ValueError, on every rank, for a task that is unknown or whose data are not at hand.
    """

    def __init__(self, names: Sequence[str], include_path: str | None = None, limit: int | None = None) -> None:
        self.limit = limit
        self._loaded: dict = {}
        problem = None
        if dist.get_rank() == 0:
            try:
                self._loaded = _load(list(names), include_path)
            except ValueError as error:
                problem = str(error)
        if problem := of_first_rank(problem):
            raise ValueError(problem)

    def run(
        self,
        model: torch.nn.Module,
        tokenizer,
        trials: Sequence[Trial],
        journal: Journal,
        overrides: WeightOverrides | None = None,
    ) -> Iterator[TaskRun]:
        """One for each trial, in their order. All ranks call this together. journal: see `MegatronCompLM`."""
        from .lm_eval_model import MegatronCompLM

        try:
            for trial in trials:
                if overrides:
                    overrides.use(trial.blocks)
                trial.apply(model)
                harness_model = MegatronCompLM(model, tokenizer, journal, part=trial.key)
                made, start = TaskRun(), time.perf_counter()
                if dist.get_rank() == 0:
                    made.results, made.items = self._evaluate(harness_model)
                    harness_model.release()
                else:
                    harness_model.follow()
                made.traffic, made.seconds = stats(model), time.perf_counter() - start
                yield made
        finally:
            remove_compression(model)
            if overrides:
                overrides.use()

    def _evaluate(self, harness_model) -> tuple[dict[str, dict[str, float]], list[dict]]:
        from lm_eval.evaluator import evaluate

        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        found = evaluate(harness_model, self._loaded, limit=self.limit, bootstrap_iters=BOOTSTRAPS)
        tasks = self._loaded["tasks"].items()
        items = [item for name, task in tasks for item in items_of(name, task, found["samples"][name])]
        counts = {name: {"items": count["effective"]} for name, count in found["n-samples"].items()}
        return {name: counts[name] | found["results"][name] for name in counts}, items


def _load(names: list[str], include_path: str | None) -> dict:
    from lm_eval.tasks import TaskManager

    # Reading the package's own descriptions takes half a minute; a folder may have all that is asked for.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise ValueError(
            f"--tasks {','.join(unknown)}: neither in lm_eval {_version()} nor in a YAML file under --include-path"
        )
    try:
        return manager.load(names)
    except Exception as error:  # of datasets, its download, a task's own code: they share no class
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"--tasks {','.join(names)}: the data cannot be loaded: {said}. Without a network, name a folder of YAML "
            "tasks whose data are local files with --include-path; `python examples/fetch.py tasks DIR` makes one"
        ) from error


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def items_of(name: str, task, samples: list[dict]) -> list[dict]:
    """What the items of a task were given, as lines for `items.write_items`.

    Empty for a task that is not multiple choice, or whose items have several right choices.
    """
    if task.get_config("output_type") != "multiple_choice" or task.multiple_target:
        return []
    made = {}
    for sample in samples:  # one for each of the task's filters, of the same log-probabilities
        choices = task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        log_probs = [log_prob for ((log_prob, _),) in sample["resps"]]
        made[sample["doc_id"]] = {
            "task": name,
            "item": sample["doc_id"],
            "choices": log_probs[: len(choices)],  # behind them may stand those without context
            "lengths": [len(choice) for choice in choices],
            "gold": choices.index(gold) if isinstance(gold, str) else gold,
        }
    return list(made.values())
