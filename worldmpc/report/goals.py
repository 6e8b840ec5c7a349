"""How near an agent came to the goals that it followed in an episode, as a table and as an image."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from worldmpc.files import write_whole, written_aside
from worldmpc.report.runs import RunError

GOALS = "goals.csv"
"""Name of the table in a run's folder."""
BLUE, GREY, RED = "#0072B2", "#B0B0B0", "#D55E00"


class GoalStep(NamedTuple):
    """One decision under a goal."""

    decision: int
    begins: bool
    """The goal was chosen here."""
    similarity: float
    """Of the latent reached to the goal: the worker's reward."""
    reward: float
    """The task's."""


def write_goals(path: Path, steps: Sequence[GoalStep]) -> None:
    """Write the steps of an episode as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(GoalStep._fields)
    writer.writerows((step.decision, int(step.begins), f"{step.similarity:.6f}", f"{step.reward:.6f}") for step in steps)
    write_whole(path, out.getvalue())


def load_goals(path: Path) -> list[GoalStep]:
    """Read what :func:`write_goals` wrote.

    Raises:
        RunError: it is damaged.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [GoalStep(int(row["decision"]), row["begins"] == "1", float(row["similarity"]), float(row["reward"])) for row in rows]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(f"{path}: not a table of goals ({error!r})") from error


def plot_goals(episodes: Mapping[str, Sequence[GoalStep]], path: Path) -> Figure:
    """Draw goal reward and the task's over each episode into an image, a panel per name, and return the figure.

    Vertical lines stand where a goal was chosen; the dots are the last decisions before the next one.

    Raises:
        RunError: nothing to draw, or an image of a kind that cannot be written.
    """
    kind, kinds = path.suffix[1:].lower() or "png", FigureCanvasAgg.get_supported_filetypes()
    if kind not in kinds:
        raise RunError(f"{path.name}: no image of the kind .{kind} can be written; use one of {', '.join(sorted(kinds))}")
    episodes = {name: steps for name, steps in episodes.items() if steps}
    if not episodes:
        raise RunError(f"{path.name}: no goals to draw")
    figure = Figure(figsize=(9.0, 2.8 * len(episodes)), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1)
    FigureCanvasAgg(figure)
    for index, (name, steps) in enumerate(episodes.items()):
        axes = figure.add_subplot(len(episodes), 1, index + 1)
        x, similarity = [step.decision for step in steps], [step.similarity for step in steps]
        last = [place for place, step in enumerate(steps) if place + 1 == len(steps) or steps[place + 1].begins]
        for step in steps:
            if step.begins:
                axes.axvline(step.decision, color=GREY, linewidth=0.6, zorder=1)
        axes.plot(x, similarity, color=BLUE, linewidth=1.2, label="goal reward", zorder=3)
        axes.plot([x[place] for place in last], [similarity[place] for place in last], "o", color=BLUE, markersize=3, zorder=4)
        axes.set_ylim(min(0.0, *similarity), max(1.05, *similarity))
        axes.set_ylabel("goal reward", color=BLUE)
        other = axes.twinx()
        other.plot(x, [step.reward for step in steps], color=RED, linewidth=0.9, label="task reward", zorder=2)
        other.set_ylabel("task reward", color=RED)
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("decision")
        axes.set_xlim(min(x), max(x) + 1)
        for spines in (axes.spines, other.spines):
            spines["top"].set_visible(False)
    with written_aside(path) as partial:
        figure.savefig(partial, format=kind)
    return figure
