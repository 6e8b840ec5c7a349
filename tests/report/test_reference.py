"""The shipped reference curves equal the published numbers."""

from __future__ import annotations

import pytest

from worldmpc.report.reference import algorithms, reference_curve


@pytest.mark.parametrize(
    ("task", "algorithm", "step", "mean", "low", "high"),
    [
        ("cartpole-swingup", "tdmpc2", 100_000, 839, 790, 868),
        ("cartpole-swingup", "tdmpc2", 1_000_000, 876, 865, 882),
        ("cup-catch", "tdmpc2", 100_000, 981, 973, None),
        ("finger-spin", "tdmpc2", 100_000, 948, 920, None),
        ("walker-walk", "tdmpc2", 100_000, 962, 948, None),
        ("cheetah-run", "tdmpc2", 500_000, 758, 594, None),
        ("quadruped-run", "tdmpc2", 200_000, 759, 691, None),
        ("humanoid-walk", "tdmpc2", 1_000_000, 628, 610, 642),
        ("pendulum-swingup", "sac", 1_000_000, 354, 0, 861),
        ("hopper-hop", "tdmpc", 1_000_000, 319, 130, 559),
        ("walker-walk", "dreamerv3", 1_000_000, 821, 764, 855),
    ],
)
def test_published_numbers(task: str, algorithm: str, step: int, mean: float, low: float, high: float | None) -> None:
    curve = reference_curve(f"dmc/{task}", algorithm)
    assert curve is not None
    point = curve.at(step)
    assert point is not None
    assert point.mean == pytest.approx(mean, abs=0.51)
    assert point.min == pytest.approx(low, abs=1.01)
    assert point.num_seeds == 3
    if high is not None:
        assert point.max == pytest.approx(high, abs=0.51)


def test_there_is_nothing_between_grid_points() -> None:
    curve = reference_curve("cartpole-swingup")
    assert curve is not None
    assert curve.at(50_000) is None
    assert curve.first.step == 100_000
    assert [point.step for point in curve.points] == sorted(point.step for point in curve.points)
    assert curve.label == "TD-MPC2 (published, 5M, 3 seeds)"


def test_names_of_one_task() -> None:
    curve = reference_curve("dmc/cup-catch")
    assert curve is not None
    assert reference_curve("dmc/ball_in_cup-catch") is curve
    assert reference_curve("cup-catch") is curve
    assert reference_curve("dmc/cartpole-swingup_sparse") is reference_curve("dmc/cartpole-swingup-sparse")
    assert reference_curve("gym/cartpole-swingup") is None
    assert reference_curve("dmc/point-mass-easy") is None


def test_pixel_curves_are_apart() -> None:
    state, pixels = reference_curve("dmc/walker-walk"), reference_curve("dmc/walker-walk-pixels")
    assert state is not None and pixels is not None
    assert (state.algorithm, pixels.algorithm) == ("tdmpc2", "tdmpc2-pixels")
    assert pixels is reference_curve("walker-walk", "tdmpc2-pixels")
    assert reference_curve("dmc/walker-walk-pixels", "sac") is None


def test_bands_that_are_not_seeds_say_so() -> None:
    bands = {name: reference_curve("dmc/dog-run", name) for name in ("bmpc-1m", "bmpc-4m", "boom", "tdmpc2")}
    assert {name: curve.band for name, curve in bands.items() if curve} == {
        "bmpc-1m": "95%CI",
        "bmpc-4m": "95%CI",
        "boom": "mean-/+band",
        "tdmpc2": "seeds",
    }
    assert "mrq" in algorithms()
    with pytest.raises(ValueError, match="unknown reference algorithm 'tdmpc3'"):
        reference_curve("dmc/dog-run", "tdmpc3")
