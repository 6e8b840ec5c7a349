"""Holding our runs against published curves, at equal simulator steps.

The published grid is 100,000 steps and is never interpolated; of ours the evaluation at that step counts, or the nearest within
one evaluation interval. The gate: our mean over seeds reaches the reference's lowest seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from worldmpc.files import write_whole
from worldmpc.report.cells import rounded, span
from worldmpc.report.overrides import different
from worldmpc.report.reference import DEFAULT_ALGORITHM, Curve, Point, reference_curve
from worldmpc.report.runs import Evaluation, Kind, Run

MIN_SEEDS = 3


@dataclass(frozen=True)
class Comparison:
    """One task, agent, preset, planner and label: our seeds beside the published ones."""

    task: str
    agent: str
    preset: str
    planner: str
    label: str
    seeds: tuple[int, ...]
    step: int
    """Simulator step at which both sides are held against each other."""
    used_steps: tuple[int, ...]
    """Simulator step of the evaluation used, per seed."""
    mean: float
    """Over seeds, of the mean return of each seed's evaluation."""
    min: float
    """Lowest seed."""
    max: float
    """Highest seed."""
    prior_mean: float
    """As ``mean``, of the policy prior without planning; NaN where not evaluated."""
    algorithm: str
    reference: Point | None
    """Published point at exactly ``step``."""
    passed: bool | None
    """Whether our mean reaches the reference's lowest seed; ``None`` where that cannot be said."""
    reason: str
    """The numbers behind ``passed``, or why it is ``None``."""
    notes: tuple[str, ...] = ()
    """What a reader must know: few seeds, steps that do not match exactly, runs that differ, cut files."""

    @property
    def kind(self) -> Kind:
        """What its runs have in common."""
        return Kind(self.task, self.agent, self.preset, self.planner, self.label)


def compare(runs: Sequence[Run], algorithm: str = DEFAULT_ALGORITHM, at: int | None = None) -> list[Comparison]:
    """Hold runs against published curves, one comparison per task, agent, preset, planner and label, in that order.

    Without ``at``, both sides are taken at the largest published step that all our seeds have reached. Tasks without published
    curve, and runs that have not reached its first point, are listed with our numbers at the last step all seeds have reached.

    at: simulator step.

    Raises:
        ValueError: unknown algorithm, or a step that is not positive.
    """
    if at is not None and at <= 0:
        raise ValueError(f"at: expected a positive simulator step, got {at}")
    groups: dict[Kind, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.kind, []).append(run)
    return [_compare_group(groups[key], algorithm, at) for key in sorted(groups)]


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Return the comparisons as a rich table; notes are left to :func:`print_comparisons`."""
    table = Table(title="Return against published curves, at equal simulator steps")
    table.add_column("task", no_wrap=True)
    table.add_column("agent")
    for name in ("sim. steps", "seeds", "ours", "min..max", "prior", "published", "min..max"):
        table.add_column(name, justify="right")
    table.add_column("gate")
    for row in comparisons:
        published = [rounded(row.reference.mean), span(row.reference.min, row.reference.max)] if row.reference else ["-", "-"]
        gate = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "-"}[row.passed]
        ours = [rounded(row.mean), span(row.min, row.max), rounded(row.prior_mean)]
        table.add_row(row.task, row.kind.name, f"{row.step:,}", str(len(row.seeds)), *ours, *published, gate)
    return table


def print_comparisons(comparisons: Sequence[Comparison], console: Console | None = None) -> None:
    """Print table, reasons and notes."""
    console = console or Console()
    console.print(comparison_table(comparisons))
    for row in comparisons:
        lines = [*([row.reason] if row.passed is not True else []), *row.notes]
        for line in lines:
            console.print(f"{row.task} ({row.kind.name}): {line}", markup=False, highlight=False, soft_wrap=True)


def to_json(comparisons: Any, path: str | Path | None = None) -> str:
    """Return a comparison, or a list of them, as JSON text (null for NaN), also written to ``path`` where one is given."""
    text = json.dumps(_plain(comparisons), indent=2, allow_nan=False) + "\n"
    if path is not None:
        write_whole(Path(path), text)
    return text


def one_per_seed(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Return (runs by seed, notes), of several runs of one seed the longest: a seed must not count twice.

    A run folder and the result file exported from it are such a pair.
    """
    best: dict[int, Run] = {}
    notes = []
    for run in runs:
        other = best.get(run.seed)
        if other is None:
            best[run.seed] = run
            continue
        kept, dropped = (other, run) if other.env_steps >= run.env_steps else (run, other)
        best[run.seed] = kept
        names = different([kept.overrides, dropped.overrides])
        apart = f" in runs that differ in {', '.join(names)}, which need labels of their own" if names else ""
        notes.append(f"seed {run.seed} was found twice{apart}; {kept.source} counts, {dropped.source} does not")
    return [best[seed] for seed in sorted(best)], notes


def _compare_group(group: Sequence[Run], algorithm: str, at: int | None) -> Comparison:
    runs, notes = one_per_seed(group)
    notes += [note for run in runs for note in run.notes] + config_notes(runs)
    curve = reference_curve(group[0].task, algorithm)
    reached = min(run.env_steps for run in runs)
    step, reason = _choose_step(runs, curve, reached, at, algorithm)
    rows = [run.nearest(step) if run.evals else None for run in runs]
    if not reason:
        reason = _gap(runs, rows, step)
    notes += _step_notes(runs, rows, step)
    means = [float(row.return_mean) if row else math.nan for row in rows]
    if len(runs) < MIN_SEEDS:
        notes.append(f"{len(runs)} seed{'s' * (len(runs) > 1)}; the gate asks for at least {MIN_SEEDS}")
    mean, point = _mean(means), curve.at(step) if curve else None
    passed = None
    if not reason and point is not None:
        passed = bool(mean >= point.min)
        sign = ">=" if passed else "<" if math.isfinite(mean) else "is not"
        reason = f"mean {mean:.1f} {sign} {point.min:.1f}, the lowest published seed, at {step:,} simulator steps"
    return Comparison(
        **group[0].kind._asdict(),
        seeds=tuple(run.seed for run in runs),
        step=step,
        used_steps=tuple(row.env_steps for row in rows if row),
        mean=mean,
        min=_extreme(min, means),
        max=_extreme(max, means),
        prior_mean=_mean([row.prior_return_mean if row else math.nan for row in rows]),
        algorithm=curve.algorithm if curve else algorithm,
        reference=point,
        passed=passed,
        reason=reason,
        notes=tuple(notes),
    )


def _choose_step(runs: Sequence[Run], curve: Curve | None, reached: int, at: int | None, algorithm: str) -> tuple[int, str]:
    """(Simulator step, reason why there is no gate there or empty)."""
    if curve is None:
        return at or reached, f"no published {algorithm} curve for {runs[0].task}"
    slowest = min(runs, key=lambda run: run.env_steps)
    if at is not None:
        if reached < at:
            return at, f"not enough steps: seed {slowest.seed} has reached {reached:,} of {at:,}"
        if curve.at(at) is None:
            return at, f"no published point at {at:,}; the published steps are {_grid(curve)}"
    # The point at step 0 is an untrained agent: nothing to be held against.
    steps = [point.step for point in curve.points if 0 < point.step <= reached]
    if at is None and not steps:
        return reached, f"not enough steps: seed {slowest.seed} has reached {reached:,}, the published curve starts at {curve.first.step:,}"
    step = at or steps[-1]
    if curve.band != "seeds":
        return step, f"{curve.algorithm}: the published band is {curve.band}, its lowest seed is not known"
    return step, ""


def _gap(runs: Sequence[Run], rows: Sequence[Evaluation | None], step: int) -> str:
    """Reason for having no gate where a seed has no evaluation near enough to the step."""
    for run, row in zip(runs, rows, strict=True):
        if row is not None and abs(row.env_steps - step) > run.eval_interval:
            return (
                f"seed {run.seed} has no evaluation within one interval ({run.eval_interval:,}) of {step:,}; "
                f"the nearest is at {row.env_steps:,}"
            )
    return ""


def _step_notes(runs: Sequence[Run], rows: Sequence[Evaluation | None], step: int) -> list[str]:
    notes = []
    for run, row in zip(runs, rows, strict=True):
        if row is None:
            notes.append(f"seed {run.seed}: no evaluation yet")
        elif row.env_steps != step:
            notes.append(f"seed {run.seed}: evaluation at {row.env_steps:,} stands for {step:,}")
    return notes


def config_notes(runs: Sequence[Run]) -> list[str]:
    """Return notes on keys in which runs differ or may: overrides of one preset, whose mean would be of different things."""
    names, unknown = different([run.overrides for run in runs]), sum(run.overrides is None for run in runs)
    notes = [f"the runs differ in {', '.join(names)}"] if names else []
    return [*notes, f"{unknown} of {len(runs)} runs: it is not known what they change"] if 0 < unknown < len(runs) else notes


def _grid(curve: Curve) -> str:
    steps = [point.step for point in curve.points if point.step > 0]
    return f"{steps[0]:,}, {steps[1]:,}, ..., {steps[-1]:,}" if len(steps) > 2 else ", ".join(f"{step:,}" for step in steps)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _extreme(pick: Any, values: Sequence[float]) -> float:
    """Min or max that does not hide a NaN."""
    return math.nan if any(math.isnan(value) for value in values) else pick(values)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
