"""Learning-curve images show our numbers and the published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from matplotlib.axes import Axes

from worldmpc.report.curves import DPI, PALETTE, PANEL_INCHES, plot_curves
from worldmpc.report.runs import Run, RunError


def lines(axes: Axes, width: float | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Data of all lines in our colour, of one width where given."""
    own = [line for line in axes.get_lines() if line.get_color() == PALETTE[0] and (width is None or line.get_linewidth() == width)]
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in own]


def legend(axes: Axes) -> list[str]:
    """Texts of the legend."""
    box = axes.get_legend()
    assert box is not None
    return [text.get_text() for text in box.get_texts()]


def test_three_seeds_to_the_first_published_point(make_run: Callable[..., Run], tmp_path: Path) -> None:
    steps = list(range(0, 100_001, 20_000))
    runs = [make_run([(step, seed * step / 1000) for step in steps], seed=seed) for seed in (1, 2, 3)]
    figure = plot_curves(runs, tmp_path / "sub" / "curve.png")
    image = iio.imread(tmp_path / "sub" / "curve.png")
    assert image.shape[:2] == (PANEL_INCHES[1] * DPI, PANEL_INCHES[0] * DPI)
    assert image.std() > 5
    (axes,) = figure.axes
    ((x, y),) = lines(axes, 2.2)
    assert x.tolist() == steps and y == pytest.approx([2 * step / 1000 for step in steps])
    assert len(lines(axes, 0.8)) == 3 and len(lines(axes, 1.5)) == 1
    assert "tdmpc2, cpu (ours, 3 seeds)" in legend(axes)
    assert "TD-MPC2 (published, 5M, 3 seeds)\nat 100k: 839 (790..868)" in legend(axes)
    assert axes.get_title(loc="left") == "dmc/cartpole-swingup"
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.parametrize(("end", "right"), [(50_000, 103_000), (5_000, 6_437.5)])
def test_a_short_run_sees_the_published_level(make_run: Callable[..., Run], tmp_path: Path, end: int, right: float) -> None:
    figure = plot_curves([make_run([(0, 0.0), (end, 300.0)])], tmp_path / "curve.png")
    (axes,) = figure.axes
    assert any(list(np.asarray(line.get_ydata())) == [839.4, 839.4] for line in axes.get_lines())
    assert axes.get_ylim()[1] > 839.4
    assert axes.get_xlim()[1] == pytest.approx(right)


def test_a_long_run_beside_the_published_curve(make_run: Callable[..., Run], tmp_path: Path) -> None:
    figure = plot_curves([make_run([(0, 0.0), (150_000, 800.0), (250_000, 850.0)])], tmp_path / "curve.png")
    (axes,) = figure.axes
    published = next(line for line in axes.get_lines() if line.get_label() == "TD-MPC2 (published, 5M, 3 seeds)")
    assert list(np.asarray(published.get_xdata())) == [100_000, 200_000, 300_000]


def test_no_reference_and_several_tasks(make_run: Callable[..., Run], tmp_path: Path) -> None:
    pendulum = [make_run([(0, -1400.0), (20_000, -200.0 - seed)], task="gym/Pendulum-v1", seed=seed) for seed in (1, 2)]
    figure = plot_curves([*pendulum, make_run([(0, 0.0), (50_000, 300.0)])], tmp_path / "curve.png")
    first, second = figure.axes
    assert first.get_title(loc="left") == "dmc/cartpole-swingup" and second.get_title(loc="left") == "gym/Pendulum-v1"
    assert legend(second) == ["tdmpc2, cpu (ours, 2 seeds)", "policy prior alone"]
    assert second.get_ylim()[0] < -1400


def test_seeds_without_common_steps(make_run: Callable[..., Run], tmp_path: Path) -> None:
    runs = [make_run([(10, 1.0), (20, 2.0)], seed=1), make_run([(11, 1.0), (21, 2.0)], seed=2)]
    (axes,) = plot_curves(runs, tmp_path / "curve.png").axes
    assert "tdmpc2, cpu (ours, 2 seeds), no common steps" in legend(axes)
    assert sorted(x.tolist() for x, _ in lines(axes, 0.8) if len(x)) == [[10, 20], [11, 21]]


def test_variants_share_a_panel_and_keep_their_colours(make_run: Callable[..., Run], tmp_path: Path) -> None:
    tasks = {"dmc/cartpole-swingup": ("a", "b", "c"), "dmc/walker-walk": ("b", "c")}
    runs = [
        make_run([(0, 0.0), (50_000, 100.0 * seed), (100_000, 300.0 * seed)], task=task, label=label, seed=seed)
        for task, labels in tasks.items()
        for label in labels
        for seed in (1, 2)
    ]
    axes = plot_curves(runs, tmp_path / "curve.png").axes
    assert [text for text in legend(axes[0]) if "ours" in text] == [f"{label}, cpu (ours, 2 seeds)" for label in "abc"]
    assert not any("prior" in text for text in legend(axes[0])) and len(lines(axes[0], 0.8)) == 0
    colors = [{str(line.get_label())[0]: line.get_color() for line in one.get_lines() if "ours" in str(line.get_label())} for one in axes]
    assert colors[0] == dict(zip("abc", PALETTE, strict=False)) and colors[1] == {label: colors[0][label] for label in "bc"}
    assert all(len(one.collections) >= len(labels) for one, labels in zip(axes, tasks.values(), strict=True))


def test_more_variants_than_colours_have_other_dashes(make_run: Callable[..., Run], tmp_path: Path) -> None:
    runs = [make_run([(0, 0.0), (100_000, 300.0)], label=f"v{index}") for index in range(len(PALETTE) + 1)]
    (axes,) = plot_curves(runs, tmp_path / "curve.png").axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines() if "ours" in str(line.get_label())}
    assert len(looks) == len(runs)


@pytest.mark.parametrize("labels", [2, 6])
def test_a_long_legend_stands_below_the_curves(make_run: Callable[..., Run], tmp_path: Path, labels: int) -> None:
    runs = [make_run([(0, 0.0), (100_000, 300.0)], label=f"v{index}") for index in range(labels)]
    (axes,) = (figure := plot_curves(runs, tmp_path / "curve.png")).axes
    box = axes.get_legend()
    assert box is not None and len(box.get_texts()) == labels + 1
    place, panel = box.get_window_extent(), axes.get_window_extent()
    assert (place.y1 < panel.y0) == (labels == 6) and place.y0 >= 0 and place.x1 <= figure.bbox.width


def test_nothing_to_draw(make_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no evaluation to draw"):
        plot_curves([make_run([])], tmp_path / "curve.png")


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml"), ("a", b"\x89PNG")])
def test_the_kind_of_image_is_that_of_its_name(make_run, tmp_path, name, begin):
    plot_curves([make_run([(0, 1.0), (10, 2.0)])], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_images_of_an_unknown_kind(make_run, tmp_path):
    with pytest.raises(RunError, match=r"a.xyz: no image of the kind .xyz can be written; use one of .*pdf"):
        plot_curves([make_run([(0, 1.0), (10, 2.0)])], tmp_path / "a.xyz")
