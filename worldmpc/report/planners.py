"""Records of ``worldmpc bench planners`` as a markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from worldmpc.report.provenance import machine_line
from worldmpc.report.runs import RunError

SCHEMA = "worldmpc.planners/1"
"""What every record says about itself."""

COLUMNS = ("model", "planner", "horizon", "candidates", "model steps", "seeds x episodes", "return (min..max)", "ms per decision")
"""Of a table of rows; :func:`cells` fills them."""


class PlannerRow(NamedTuple):
    """One planner with one model."""

    model: str
    planner: str
    horizon: int
    reason: str | None
    """Why it cannot be had; all that follows is then None."""
    candidates: str | None = None
    steps: float | None = None
    """Model steps per decision and environment, counted."""
    seeds: int | None = None
    episodes: int | None = None
    mean: float | None = None
    """Return over seeds, and the lowest and the highest of them."""
    low: float | None = None
    high: float | None = None
    median_ms: float | None = None


def planners_table(folder: str | Path) -> str:
    """Return the markdown table of all records of ``worldmpc bench planners`` in a folder, one row per model and planner.

    Raises:
        RunError: no such folder, or a record that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    place = folder.name if folder.is_absolute() else folder.as_posix()
    records = {f"{place}/{file.relative_to(folder).as_posix()}": _load(file) for file in sorted(folder.rglob("*.json"))}
    records = {source: record for source, record in records.items() if isinstance(record, dict) and record.get("schema") == SCHEMA}
    if not records:
        return f"No comparison of planners in `{place}/` yet."
    rows = [row for source, record in records.items() for row in parse_rows(record, source)]
    order = list(dict.fromkeys(row.model for row in rows))
    winners = best(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|--:|---|" + "--:|" * (len(COLUMNS) - 4)]
    for row in sorted(rows, key=lambda row: order.index(row.model)):
        lines.append("| " + " | ".join(cells(row, "**" if row in winners else "")) + " |")
    text = (
        "Return: mean over seeds (lowest..highest seed), the best planner of each model in bold. Model steps: what one decision imagines, "
        "counted. Milliseconds: median of a decision in one environment, those of one command in turns."
    )
    made = [f"* `{source}`: `{record['command']}`; {machine_line(record['machine'])}" for source, record in records.items()]
    return "\n".join([*lines, "", text, "", *made])


def parse_rows(record: Mapping[str, Any], source: str) -> list[PlannerRow]:
    """Return the rows of a record.

    Raises:
        RunError: something is missing; ``source`` names the record.
    """
    try:
        _ = record["command"], machine_line(record["machine"])
        return [_row(data) for data in record["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{source}: no record of worldmpc bench planners of this version ({error!r})") from error


def best(rows: Sequence[PlannerRow]) -> list[PlannerRow]:
    """Return the rows with the highest return of their model."""
    highest: dict[str, float] = {}
    for row in rows:
        if row.mean is not None:
            highest[row.model] = max(row.mean, highest.get(row.model, row.mean))
    return [row for row in rows if row.mean is not None and row.mean == highest[row.model]]


def cells(row: PlannerRow, mark: str = "") -> list[str]:
    """Return the texts of :data:`COLUMNS`; ``mark`` goes around the return."""
    if row.reason is not None:
        return [row.model, row.planner, str(row.horizon), row.reason, *["-"] * (len(COLUMNS) - 4)]
    assert row.mean is not None and row.low is not None and row.high is not None and row.median_ms is not None
    found = f"{mark}{_number(row.mean)}{mark} ({_number(row.low)}..{_number(row.high)})"
    time = f"{row.median_ms:.{1 if row.median_ms >= 10 else 2}f}"
    return [row.model, row.planner, str(row.horizon), str(row.candidates), f"{row.steps:.0f}", f"{row.seeds} x {row.episodes}", found, time]


def _row(data: Mapping[str, Any]) -> PlannerRow:
    head = (str(data["model"]), str(data["planner"]), int(data["horizon"]), data["reason"])
    if data["reason"] is not None:
        return PlannerRow(*head)
    return PlannerRow(
        *head,
        _candidates(data["sizes"]),
        steps=float(data["counted"]),
        seeds=len(data["returns"]),
        episodes=int(data["episodes"]),
        mean=float(data["return_mean"]),
        low=float(data["return_min"]),
        high=float(data["return_max"]),
        median_ms=float(data["plan"]["median_ms"]),
    )


def _candidates(sizes: Mapping[str, Any]) -> str:
    """Iterations and sequences of each, from values of ``planner``."""
    if "num_simulations" in sizes:
        return f"{sizes['num_simulations']} simulations"
    text = str(sizes["num_samples"]) if sizes["iterations"] == 1 else f"{sizes['iterations']} x {sizes['num_samples']}"
    if sizes["name"] == "icem" and sizes["iterations"] > 1:
        text += ", falling"
    return text + (f", {sizes['gradient_steps']} gradient steps" if sizes["gradient_steps"] else "")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoding as well
        raise RunError(f"{file}: not JSON ({error})") from error
