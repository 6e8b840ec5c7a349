"""Aggregates of scores over runs and tasks, with bootstrap intervals.

Definitions are those of Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice", and their library rliable.
Scores are one array [runs] per task, each with as many runs as that task has, or a matrix [runs, tasks].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Scores = np.ndarray | Sequence[np.ndarray]
"""[runs, tasks], or one [runs] per task."""
REPLICATIONS, SEED, CONFIDENCE = 2_000, 0, 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic of scores with its interval."""

    value: float
    low: float
    high: float


def iqm(scores: Scores) -> float:
    """Return the interquartile mean: of all runs of all tasks together, the mean without the lowest and the highest quarter.

    Of n scores floor(n / 4) are cut at each end, as in rliable. A task with more runs than another weighs more. NaN where a score is NaN.

    Raises:
        ValueError: no task, or a task without runs.
    """
    values = np.sort(np.concatenate(by_task(scores)))
    cut = len(values) // 4
    # A NaN is sorted to the end, where the cut would hide it.
    return math.nan if np.isnan(values).any() else float(values[cut : len(values) - cut].mean())


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """Return how probably a run of X is better than one of Y, averaged over tasks.

    Per task U / (n m), U the Mann-Whitney statistic: the number of the n m pairs of runs in which X has more, ties counted half.
    NaN where a score is NaN.

    Raises:
        ValueError: X and Y have different numbers of tasks; no task, or a task without runs.
    """
    found = [_wins(ours, theirs) for ours, theirs in zip(by_task(x), by_task(y), strict=True)]
    return math.fsum(found) / len(found)


def stratified_bootstrap(
    statistic: Callable[..., float], *scores: Scores, replications: int = REPLICATIONS, seed: int | np.random.Generator = SEED
) -> Estimate:
    """Return the statistic of the scores with its 95 % percentile interval over stratified replications.

    In each replication the runs of every task are drawn anew with replacement, independently of other tasks and of the other scores. With
    one run per task every replication is the same, and the interval has no width.

    statistic: takes as many scores as are given; the intervals of :func:`probability_of_improvement` need two.
    seed: of the generator, or the generator to draw from.

    Raises:
        ValueError: no task, a task without runs, or fewer than one replication.
    """
    if replications < 1:
        raise ValueError(f"replications: expected at least 1, got {replications}")
    generator = np.random.default_rng(seed)
    tables = [by_task(one) for one in scores]
    found = [statistic(*([_resample(runs, generator) for runs in table] for table in tables)) for _ in range(replications)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, (tail, 1 - tail))
    return Estimate(statistic(*tables), float(low), float(high))


def by_task(scores: Scores) -> list[np.ndarray]:
    """Return one array [runs] per task.

    Raises:
        ValueError: no task, a task without runs, or an array that is no matrix [runs, tasks].
    """
    if isinstance(scores, np.ndarray) and scores.ndim != 2:
        raise ValueError(f"scores: expected a matrix [runs, tasks] or one array [runs] per task, got shape {scores.shape}")
    tasks = [np.asarray(runs, dtype=float) for runs in (scores.T if isinstance(scores, np.ndarray) else scores)]
    if not tasks or any(runs.ndim != 1 or runs.size == 0 for runs in tasks):
        raise ValueError("scores: expected at least one task, and at least one run of every task")
    return tasks


def _resample(runs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return runs[generator.integers(len(runs), size=len(runs))]


def _wins(ours: np.ndarray, theirs: np.ndarray) -> float:
    """U / (n m) of [n] and [m]."""
    if np.isnan(ours).any() or np.isnan(theirs).any():
        return math.nan
    x, y = ours[:, None], theirs[None, :]
    return float(((x > y) + 0.5 * (x == y)).mean())
