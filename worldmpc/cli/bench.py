"""``worldmpc bench``: speed against what the machine's matrix products allow; ``worldmpc bench planners`` is beside it."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from worldmpc import bench as measuring
from worldmpc.cli.bench_planners import bench_planners
from worldmpc.cli.errors import describe_error
from worldmpc.cli.output import check_target, console_for, say, write_json
from worldmpc.cli.text import BENCH
from worldmpc.cli.words import check_overrides, override_values, split_words
from worldmpc.config import ConfigError, RunConfig, make_config
from worldmpc.report.benchmarks import Record, Row, Verb, changes, common_and_varying, parse_record, read_record, same_machine
from worldmpc.report.provenance import machine_line


class Configuration(NamedTuple):
    """One row to measure, and the words that tell it from the others, empty where there are none."""

    label: str
    config: RunConfig


def bench(words: list[str]) -> int:
    """Measure every combination of values, print a table, and return the exit status."""
    if words[:1] == ["planners"]:
        return bench_planners(words[1:])
    options, rest = split_words(words, BENCH)
    sizes = {name: options[name] for name in ("obs_dim", "action_dim", "repeats", "seconds")}
    configurations = _configurations(rest)
    for each in configurations:
        measuring.check(each.config, **sizes)
    check_target(options["json"])
    old = None if options["compare"] is None else read_record(options["compare"])
    console, target = console_for(options["json"]), options["json"]
    record = measuring.record([])
    rows: list[dict[str, Any]] = record["rows"]
    status = 0
    try:
        for number, each in enumerate(configurations, 1):
            if each.label:
                say(console, f"{number} of {len(configurations)}: {each.label}")
            try:
                rows.append(measuring.bench(each.config, **sizes))
            except Exception as error:
                status = max(status, _report(each.label, error))
                continue
            if target != "-":
                write_json(target, record)
    finally:
        if rows:
            _print(parse_record(record, "this run"), old, console)
            if target == "-":
                write_json(target, record)
    return status


def _configurations(words: Sequence[str]) -> list[Configuration]:
    """Return one configuration per combination of values."""
    choices: list[list[str]] = []
    for override in check_overrides(words, sweep=True):
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            choices.append([f"{override.key_or_group}={text}" for text in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{override.input_line}: expected one value or a list of them, as in model.size=1,5")
    found: list[Configuration] = []
    for combination in itertools.product(*choices):
        label = " ".join(word for word, options in zip(combination, choices, strict=True) if len(options) > 1)
        found.append(Configuration(label, make_config(**override_values(combination))))
    return found


def _report(label: str, error: Exception) -> int:
    """Say in one line which configuration failed and why, and return the exit status."""
    status, message = describe_error(error)
    if os.environ.get("WORLDMPC_TRACEBACK") == "1":
        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"worldmpc: error: {label}{': ' * bool(label)}{message}\n")
    sys.stderr.flush()
    return status


def _print(record: Record, old: Record | None, console: Console) -> None:
    rows = record.rows
    common, varying = common_and_varying(rows)
    say(console, f"\n{', '.join(f'{name} {value}' for name, value in common.items())}")
    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
    columns = [{**own, **_numbers(row)} for own, row in zip(varying, rows, strict=True)]
    names = [name for name in {name: None for row in columns for name in row} if any(row.get(name, "") for row in columns)]
    for name in names:
        setting = name in varying[0]
        table.add_column(name if setting else name.replace(" ", "\n"), justify="left" if setting else "right", vertical="bottom")
    for row in columns:
        table.add_row(*(row.get(name) or "-" for name in names))
    console.print(table)
    say(console, "ms: median (p10..p90); limit: the needed matrix products alone, best time, in turns with the code; share: limit / median")
    for task in dict.fromkeys(row.task for row in rows if row.task):
        say(console, f"environment (random actions) and training: decisions per second on {task}")
    say(console, f"peak memory of the process {rows[-1].peak_rss_mib:.0f} MiB")
    say(console, machine_line(record.machine))
    if old is not None:
        _print_changes(record, old, console)


def _numbers(row: Row) -> dict[str, str]:
    """Return the measured columns of a row; an empty text is a number that was not measured."""
    return {
        **_verb("plan", row.plan),
        **_verb("update", row.update),
        "floor us": _plain(row.launch_floor_us, 1),
        "env/s": _plain(row.environment),
        "train/s": _plain(row.training, 1),
        "GPU MiB": _plain(row.peak_cuda_mib),
    }


def _verb(name: str, verb: Verb | None) -> dict[str, str]:
    if verb is None:
        return {f"{name} ms": ""}
    return {
        f"{name} ms": f"{_ms(verb.median_ms)} ({_ms(verb.p10_ms)}..{_ms(verb.p90_ms)})",
        f"{name} limit": _ms(verb.limit_ms),
        f"{name} fp32 limit": "" if verb.precision == "fp32" else _ms(verb.limit_fp32_ms),
        f"{name} share": f"{verb.fraction:.0%}",
        f"{name} compile s": _plain(verb.compile_s, 1),
    }


def _ms(number: float) -> str:
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _plain(number: float | None, digits: int = 0) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def _print_changes(record: Record, old: Record, console: Console) -> None:
    found = changes(record.rows, old.rows)
    if not found:
        say(console, f"no row of {old.source} has the settings of a row measured now")
        return
    measured = list(dict.fromkeys(change.row for change in found))
    common, varying = common_and_varying(measured)
    own = dict(zip(measured, varying, strict=True))
    say(console, f"\nagainst {old.source}")
    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
    for name in (*varying[0], ""):
        table.add_column(name)
    for name in ("old", "new", "speed", "old share", "new share"):
        table.add_column(name, justify="right")
    for change in found:
        times = [f"{_ms(number)} {change.unit}" for number in (change.old, change.new)]
        fractions = ["-" if fraction is None else f"{fraction:.0%}" for fraction in (change.old_fraction, change.new_fraction)]
        table.add_row(*own[change.row].values(), change.name, *times, f"{change.speed:.2f}x", *fractions)
    console.print(table)
    say(console, f"{len(measured)} of {len(record.rows)} rows have a counterpart there")
    say(console, f"old machine: {machine_line(old.machine)}")
    say(console, f"new machine: {machine_line(record.machine)}")
    if not same_machine(record.machine, old.machine):
        say(console, "warning: the machines differ, so times and speeds are not comparable; shares of the limit are")
