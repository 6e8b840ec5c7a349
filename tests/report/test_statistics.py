"""Aggregates have closed forms for small cases, and are those of scipy and rliable."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from worldmpc.report.statistics import Estimate, by_task, iqm, probability_of_improvement, stratified_bootstrap


def scores(*shape: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Normal numbers [runs, tasks]."""
    return np.random.default_rng(seed).normal(shift, 1.0, shape)


def test_iqm_by_hand() -> None:
    assert iqm(np.array([[0.0, 1.0], [2.0, 100.0]])) == 1.5
    assert iqm([np.array([3.0]), np.array([-100.0, 1.0, 2.0])]) == 1.5
    assert iqm([np.array([1.0, 2.0, 6.0])]) == 3.0  # floor(3 / 4) = 0 are cut


@pytest.mark.parametrize("runs", range(1, 12))
def test_iqm_is_scipys_trimmed_mean(runs: int) -> None:
    table = scores(runs, 3)
    assert iqm(table) == pytest.approx(scipy.stats.trim_mean(table, proportiontocut=0.25, axis=None))


def test_probability_of_improvement_by_hand() -> None:
    one = np.array([1.0, 2.0, 3.0])
    assert probability_of_improvement([one], [one]) == 0.5
    assert probability_of_improvement([one + 5], [one]) == 1 and probability_of_improvement([one], [one + 5]) == 0
    assert probability_of_improvement([np.array([1.0, 1.0])], [np.array([1.0])]) == 0.5
    # 3 of 6 pairs are won, 2 are ties; then a task that is always won.
    ragged = [np.array([2.0, 3.0]), np.array([9.0])], [one, np.array([1.0, 2.0])]
    assert probability_of_improvement(*ragged) == pytest.approx(((3 + 2 / 2) / 6 + 1) / 2)


def test_probability_of_improvement_is_mann_whitneys_u() -> None:
    x, y = np.round(scores(5, 3)), np.round(scores(4, 3, seed=1))  # rounded: with ties
    expected = [scipy.stats.mannwhitneyu(x[:, task], y[:, task], alternative="greater").statistic / 20 for task in range(3)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(expected))
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)


def test_nan_is_not_trimmed_away() -> None:
    bad = [np.array([1.0, 2.0, 3.0, math.nan])]
    assert math.isnan(iqm(bad)) and math.isnan(probability_of_improvement(bad, [np.ones(2)]))
    assert math.isnan(probability_of_improvement([np.ones(2)], bad))
    assert math.isnan(stratified_bootstrap(iqm, bad, replications=50).high)


def test_intervals_reproduce_with_the_seed() -> None:
    table = scores(5, 4)
    first = stratified_bootstrap(iqm, table, replications=200, seed=1)
    assert first == stratified_bootstrap(iqm, table, replications=200, seed=np.random.default_rng(1))
    np.random.seed(7)  # noqa: NPY002  (the global generator plays no part)
    assert first == stratified_bootstrap(iqm, table, replications=200, seed=1)
    assert first != stratified_bootstrap(iqm, table, replications=200, seed=2)
    assert first.low < first.value < first.high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    found = [stratified_bootstrap(iqm, scores(20, 3, seed=seed, shift=2.0), replications=300) for seed in range(60)]
    assert sum(one.low <= 2.0 <= one.high for one in found) >= 51  # 85 %


def test_runs_are_drawn_within_their_task() -> None:
    apart = np.array([[0.0, 100.0, 200.0, 300.0]] * 5)
    assert stratified_bootstrap(iqm, apart, replications=50) == Estimate(150.0, 150.0, 150.0)


def test_tasks_are_drawn_independently() -> None:
    """Two tasks whose runs move together: drawn by rows their difference would always be 0."""
    together = np.array([[0.0, 0.0], [1.0, 1.0]])
    found = stratified_bootstrap(lambda tasks: float(np.mean(tasks[0]) - np.mean(tasks[1])), together, replications=200)
    assert found.low < 0 < found.high


def test_the_interval_of_an_improvement_draws_both_sides() -> None:
    x, y = scores(6, 2, shift=0.5), scores(5, 2, seed=1)
    found = stratified_bootstrap(probability_of_improvement, x, y, replications=300)
    assert 0 < found.low < found.value < found.high < 1
    alone = stratified_bootstrap(lambda ours: probability_of_improvement(ours, y), x, replications=300)
    assert found.high - found.low > alone.high - alone.low


def test_one_run_per_task_has_an_interval_without_width() -> None:
    assert stratified_bootstrap(iqm, np.array([[0.2, 0.4]]), replications=20) == Estimate(*[pytest.approx(0.3)] * 3)


def test_what_is_no_table_of_scores() -> None:
    for wrong in (np.ones(3), [], [np.array([])], np.ones((0, 2)), [np.ones((2, 2))]):
        with pytest.raises(ValueError, match="scores: expected"):
            by_task(wrong)
    with pytest.raises(ValueError, match="zip"):
        probability_of_improvement(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="at least 1"):
        stratified_bootstrap(iqm, np.ones((2, 2)), replications=0)
