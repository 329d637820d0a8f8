"""Paired statistics over seeds and items: how large a difference is, how sure that is, and what survives many looks.

The data of a comparison are differences ``d[seed, item]``, one matrix per task: both methods trained from the same
seed and asked the same item. What is estimated is the mean over seeds and items within a task, then over tasks, as it
would be for new seeds and new items.

- The standard error is clustered both ways, by seed and by item (Cameron, Gelbach & Miller 2011, eq. 2.9), with
  Satterthwaite's degrees of freedom, so that five seeds are taken for no more than five.
- The interval is a bootstrap over seeds and items together (Owen 2007). On its own that counts the noise of single
  answers three times and the spread of few seeds too low, so its spread is brought to that of the standard error: the
  resampling gives the interval its shape, the clustered error its width. Simulated coverage is in the tests.
- p comes from the same standard error. An exact sign-flip test over seeds stands beside it; it assumes nothing, but
  with n seeds cannot fall below 2 / 2**n.
- Several comparisons are corrected with Holm's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moa.extras import extra

with extra("bench"):
    from scipy import stats

Matrix = NDArray[np.float64]
LEVEL = 0.95
DRAWS = 4000


class Estimate(NamedTuple):
    """A mean over seeds and items.

    Attributes:
        mean: in the unit of the data.
        interval: its 95 % interval.
        p: two-sided, against a mean of 0.
        p_seeds: exact sign-flip test over the seeds alone.
        by_seed: the mean of every seed.
    """

    mean: float
    interval: tuple[float, float]
    p: float
    p_seeds: float
    by_seed: list[float]


def estimate(tasks: Sequence[Matrix], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean of values (differences between two methods, or one method's scores).

    Args:
        tasks: one matrix (seeds, items) per task; all have the same seeds.
        draws: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: no task, no value, differing numbers of seeds, or a value that is not finite.
    """
    tasks = [np.asarray(task, dtype=float) for task in tasks]
    if not tasks or any(task.ndim != 2 or not task.size for task in tasks):
        raise ValueError("nothing to compare: every task needs a matrix of at least one seed and one item")
    if len({len(task) for task in tasks}) > 1:
        raise ValueError(f"tasks have different numbers of seeds: {[len(task) for task in tasks]}")
    if not all(np.isfinite(task).all() for task in tasks):
        raise ValueError("a value is not a finite number")
    by_seed = np.mean([task.mean(1) for task in tasks], axis=0)
    mean = float(by_seed.mean())
    error, freedom = clustered_error(tasks)
    if error < 1e-12:  # every seed and item alike: nothing varies, or there is but one value of every task
        certain = max(task.size for task in tasks) > 1
        return Estimate(mean, (mean, mean), float(not certain or mean == 0), sign_flip(by_seed), by_seed.tolist())
    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    low, high = _bootstrap(tasks, draws, seed) * reach + mean
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Estimate(mean, (float(low), float(high)), p, sign_flip(by_seed), by_seed.tolist())


def clustered_error(tasks: Sequence[Matrix]) -> tuple[float, float]:
    """Two-way clustered standard error of the mean over tasks, and its degrees of freedom."""
    seeds = len(tasks[0])
    by_seed = np.mean([task.mean(1) for task in tasks], axis=0)
    over_seeds = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    parts = []  # (variance, degrees of freedom) of the terms below
    over_items = both = 0.0
    for task in tasks:
        items = task.shape[1]
        if items < 2:
            continue
        item_part = task.mean(0).var(ddof=1) / items / len(tasks) ** 2
        over_items += item_part
        parts.append((item_part, items - 1))
        if seeds > 1:
            rest = task - task.mean(1, keepdims=True) - task.mean(0, keepdims=True) + task.mean()
            both += float((rest**2).sum()) / ((seeds - 1) * (items - 1) * task.size) / len(tasks) ** 2
    if seeds > 1:
        parts.append((over_seeds, seeds - 1))
    # Both terms hold the noise of single answers, so it is subtracted once; never below what either says alone.
    variance = max(over_seeds + over_items - both, over_seeds, over_items)
    spread = sum(part**2 / freedom for part, freedom in parts)
    return float(np.sqrt(variance)), float(variance**2 / spread) if spread > 0 else 1.0


def _bootstrap(tasks: Sequence[Matrix], draws: int, seed: int) -> NDArray[np.float64]:
    """Lower and upper quantile of the resampled means, less the mean, in units of the normal interval's half width."""
    random = np.random.default_rng(seed)
    seeds = len(tasks[0])
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    means = np.zeros(draws)
    for task in tasks:
        items = task.shape[1]
        chosen = random.integers(items, size=(draws, items))
        means += np.take_along_axis(by_seed @ task, chosen, axis=1).mean(1) / len(tasks)
    quantiles = np.quantile(means - means.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return np.asarray(quantiles / (means.std() * stats.norm.ppf((1 + LEVEL) / 2)))


def sign_flip(by_seed: NDArray[np.float64]) -> float:
    """Two-sided p of an exact sign-flip test of mean 0 (at random beyond 12 values, at a fixed seed)."""
    if len(by_seed) < 2:
        return 1.0
    result = stats.permutation_test(
        (by_seed,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        n_resamples=2**12,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the order given."""
    order = np.argsort(p, kind="stable")
    times = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(times * np.asarray(p, dtype=float)[order]), 1.0)
    return adjusted.tolist()
