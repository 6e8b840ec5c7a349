"""The gate: our mean over seeds against the lowest published seed (789.8 on cartpole-swingup at 100k)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from worldmpc.report.compare import Comparison, compare, one_per_seed, print_comparisons, to_json
from worldmpc.report.runs import Run

MakeRun = Callable[..., Run]


def seeds(make_run: MakeRun, finals: list[float], end: int = 100_000, task: str = "dmc/cartpole-swingup", every: int = 10_000) -> list[Run]:
    """One run per final return, evaluated every ``every`` steps up to ``end``."""
    return [
        make_run([(step, final * step / end) for step in range(0, end + 1, every)], task=task, seed=seed)
        for seed, final in enumerate(finals, start=1)
    ]


def one(runs: list[Run], **options: object) -> Comparison:
    (comparison,) = compare(runs, **options)  # pyright: ignore[reportArgumentType]
    return comparison


def test_pass(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [700.0, 820.0, 850.0]))
    assert row.passed is True
    assert (row.mean, row.min, row.max, row.seeds, row.step) == (pytest.approx(790), 700, 850, (1, 2, 3), 100_000)
    assert row.reference is not None and row.reference.min == 789.8 and row.reference.num_seeds == 3
    assert row.prior_mean == pytest.approx(0.8 * 790)
    assert row.notes == ()
    assert "mean 790.0 >= 789.8, the lowest published seed, at 100,000 simulator steps" in row.reason


def test_fail(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [700.0, 819.0, 850.0]))
    assert row.passed is False
    assert "mean 789.7 < 789.8" in row.reason


def test_few_seeds_are_flagged(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [850.0]))
    assert row.passed is True
    assert row.notes == ("1 seed; the gate asks for at least 3",)


def test_not_enough_steps(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [900.0, 900.0, 900.0], end=50_000))
    assert row.passed is None and row.reference is None
    assert (row.step, row.mean) == (50_000, 900)
    assert row.reason == "not enough steps: seed 1 has reached 50,000, the published curve starts at 100,000"


def test_the_slowest_seed_decides_the_step(make_run: MakeRun) -> None:
    runs = seeds(make_run, [850.0, 850.0], end=300_000) + [make_run([(step, 500.0) for step in range(0, 240_001, 10_000)], seed=3)]
    row = one(runs)
    assert row.step == 200_000 and row.used_steps == (200_000,) * 3
    assert one(runs, at=100_000).step == 100_000
    late = one(runs, at=300_000)
    assert late.passed is None and late.reason == "not enough steps: seed 3 has reached 240,000 of 300,000"


def test_at_a_step_that_was_not_published(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [850.0] * 3), at=50_000)
    assert row.passed is None and row.reference is None and row.mean == 425
    assert row.reason == "no published point at 50,000; the published steps are 100,000, 200,000, ..., 4,000,000"
    with pytest.raises(ValueError, match="positive simulator step"):
        compare([], at=0)


def test_nearest_evaluation_is_named(make_run: MakeRun) -> None:
    runs = [make_run([(step, 850.0) for step in (0, 30_000, 60_000, 90_000, 120_000)], seed=seed) for seed in (1, 2, 3)]
    row = one(runs)
    assert row.passed is True and row.used_steps == (90_000,) * 3
    assert row.notes[0] == "seed 1: evaluation at 90,000 stands for 100,000"


def test_no_evaluation_near_enough(make_run: MakeRun) -> None:
    points = [(step, 850.0) for step in (0, 10_000, 20_000, 30_000, 40_000, 150_000, 160_000)]
    row = one([make_run(points, seed=seed) for seed in (1, 2, 3)])
    assert row.passed is None
    assert row.reason == "seed 1 has no evaluation within one interval (10,000) of 100,000; the nearest is at 150,000"


def test_no_reference(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [-200.0, -150.0, -180.0], end=60_000, task="gym/Pendulum-v1"))
    assert row.passed is None and row.reference is None
    assert (row.step, row.min, row.max) == (60_000, -200, -150)
    assert row.reason == "no published tdmpc2 curve for gym/Pendulum-v1"


def test_a_band_that_is_not_seeds_is_no_gate(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [900.0] * 3), algorithm="bmpc-1m")
    assert row.passed is None and row.reference is not None
    assert "95%CI" in row.reason


def test_nan_fails(make_run: MakeRun) -> None:
    row = one(seeds(make_run, [900.0, 900.0, float("nan")]))
    assert row.passed is False and row.min != row.min


def test_a_run_without_evaluation(make_run: MakeRun) -> None:
    row = one([*seeds(make_run, [900.0, 900.0]), make_run([], seed=3)])
    assert row.passed is None and row.step == 0
    assert "seed 3: no evaluation yet" in row.notes


def test_one_seed_found_twice_counts_once(make_run: MakeRun) -> None:
    runs = seeds(make_run, [850.0, 850.0, 850.0])
    row = one([*runs, make_run([(0, 0.0), (10_000, 1.0)], seed=2)])
    assert row.seeds == (1, 2, 3) and row.mean == 850
    assert "seed 2 was found twice" in row.notes[0]


def test_one_seed_twice_in_runs_that_differ_says_in_what(make_run: MakeRun) -> None:
    plain, other = (replace(run, overrides=own) for run, own in zip(seeds(make_run, [850.0] * 2), ({}, {"loss.rho": 0.6}), strict=True))
    _, notes = one_per_seed([plain, replace(other, seed=plain.seed)])
    assert notes[0].startswith("seed 1 was found twice in runs that differ in loss.rho, which need labels of their own; ")


def test_different_overrides_are_flagged(make_run: MakeRun) -> None:
    overrides = [{}, {"planner.horizon": 5}, None]
    runs = [replace(run, overrides=own) for run, own in zip(seeds(make_run, [850.0] * 3), overrides, strict=True)]
    assert one(runs).notes == ("the runs differ in planner.horizon", "1 of 3 runs: it is not known what they change")


def test_groups_print_and_json(make_run: MakeRun) -> None:
    runs = seeds(make_run, [850.0] * 3) + seeds(make_run, [float("nan")], task="gym/Pendulum-v1")
    rows = compare(runs + [make_run([(0, 1.0), (100_000, 2.0)], preset="debug")])
    assert [(row.task, row.preset) for row in rows] == [
        ("dmc/cartpole-swingup", "cpu"),
        ("dmc/cartpole-swingup", "debug"),
        ("gym/Pendulum-v1", "cpu"),
    ]
    out = io.StringIO()
    print_comparisons(rows, Console(file=out, width=160))
    assert "pass" in out.getvalue() and "FAIL" in out.getvalue() and "no published tdmpc2 curve" in out.getvalue()
    data = json.loads(to_json(rows))
    assert data[0]["passed"] is True and data[0]["reference"]["mean"] == 839.4
    assert data[2]["mean"] is None
