"""Tables and images of goals."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from worldmpc.report.goals import GOALS, GoalStep, load_goals, plot_goals, write_goals
from worldmpc.report.runs import RunError

STEPS = [GoalStep(index, index % 4 == 0, 0.1 * (index % 4) + 0.5, float(index > 6)) for index in range(10)]


def test_a_table_comes_back(tmp_path: Path) -> None:
    write_goals(tmp_path / GOALS, STEPS)
    found = load_goals(tmp_path / GOALS)
    assert [step.begins for step in found] == [step.begins for step in STEPS]
    assert found[3].similarity == pytest.approx(0.8) and found[9].reward == 1.0


@pytest.mark.parametrize("text", ["decision,begins\n1,2\n", "decision,begins,similarity,reward\n1,1,x,0\n"])
def test_a_damaged_table_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / GOALS).write_text(text)
    with pytest.raises(RunError, match=f"{GOALS}: not a table of goals"):
        load_goals(tmp_path / GOALS)


def test_a_panel_per_episode(tmp_path: Path) -> None:
    figure = plot_goals({"one": STEPS, "two": STEPS[:5]}, tmp_path / "goals.png")
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["one", "two"]
    verticals = [line for line in panels[0].get_lines() if len(set(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in verticals] == [0, 4, 8]
    dots = next(line for line in panels[0].get_lines() if line.get_marker() == "o")
    assert list(dots.get_xdata()) == [3, 7, 9]
    assert imread(tmp_path / "goals.png").std() > 0


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    for episodes, name, message in (({"one": []}, "a.png", "no goals to draw"), ({"one": STEPS}, "a.xyz", "no image of the kind .xyz")):
        with pytest.raises(RunError, match=message):
            plot_goals(episodes, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
