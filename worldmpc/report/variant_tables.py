"""Comparisons of variants as tables: on the console, and in markdown."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worldmpc.report.cells import escaped, rounded, span
from worldmpc.report.compare import MIN_SEEDS
from worldmpc.report.reference import DEFAULT_ALGORITHM
from worldmpc.report.runs import RunError, load_results
from worldmpc.report.statistics import Estimate
from worldmpc.report.variants import DEFAULT_BASELINE, Aggregate, Published, TaskComparison, VariantComparison, compare_variants


def print_variants(comparison: VariantComparison, console: Console | None = None) -> None:
    """Print one table per task, the aggregate, and notes."""
    console = console or Console()
    for task in comparison.tasks:
        console.print(_task_table(task))
    if comparison.aggregate:
        console.print(_aggregate_table(comparison))
    missing = [f"{task.task}, {row.name}: {row.reason}" for task in comparison.tasks for row in task.published if row.reason]
    for note in [*missing, *comparison.notes]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def variants_markdown(words: str) -> str:
    """Return the markdown of what ``worldmpc compare variants=true`` says of result CSVs: per task, then aggregated.

    words: paths or globs of result CSVs, and at=, algorithm= or baseline= as that command takes them.

    Raises:
        RunError: a word that cannot be used, a result file that cannot be read, or runs that cannot be compared.
    """
    options = {"at": "", "algorithm": DEFAULT_ALGORITHM, "baseline": DEFAULT_BASELINE}
    patterns = []
    for word in words.split():
        name, equals, value = word.partition("=")
        if not equals:
            patterns.append(word)
        elif name in options:
            options[name] = value
        else:
            raise RunError(f"{word}: unknown option; options are {', '.join(options)}")
    at = options["at"]
    if at and not at.isdecimal():
        raise RunError(f"at: expected a simulator step, got '{at}'")
    files = sorted({Path(file) for pattern in patterns for file in glob.glob(pattern)})
    if not files:
        return f"No results in `{' '.join(patterns)}` yet."
    runs = [run for file in files for run in load_results(file)]
    found = compare_variants(runs, options["algorithm"].split(","), int(at) if at else None, options["baseline"])
    parts = [_tasks_markdown(found.tasks), *([_aggregate_markdown(found)] if found.aggregate else [])]
    return "\n\n".join([*parts, *(["\n".join(f"* {note}" for note in found.notes)] if found.notes else [])])


def _task_table(task: TaskComparison) -> Table:
    table = Table(title=f"{task.task}, return at {task.step:,} simulator steps")
    table.add_column("variant", no_wrap=True)
    for name in ("seeds", "return", "min..max", "area under curve", "prior alone"):
        table.add_column(name, justify="right")
    for row in task.variants:
        table.add_row(
            Text(row.label),
            str(len(row.seeds)),
            *map(str, (rounded(row.mean), span(row.min, row.max), rounded(row.area), rounded(row.prior_mean))),
        )
    for row in task.published:
        if row.point:
            table.add_row(row.name, str(row.point.num_seeds or "-"), rounded(row.point.mean), _band(row), "-", "-", style="dim")
    return table


def _aggregate_table(comparison: VariantComparison) -> Table:
    table = Table(title=_title(comparison))
    table.add_column("variant", no_wrap=True)
    for name in _aggregate_header(comparison):
        table.add_column(name, justify="right")
    for row in comparison.aggregate:
        table.add_row(Text(row.label), *_aggregate_cells(row))
    return table


def _tasks_markdown(tasks: Sequence[TaskComparison]) -> str:
    header = ("task", "simulator steps", "variant", "seeds", "return (min..max)", "area under the curve", "prior alone", "data")
    lines = ["| " + " | ".join(header) + " |", "|---|--:|---|--:|--:|--:|--:|---|"]
    for task in tasks:
        for row in task.variants:
            seeds = f"{len(row.seeds)}{' (*)' * (len(row.seeds) < MIN_SEEDS)}"
            cells = [
                escaped(row.label),
                seeds,
                f"**{rounded(row.mean)}** ({span(row.min, row.max)})",
                rounded(row.area),
                rounded(row.prior_mean),
            ]
            lines.append("| " + " | ".join([task.task, f"{task.step:,}", *cells, ", ".join(f"`{one}`" for one in row.sources)]) + " |")
        for row in task.published:
            point = row.point
            if point is None:
                continue
            cells = [str(point.num_seeds or "-"), f"{rounded(point.mean)} ({_band(row)})"]
            lines.append("| " + " | ".join([task.task, f"{task.step:,}", row.name, *cells, "-", "-", "-"]) + " |")
    text = (
        "Episode return of planning, for all runs of a task at the same simulator step: mean over seeds, lowest and highest seed. "
        "Area under the curve: mean of the returns at all steps in common up to there, without step 0. "
        "Published points are never interpolated."
    )
    missing: dict[str, list[str]] = {}
    for task in tasks:
        for row in task.published:
            if row.reason:
                missing.setdefault(row.reason, []).append(f"{row.name} on {task.task}")
    text += "".join(f" {reason[0].upper()}{reason[1:]}: {', '.join(names)}." for reason, names in missing.items())
    if any(len(row.seeds) < MIN_SEEDS for task in tasks for row in task.variants):
        text += f" (*) fewer than {MIN_SEEDS} seeds: an observation, not yet evidence."
    return "\n".join([*lines, "", text])


def _aggregate_markdown(comparison: VariantComparison) -> str:
    lines = ["| " + " | ".join(["variant", *_aggregate_header(comparison)]) + " |", "|---|--:|--:|--:|--:|"]
    lines += ["| " + " | ".join([escaped(row.label), *_aggregate_cells(row)]) + " |" for row in comparison.aggregate]
    text = (
        f"{_title(comparison)}: {', '.join(comparison.aggregate_tasks)}. "
        f"IQM: interquartile mean of return / 1000 over all runs of all tasks. "
        f"P(better): probability that a run has more than one of {comparison.baseline}, mean over tasks, ties counted half. "
        f"In brackets 95 % intervals of a bootstrap stratified by task ({comparison.replications:,} replications; Agarwal et al. 2021)."
    )
    return "\n".join([*lines, "", text])


def _title(comparison: VariantComparison) -> str:
    count = len(comparison.aggregate_tasks)
    return f"Aggregated over {count} task{'s' * (count > 1)}"


def _aggregate_header(comparison: VariantComparison) -> list[str]:
    better = f"P(better than {comparison.baseline})"
    return ["IQM of return", "IQM of area", f"{better}, return", f"{better}, area"]


def _aggregate_cells(row: Aggregate) -> list[str]:
    cells = [_interval(one, 3) for one in (row.final, row.area)]
    return cells + ["-" if one is None else _interval(one, 2) for one in (row.better_final, row.better_area)]


def _interval(estimate: Estimate, digits: int) -> str:
    if not math.isfinite(estimate.value):
        return "-"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _band(row: Published) -> str:
    assert row.point is not None
    return f"{span(row.point.min, row.point.max)}{'' if row.band == 'seeds' else f', {row.band}'}"
