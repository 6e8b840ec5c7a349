"""Learning curves as PNG: ours, the policy prior alone, and the published curve beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from worldmpc.files import written_aside
from worldmpc.report.compare import one_per_seed
from worldmpc.report.reference import DEFAULT_ALGORITHM, Curve, Point, reference_curve
from worldmpc.report.runs import Kind, Run, RunError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which stay apart for colour-blind readers."""
REFERENCE_COLOR = "#4D4D4D"
PANEL_INCHES = (7.2, 4.5)
DPI = 150
_SHORTEST_SHARE = 0.15
"""A run that covers less of the way to the first published point than this would be squeezed into a corner by showing that point."""
_MOST_WITHIN = 4
"""Entries of a legend that find a place among the curves; more of them stand below."""
_DASHES = ("-", (0, (6, 2)), (0, (1, 1.2)))
"""Where there are more lines than colours."""


class _Look(NamedTuple):
    color: str
    dashes: Any


def plot_curves(runs: Sequence[Run], path: str | Path, algorithm: str = DEFAULT_ALGORITHM) -> Figure:
    """Draw learning curves into an image, of the kind that the file's name says, one panel per task, and return the figure.

    Mean over seeds with its min..max band; the published points with their band. Where a panel has one kind of runs (agent, preset, ...),
    also every seed as a thin line, and the policy prior alone dashed. A kind has the same colour in all panels.
    x: simulator steps. y: undiscounted episode return.

    Raises:
        RunError: no run has an evaluation, or an image of a kind that cannot be written.
        ValueError: unknown reference algorithm.
    """
    path = Path(path)
    kind, kinds = path.suffix[1:].lower() or "png", FigureCanvasAgg.get_supported_filetypes()
    if kind not in kinds:
        raise RunError(f"{path.name}: no image of the kind .{kind} can be written; use one of {', '.join(sorted(kinds))}")
    tasks: dict[str, dict[Kind, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.kind):
        if run.evals:
            tasks.setdefault(run.task, {}).setdefault(run.kind, []).append(run)
    if not tasks:
        raise RunError(f"{path.name}: no evaluation to draw")
    looks = _looks([kind.name for groups in tasks.values() for kind in groups])
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    for index, (task, groups) in enumerate(tasks.items()):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), task, groups, reference_curve(task, algorithm), looks)
    with written_aside(path) as partial:
        figure.savefig(partial, format=kind)
    return figure


def _draw_panel(axes: Axes, task: str, groups: dict[Kind, list[Run]], curve: Curve | None, looks: Mapping[str, _Look]) -> None:
    reached = 0
    for kind, group in groups.items():
        seeds, _ = one_per_seed(group)
        reached = max(reached, *(run.env_steps for run in seeds))
        _draw_group(axes, seeds, kind.name, looks[kind.name], alone=len(groups) == 1)
    end = float(max(reached, 1))
    if curve is not None:
        end = _draw_reference(axes, curve, reached)
    _style(axes, task, end)


def _draw_group(axes: Axes, runs: Sequence[Run], name: str, look: _Look, alone: bool) -> None:
    color, dashes = look
    label = f"{name} (ours, {len(runs)} seed{'s' * (len(runs) > 1)})"
    many = len(runs) > 1
    steps, returns = _common(runs, "return_mean")
    # Seeds without a common step have no mean to be shown by.
    for run in runs if many and (alone or len(steps) == 0) else ():
        axes.plot(*_line(run, "return_mean"), color=color, linewidth=0.8, alpha=0.45, zorder=3)
    if len(steps) > 0:
        marker = "o" if len(steps) <= 30 else ""
        style = {"linewidth": 2.2, "linestyle": dashes, "marker": marker, "markersize": 3.5}
        axes.plot(steps, returns.mean(0), color=color, label=label, zorder=5, **style)
    else:
        axes.plot([], [], color=color, linewidth=0.8, label=f"{label}, no common steps")
    if many and len(steps) > 0:
        axes.fill_between(steps, returns.min(0), returns.max(0), color=color, alpha=0.16 if alone else 0.09, linewidth=0, zorder=2)
    steps, priors = _common(runs, "prior_return_mean")
    if alone and np.isfinite(priors).any():
        axes.plot(steps, priors.mean(0), color=color, linewidth=1.5, linestyle=(0, (4, 2)), label="policy prior alone", zorder=4)


def _draw_reference(axes: Axes, curve: Curve, reached: int) -> float:
    """Draw the published points and return where the x-axis ends."""
    first = curve.first
    if reached <= 1.02 * first.step:
        return _draw_first_point(axes, curve, first, reached)
    # One point past our end, so that a run between two grid points still has its neighbours in view.
    after = next((point.step for point in curve.points if point.step >= reached), curve.points[-1].step)
    # A line from step 0 to the first point would look like a learning curve; nobody published one there.
    points = [point for point in curve.points if 0 < point.step <= after]
    steps = [point.step for point in points]
    few = len(points) <= 30
    axes.fill_between(steps, [p.min for p in points], [p.max for p in points], color=REFERENCE_COLOR, alpha=0.13, linewidth=0, zorder=1)
    axes.plot(
        steps,
        [point.mean for point in points],
        color=REFERENCE_COLOR,
        linewidth=1.3,
        linestyle=":" if few else "-",
        marker="D" if few else "",
        markersize=4.5,
        label=curve.label,
        zorder=4,
    )
    if few:
        _error_bars(axes, points)
    return float(max(reached, after))


def _draw_first_point(axes: Axes, curve: Curve, first: Point, reached: int) -> float:
    """Where we end at the first published point or before: its level as a line, the point itself where it fits."""
    axes.axhspan(first.min, first.max, color=REFERENCE_COLOR, alpha=0.10, linewidth=0, zorder=0)
    label = f"{curve.label}\nat {_short(first.step)}: {first.mean:.0f} ({first.min:.0f}..{first.max:.0f})"
    shown = reached >= _SHORTEST_SHARE * first.step
    axes.axhline(first.mean, color=REFERENCE_COLOR, linewidth=1.2, linestyle=":", zorder=1, label=None if shown else label)
    if not shown:
        return reached * 1.25
    style = {"linestyle": ":", "linewidth": 1.3, "marker": "D", "markersize": 5.5}
    axes.plot([first.step], [first.mean], color=REFERENCE_COLOR, label=label, zorder=4, **style)
    _error_bars(axes, [first])
    return float(max(reached, first.step))


def _error_bars(axes: Axes, points: Sequence[Point]) -> None:
    means = [point.mean for point in points]
    spread = [[p.mean - p.min for p in points], [p.max - p.mean for p in points]]
    # Small released samples can have a rounded mean a hair outside their rounded range.
    spread = np.clip(np.array(spread), 0, None)
    steps = [point.step for point in points]
    axes.errorbar(steps, means, yerr=spread, fmt="none", ecolor=REFERENCE_COLOR, elinewidth=1.1, capsize=3, zorder=4)


def _common(runs: Sequence[Run], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(Steps [P] at which every run was evaluated, values [runs, P] there); steps where a value is missing are left out."""
    tables = [dict(zip(*_line(run, name), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return np.array(steps), np.array([[table[step] for step in steps] for table in tables])


def _line(run: Run, name: str) -> tuple[list[int], list[float]]:
    rows = [(row.env_steps, getattr(row, name)) for row in run.evals if math.isfinite(getattr(row, name))]
    return [step for step, _ in rows], [value for _, value in rows]


def _style(axes: Axes, task: str, end: float) -> None:
    axes.set_title(task, fontsize=13, fontweight="bold", loc="left", pad=10)
    axes.set_xlabel("simulator steps", fontsize=10.5)
    axes.set_ylabel("episode return", fontsize=10.5)
    end = max(end, 1.0)  # a run that has only been evaluated before it began
    axes.set_xlim(-0.015 * end, 1.03 * end)
    low, high = axes.get_ylim()
    lowest = min(float(np.nanmin(line.get_ydata())) for line in axes.get_lines() if np.size(line.get_ydata()))
    axes.set_ylim(0 if lowest >= 0 else low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(labelsize=9.5, color="#B0B0B0", length=3)
    axes.grid(True, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B0B0B0")
    style = {"fontsize": 9, "frameon": True, "framealpha": 0.9, "edgecolor": "none", "handlelength": 2.6}
    if len(axes.get_legend_handles_labels()[0]) > _MOST_WITHIN:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, **style)
    else:
        axes.legend(loc="best", **style)


def _looks(names: Sequence[str]) -> dict[str, _Look]:
    """Colour and dashes by name."""
    turns = len(PALETTE)
    return {name: _Look(PALETTE[index % turns], _DASHES[index // turns % len(_DASHES)]) for index, name in enumerate(sorted(set(names)))}


def _short(value: float) -> str:
    """25000 -> 25k, 1500000 -> 1.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
