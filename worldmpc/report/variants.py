"""Holding variants (runs of different labels) against each other on the same tasks, and against published curves.

Per task all runs are taken at a simulator step at which every one of them was evaluated; nothing is interpolated. Over tasks the scores
are aggregated as :mod:`worldmpc.report.statistics` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from worldmpc.report.compare import MIN_SEEDS, config_notes, one_per_seed
from worldmpc.report.overrides import different
from worldmpc.report.reference import DEFAULT_ALGORITHM, Point, reference_curve
from worldmpc.report.runs import Run, RunError
from worldmpc.report.statistics import REPLICATIONS, SEED, Estimate, iqm, probability_of_improvement, stratified_bootstrap

DEFAULT_BASELINE = "tdmpc2"
_BEST_RETURN = {"dmc": 1000.0}
"""Suites whose returns lie between 0 and this number; others have no normalised score."""

_Groups = Mapping[str, Mapping[str, Sequence[Run]]]
"""Task -> label -> one run per seed."""


@dataclass(frozen=True)
class Variant:
    """The runs of one label on one task; the step is that of its :class:`TaskComparison`."""

    label: str
    presets: tuple[str, ...]
    seeds: tuple[int, ...]
    returns: tuple[float, ...]
    """Mean return of the evaluation at the step, per seed."""
    areas: tuple[float, ...]
    """Area under the curve: mean of the returns at all common steps up to there, per seed."""
    mean: float
    """Of the returns."""
    min: float
    max: float
    area: float
    """Mean of the areas."""
    prior_mean: float
    """As ``mean``, of the policy prior without planning; NaN where not evaluated."""
    sources: tuple[str, ...]
    """Run folders or result files."""


@dataclass(frozen=True)
class Published:
    """What an algorithm's published curve says at the step."""

    algorithm: str
    name: str
    point: Point | None
    band: str
    """What the point's ``min`` and ``max`` are: ``seeds``, or another band in words."""
    reason: str
    """Why there is no point; empty where there is one."""


@dataclass(frozen=True)
class TaskComparison:
    """All variants of one task at one simulator step."""

    task: str
    step: int
    steps: tuple[int, ...]
    """Simulator steps of the area under the curve: those after 0, up to ``step``, at which all runs were evaluated."""
    variants: tuple[Variant, ...]
    published: tuple[Published, ...]


@dataclass(frozen=True)
class Aggregate:
    """One variant over all tasks of the aggregate, of normalised scores."""

    label: str
    final: Estimate
    """Interquartile mean of the returns at the step."""
    area: Estimate
    """Interquartile mean of the areas under the curve."""
    better_final: Estimate | None
    """Probability that a run of it returns more than one of the baseline; ``None`` for the baseline itself."""
    better_area: Estimate | None


@dataclass(frozen=True)
class VariantComparison:
    """Variants per task, and over the tasks that all of them have."""

    baseline: str
    tasks: tuple[TaskComparison, ...]
    aggregate_tasks: tuple[str, ...]
    aggregate: tuple[Aggregate, ...]
    replications: int
    """Of the bootstrap."""
    seed: int
    """Of the bootstrap."""
    notes: tuple[str, ...]
    """What a reader must know: few seeds, mixed presets, tasks that are left out, files that were cut."""


def compare_variants(
    runs: Sequence[Run],
    algorithms: Sequence[str] = (DEFAULT_ALGORITHM,),
    at: int | None = None,
    baseline: str = DEFAULT_BASELINE,
    replications: int = REPLICATIONS,
    seed: int = SEED,
) -> VariantComparison:
    """Hold runs of different labels against each other; the same runs and seed give the same numbers.

    at: simulator step; without it, per task the largest one at which all runs were evaluated.

    Raises:
        RunError: no run of the baseline, a task without a step (or without this step) at which all of its runs were evaluated.
        ValueError: unknown algorithm.
    """
    begun = [run for run in runs if not any(row.env_steps > 0 for row in run.evals)]
    runs = [run for run in runs if run not in begun]
    labels = sorted({run.label for run in runs}, key=lambda label: (label != baseline, label))
    if baseline not in labels:
        there = f"there are {', '.join(labels) or 'none at all'}"
        only = f", and {len(begun)} without an evaluation behind step 0" if begun else ""
        raise RunError(f"baseline: no runs of '{baseline}'; {there}{only}{f'; choose one, as in baseline={labels[0]}' if labels else ''}")
    groups, notes = _group(runs, labels)
    notes += [f"{run.source}: left out, as it has no evaluation behind step 0 yet" for run in begun]
    tasks = tuple(_compare_task(task, found, algorithms, at) for task, found in groups.items())
    notes += [note for task in tasks for note in _sparse(task, groups[task.task])]
    used, why = _aggregate_tasks(groups, labels)
    notes += [*why, *(note for task in tasks for note in _short(task, groups[task.task]))] if at is None else why
    kept = [task for task in tasks if task.task in used]
    if len({task.step for task in kept}) > 1:
        notes.append(f"the aggregate takes tasks at different steps: {', '.join(f'{task.task} at {task.step:,}' for task in kept)}")
    rows = tuple(_aggregate(kept, label, baseline, replications, seed) for label in labels) if kept else ()
    return VariantComparison(baseline, tasks, tuple(used), rows, replications, seed, tuple(dict.fromkeys(notes)))


def _group(runs: Sequence[Run], labels: Sequence[str]) -> tuple[_Groups, list[str]]:
    """Runs by task and label, one per seed; and notes."""
    groups: dict[str, dict[str, list[Run]]] = {}
    notes = [note for label in labels for note in _mixture([run for run in runs if run.label == label])]
    for task in sorted({run.task for run in runs}):
        for label in labels:
            found = [run for run in runs if (run.task, run.label) == (task, label)]
            if not found:
                continue
            kinds = [one_per_seed([run for run in found if run.kind == kind]) for kind in dict.fromkeys(run.kind for run in found)]
            seeds, doubled = [run for kept, _ in kinds for run in kept], [note for _, notes in kinds for note in notes]
            groups.setdefault(task, {})[label] = seeds
            few = [f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; evidence needs at least {MIN_SEEDS}"] if len(seeds) < MIN_SEEDS else []
            notes += [f"{task}, {label}: {note}" for note in [*doubled, *config_notes(seeds), *few]]
            notes += [note for run in seeds for note in run.notes]
        if len({tuple(run.seed for run in seeds) for seeds in groups[task].values()}) > 1:
            notes.append(f"{task}: the variants' seeds differ")
        notes += [f"{task}: the variants differ in {', '.join(names)}" for names in [_conditions(groups[task])] if names]
    return groups, notes


def _conditions(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Names of what should be the same for all variants of a task and is not: the preset, and keys of environment and evaluation."""
    runs = [run for group in groups.values() for run in group]
    presets = ["preset"] if len({frozenset(run.preset for run in group) for group in groups.values()}) > 1 else []
    return presets + [name for name in different([run.overrides for run in runs]) if name.startswith(("env.", "eval"))]


def _mixture(runs: Sequence[Run]) -> list[str]:
    """Runs of one label may be of several presets, agents or planners, on one task or over tasks, or change other keys on other tasks."""
    notes = []
    for what in ("agent", "preset", "planner"):
        tasks: dict[str, set[str]] = {}
        for run in runs:
            tasks.setdefault(getattr(run, what), set()).add(run.task)
        if len(tasks) > 1:
            parts = [f"{name} ({', '.join(sorted(found))})" for name, found in sorted(tasks.items())]
            notes.append(f"{runs[0].label}: mixes {what}s: {', '.join(parts)}")
    within = [name for task in {run.task for run in runs} for name in different([run.overrides for run in runs if run.task == task])]
    between = [name for name in different([run.overrides for run in runs]) if name not in within]
    return notes + ([f"{runs[0].label}: tasks differ in {', '.join(between)}"] if between else [])


def _compare_task(task: str, groups: Mapping[str, Sequence[Run]], algorithms: Sequence[str], at: int | None) -> TaskComparison:
    runs = [run for group in groups.values() for run in group]
    # At step 0 all agents are untrained: nothing to be held against each other.
    common = sorted(set.intersection(*({row.env_steps for row in run.evals} for run in runs)) - {0})
    if not common:
        slowest = min(runs, key=lambda run: run.env_steps)
        reached = f"{slowest.source} has reached {slowest.env_steps:,}"
        raise RunError(f"{task}: no simulator step above 0 at which all {len(runs)} runs were evaluated; {reached}")
    if at is not None and at not in common:
        raise RunError(
            f"{task}: not all {len(runs)} runs were evaluated at {at:,}; they were at {', '.join(f'{step:,}' for step in common)}"
        )
    step = at or common[-1]
    steps = tuple(one for one in common if one <= step)
    variants = tuple(_variant(label, group, steps) for label, group in groups.items())
    return TaskComparison(task, step, steps, variants, tuple(_published(task, algorithm, step) for algorithm in algorithms))


def _short(task: TaskComparison, groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Say which runs end first, where others go on behind the step of the comparison."""
    ends = {run.source: max(row.env_steps for row in run.evals) for group in groups.values() for run in group}
    if max(ends.values()) == task.step:
        return []
    first = ", ".join(str(source) for source, end in ends.items() if end == min(ends.values()))
    return [f"{task.task}: compared at {task.step:,}, where {first} ends; others reach {max(ends.values()):,}"]


def _sparse(task: TaskComparison, groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Say where the area under the curve leaves out evaluations that some of the runs have."""
    most = max(sum(0 < row.env_steps <= task.step for row in run.evals) for group in groups.values() for run in group)
    if most == len(task.steps):
        return []
    return [
        f"{task.task}: the area takes the {len(task.steps)} steps that all runs have in common, of up to {most} that some were evaluated at"
    ]


def _variant(label: str, runs: Sequence[Run], steps: Sequence[int]) -> Variant:
    """Take runs [seeds] at steps, the last of which is the one to compare at."""
    tables = [{row.env_steps: row for row in run.evals} for run in runs]
    returns = np.array([[table[step].return_mean for step in steps] for table in tables])  # [seeds, steps]
    final, areas = returns[:, -1], returns.mean(1)
    return Variant(
        label=label,
        presets=tuple(sorted({run.preset for run in runs})),
        seeds=tuple(run.seed for run in runs),
        returns=tuple(final.tolist()),
        areas=tuple(areas.tolist()),
        mean=float(final.mean()),
        min=float(final.min()),
        max=float(final.max()),
        area=float(areas.mean()),
        prior_mean=_mean(table[steps[-1]].prior_return_mean for table in tables),
        sources=tuple(dict.fromkeys(run.source.as_posix() for run in runs)),
    )


def _published(task: str, algorithm: str, step: int) -> Published:
    curve = reference_curve(task, algorithm)
    if curve is None:
        return Published(algorithm, f"{algorithm} (published)", None, "", "no published curve of this task")
    point = curve.at(step)
    return Published(algorithm, curve.label, point, curve.band, "" if point else "no published point at this step")


def _aggregate_tasks(groups: _Groups, labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tasks that have a normalised score and runs of all labels; and notes on the others."""
    used, notes = [], []
    for task, found in groups.items():
        missing = [label for label in labels if label not in found]
        if missing:
            notes.append(f"{task} is left out of the aggregate: no runs of {', '.join(missing)}")
        elif _suite(task) not in _BEST_RETURN:
            notes.append(f"{task} is left out of the aggregate: no normalised score outside of {', '.join(_BEST_RETURN)}")
        else:
            used.append(task)
    return used, notes if used else [*notes, "no aggregate: no task is left"]


def _aggregate(tasks: Sequence[TaskComparison], label: str, baseline: str, replications: int, seed: int) -> Aggregate:
    def scores(name: str, of: str) -> list[np.ndarray]:
        """One [seeds] per task."""
        found = [(task.task, next(variant for variant in task.variants if variant.label == of)) for task in tasks]
        return [np.array(getattr(variant, name)) / _BEST_RETURN[_suite(task)] for task, variant in found]

    def better(name: str) -> Estimate | None:
        if label == baseline:
            return None
        pair = scores(name, label), scores(name, baseline)
        return stratified_bootstrap(probability_of_improvement, *pair, replications=replications, seed=seed)

    final, area = (stratified_bootstrap(iqm, scores(name, label), replications=replications, seed=seed) for name in ("returns", "areas"))
    return Aggregate(label, final, area, better("returns"), better("areas"))


def _suite(task: str) -> str:
    return task.partition("/")[0]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
