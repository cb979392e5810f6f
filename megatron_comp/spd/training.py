# SPDX-License-Identifier: Apache-2.0
"""Block-to-block distillation: a block without attention's sum learns to give what the stock block gives.

arXiv 2502.20727: teacher and student are the same block of the model, both see the full model's input to it,
only the student's parameters move, and what is minimised is the mean squared difference of their outputs ("mse"). Or
that difference in shares of each token's own mean square ("relative"): every later block normalizes its input, and
without this a few tokens of very large norm are most of the loss. Weights are for one number of ranks: another number
splits heads and neurons otherwise.
"""

import math
import time
from dataclasses import asdict, dataclass

import torch

from ..launcher.progress import progress
from ..layers.predictor_file import Regression
from .block import Block


@dataclass(frozen=True)
class Recipe:
    """All that the result of a block's distillation depends on, besides its weights and the text."""

    ranks: int
    epochs: int = 10
    batch: int = 4
    learning_rate: float = 1e-3
    loss: str = "relative"
    seed: int = 1

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items())


def distill(
    student: Block,
    x: torch.Tensor,
    target: torch.Tensor,
    rope: tuple,
    recipe: Recipe,
    predictor: Regression | None = None,
) -> tuple[list[dict], dict]:
    """Trains `student` in place; a row of the log for each epoch, and a summary.

    x, target `[windows, context, hidden]`: what the full model's block gets and gives. AdamW, whose two moments are the
    only state, and a learning rate that falls to zero as a cosine. Windows are drawn in an order of the seed's.
    predictor: of attention's sum, fixed, whose predictions the student sees in the place of the other ranks' parts.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(recipe.seed + student.number)
    optimizer = torch.optim.AdamW(student.parameters(), recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * math.ceil(len(x) / recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    how = (rope, recipe.ranks, predictor)
    before, log = error(student, x, target, *how), []
    with progress(total=steps, desc=f"block {student.number}", unit="step") as bar:
        for epoch in range(recipe.epochs):
            total = 0.0
            for windows in torch.randperm(len(x), generator=generator).split(recipe.batch):
                optimizer.zero_grad()
                loss = difference(student(x[windows], *how), target[windows], recipe.loss)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(windows) / len(x)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3g}")
            log.append({"block": student.number, "epoch": epoch, "loss": total})
    summary = {
        "block": student.number,
        **{f"{key}_before": value for key, value in before.items()},
        **{f"{key}_after": value for key, value in error(student, x, target, *how).items()},
        "seconds": time.perf_counter() - start,
    }
    return log, summary


def difference(made: torch.Tensor, target: torch.Tensor, loss: str) -> torch.Tensor:
    squares = (made - target).square()
    return squares.mean() if loss == "mse" else (squares.mean(-1) / target.square().mean(-1)).mean()


@torch.no_grad()
def error(
    student: Block,
    x: torch.Tensor,
    target: torch.Tensor,
    rope: tuple,
    ranks: int,
    predictor: Regression | None = None,
) -> dict[str, float]:
    """`mse`: the mean squared difference from the target. `relative`: the median over tokens of its norm to that of
    what the block adds to its input, which a few tokens of very large norm do not decide.

    Raises ValueError if they are not finite.
    """
    squares, relatives = 0.0, []
    for window, wanted in zip(x, target, strict=True):
        difference = student(window[None], rope, ranks, predictor)[0] - wanted
        squares += difference.square().mean().item() / len(x)
        relatives.append(difference.norm(dim=-1) / (wanted - window).norm(dim=-1))
    if not math.isfinite(squares):
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(
            f"block {student.number}: its error is not finite, in {dtype}: weights of it or of a block before it are "
            "damaged, or the learning rate is too large"
        )
    return {"mse": squares, "relative": torch.cat(relatives).median().item()}
