"""``worldmpc bench planners``: what planners reach on one model at an equal number of imagined model steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from worldmpc.bench.budget import DECIDED, PLANNERS
from worldmpc.bench.measure import record
from worldmpc.bench.planners import Subject, analytic, compare, learned, prepare
from worldmpc.cli.output import check_target, console_for, say, write_json
from worldmpc.cli.text import BENCH_PLANNERS
from worldmpc.cli.words import override_values, split_words
from worldmpc.config import ConfigError, nest
from worldmpc.report.planners import COLUMNS, SCHEMA, PlannerRow, best, cells, parse_rows
from worldmpc.report.provenance import machine_line
from worldmpc.runtime import keep_freed_memory, resolve_device, set_threads

TASKS = ("gym/Pendulum-v1", "gym/CartPole-v1", "gym/Acrobot-v1")
"""Whose equations are planned with where nothing is named."""
T = TypeVar("T")


def bench_planners(words: list[str]) -> int:
    """Let every planner plan with every model, print a table, and return the exit status."""
    options, rest = split_words(words, BENCH_PLANNERS)
    changes = _changes(rest)
    for name in ("iterations", "episodes", "repeats"):
        _at_least_1(name, options[name])
    seeds = _numbers("seeds", options["seeds"], least=0)
    names = [name for name in PLANNERS if PLANNERS[name].get("prior") != "learned"]
    if options["planners"] is not None:
        names = _split("planners", options["planners"])
    resolve_device(options["device"])
    check_target(options["json"])
    keep_freed_memory()
    set_threads(options["threads"])
    console, target = console_for(options["json"]), options["json"]
    plans = {}
    for subject in _subjects(options):
        plans[subject] = prepare(subject, names, changes, iterations=options["iterations"], device=options["device"])
    rows: list[dict[str, Any]] = []
    made = record(rows) | {"schema": SCHEMA}
    how = {name: options[name] for name in ("episodes", "repeats", "device")}
    try:
        for subject, plan in plans.items():
            for row in compare(subject, plan, changes, seeds=seeds, **how):
                rows.append(row)
                say(console, _line(parse_rows(made, "this run")[-1]))
                if target != "-":
                    write_json(target, made)
    finally:
        if rows:
            _print(made, console)
            if target == "-":
                write_json(target, made)
    return 0


def _subjects(options: dict[str, Any]) -> list[Subject]:
    """Return the models to plan with: those of tasks, then those of checkpoints."""
    checkpoints = [] if options["checkpoint"] is None else _split("checkpoint", options["checkpoint"])
    tasks = _split("task", options["task"]) if options["task"] is not None else [] if checkpoints else TASKS
    makers: list[Callable[..., Subject]] = [analytic] * len(tasks) + [learned] * len(checkpoints)
    places = [*tasks, *checkpoints]
    evaluations = _for_each("evaluations", _numbers("evaluations", options["evaluations"], distinct=False), len(places))
    horizons: list[int | None] = [None]
    if options["horizon"] is not None:
        horizons = [*_numbers("horizon", options["horizon"], distinct=False)]
    horizons = _for_each("horizon", horizons, len(places))
    return [make(*what) for make, *what in zip(makers, places, horizons, evaluations, strict=True)]


def _changes(words: Sequence[str]) -> dict[str, Any]:
    """Return nested values of ``planner`` and ``env``."""
    flat = override_values(words)
    for name in flat:
        section, _, key = name.partition(".")
        if section not in ("planner", "env") or not key:
            raise ConfigError(f"{name}: bench planners takes {', '.join(BENCH_PLANNERS)}, and keys of planner and env")
        if section == "planner" and key in DECIDED:
            raise ConfigError(f"{name}: follows from planners=, horizon=, iterations= and evaluations= here; leave it out")
    return nest(flat)


def _split(name: str, text: str) -> list[str]:
    found = [part.strip() for part in text.strip("[]").split(",")]
    if "" in found or len(set(found)) < len(found):
        raise ConfigError(f"{name}: expected different names with commas between them, got '{text}'")
    return found


def _numbers(name: str, text: str, *, least: int = 1, distinct: bool = True) -> list[int]:
    found = text.strip("[]").split(",")
    if not all(part.strip().isdecimal() and int(part) >= least for part in found) or (distinct and len(set(found)) < len(found)):
        raise ConfigError(
            f"{name}: expected {'different ' * distinct}whole numbers, {least} or more, with commas between them, got '{text}'"
        )
    return [int(part) for part in found]


def _for_each(name: str, values: list[T], count: int) -> list[T]:
    if len(values) not in (1, count):
        raise ConfigError(f"{name}: expected one number, or one for each of the {count} tasks and checkpoints, got {len(values)}")
    return values * count if len(values) == 1 else values


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: expected at least 1, got {value}")


def _line(row: PlannerRow) -> str:
    model, planner, _, candidates, *_, found, time = cells(row)
    return f"{model}, {planner}: {candidates if row.reason else f'return {found}, {time} ms'}"


def _print(made: dict[str, Any], console: Console) -> None:
    rows = parse_rows(made, "this run")
    table, winners = Table(box=SIMPLE, padding=(0, 1), pad_edge=False), best(rows)
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index in (0, 1, 3) else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            *cells(row), style="bold" if row in winners else "", end_section=following is not None and following.model != row.model
        )
    console.print(table)
    say(console, "return: mean over seeds (lowest..highest seed); ms: median of a decision in one environment, planners in turns")
    say(console, machine_line(made["machine"]))
