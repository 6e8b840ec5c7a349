"""Returns that agents are asked to reach, beside those that they have: ``data/gates.csv`` and result files, as markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from worldmpc.report.compare import MIN_SEEDS
from worldmpc.report.runs import Run, load_result_folder


class Gate(NamedTuple):
    """What an agent is asked for on a task."""

    agent: str
    task: str
    planner: str
    """With this planner; empty: with any."""
    env_steps: int
    """Simulator steps at which the evaluation counts."""
    at_least: float
    """Mean over seeds of the evaluations' mean return."""
    why: str
    """What was published, by whom; ``own`` where nothing was."""


def read_gates() -> list[Gate]:
    """Return the gates that come with the package."""
    text = resources.files("worldmpc.report").joinpath("data/gates.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return [Gate(row["agent"], row["task"], row["planner"], int(row["env_steps"]), float(row["at_least"]), row["why"]) for row in rows]


def gates_table(results: str | Path, gates: Sequence[Gate] | None = None) -> str:
    """Return the markdown table of all gates, one row for each preset and planner that was tried, or one that says that none was.

    Raises:
        RunError: no such folder, or a result file that cannot be read.
    """
    folder = Path(results)
    runs = load_result_folder(folder)
    header = ("agent", "task", "simulator steps", "asked", "reached (min..max)", "seeds", "preset", "", "published", "data")
    lines = ["| " + " | ".join(header) + " |", "|---|---|--:|--:|--:|--:|---|---|---|---|"]
    for gate in read_gates() if gates is None else gates:
        mine = [run for run in runs if (run.agent, run.task) == (gate.agent, gate.task) and gate.planner in ("", run.planner)]
        kinds = list(dict.fromkeys(run.kind for run in mine))
        rows = [_row(gate, [run for run in mine if run.kind == kind], folder) for kind in kinds] or [_row(gate, [], folder)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = (
        f"Mean over seeds of the return of greedy evaluations (10 episodes) at exactly these simulator steps, lowest and highest seed. "
        f"A gate needs at least {MIN_SEEDS} seeds. Settings beyond a preset stand in the commands that the data files hold."
    )
    return "\n".join([*lines, "", text])


def _row(gate: Gate, runs: Sequence[Run], folder: Path) -> list[str]:
    found = [row.return_mean for run in runs for row in run.evals if row.env_steps == gate.env_steps]
    asked = [f"{gate.agent}{gate.planner and ' with '}{gate.planner}", gate.task, f"{gate.env_steps:,}", f"{gate.at_least:g}"]
    if not found:
        return [*asked, "-", "0", runs[0].preset if runs else "-", "not measured", gate.why, "-"]
    mean, kind = sum(found) / len(found), runs[0].kind
    verdict = "few seeds" if len(found) < MIN_SEEDS else "pass" if mean >= gate.at_least else "**missed**"
    reached = f"**{mean:.0f}** ({min(found):.0f}..{max(found):.0f})"
    sources = ", ".join(sorted({f"`{folder.name}/{run.source.relative_to(folder).as_posix()}`" for run in runs}))
    return [*asked, reached, str(len(found)), kind.preset if kind.label == kind.agent else kind.name, verdict, gate.why, sources]
