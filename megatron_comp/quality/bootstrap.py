# SPDX-License-Identifier: Apache-2.0
"""95 % confidence intervals by bootstrap: what was measured is drawn again, with replacement, item by item."""

import importlib.util
from collections.abc import Callable

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0  # equal data give equal intervals
BATCH_BYTES = 1 << 22  # stays in a cache

Statistic = Callable[[np.ndarray], np.ndarray]


def check_scipy() -> None:
    """Raises ValueError without it; before hours of work, not after."""
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("intervals need scipy: pip install scipy, or this package with its extra 'cli'")


def intervals(statistic: Statistic, count: int, width: int) -> np.ndarray:
    """Low and high ends of percentile intervals: float64 `[2, figures]`, NaN where there are fewer than two items.

    statistic: maps numbers of items, int64 `[resamples, count]`, to float64 `[figures, resamples]`. All figures see the
    same resamples, and whatever is measured of an item stays together: differences are paired.
    width: float64 values that it makes per item, which bounds how many resamples are made at once.

    Raises ModuleNotFoundError without scipy.
    """
    numbers = np.arange(count)
    if count < 2:
        return np.full((2, len(statistic(numbers[None]))), np.nan)
    from scipy import stats

    found = stats.bootstrap(
        (numbers,),
        lambda chosen, axis: statistic(chosen if chosen.ndim == 2 else chosen[None]),
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_BYTES // (8 * count * width)),
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return np.stack([found.low, found.high])


def means(values: np.ndarray) -> Statistic:
    """The statistic for figures that are means over items, from float64 `[figures, items]`."""
    return lambda chosen: values[:, chosen].mean(-1)


def ends(name: str, low: float, high: float) -> dict[str, float | None]:
    """An interval as two columns of a row, `<name>_low` and `<name>_high`; None where an end is NaN."""
    return {f"{name}_{end}": None if np.isnan(value) else float(value) for end, value in (("low", low), ("high", high))}
