"""``worldmpc compare``, ``worldmpc report`` and ``worldmpc tasks``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldmpc.cli.output import console_for
from worldmpc.cli.text import COMPARE, REPORT
from worldmpc.cli.words import Option, split_words
from worldmpc.config import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from worldmpc.report.runs import Run


def compare(words: list[str]) -> int:
    """Hold runs against published curves, or variants against each other."""
    from worldmpc.report import compare as comparison
    from worldmpc.report.runs import find_runs
    from worldmpc.report.variant_tables import print_variants
    from worldmpc.report.variants import DEFAULT_BASELINE, compare_variants

    options, paths = _paths(words, COMPARE, "compare")
    variants, at, baseline, file = options["variants"] == "true", options["at"], options["baseline"], options["json"]
    if at is not None and at < 1:
        raise ConfigError(f"at: expected a simulator step above 0, got {at}")
    if baseline and not variants:
        raise ConfigError("baseline: needs variants=true")
    algorithms = options["algorithm"].split(",") if variants else [options["algorithm"]]
    for name in algorithms:
        _check_algorithm(name)
    runs = find_runs(paths)
    if variants:
        _show(compare_variants(runs, algorithms, at, baseline or DEFAULT_BASELINE), print_variants, file)
    else:
        _show(comparison.compare(runs, algorithms[0], at), comparison.print_comparisons, file)
    return 0


def report(words: list[str]) -> int:
    """Draw the learning curves of runs, and export their evaluations."""
    from worldmpc.report.curves import plot_curves
    from worldmpc.report.runs import export_results, find_runs

    options, paths = _paths(words, REPORT, "report")
    _check_algorithm(options["algorithm"])
    runs = find_runs(paths)
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        sys.stdout.write(f"{note}\n")
    if options["export"]:
        sys.stdout.write(f"wrote {export_results(runs, options['export'])}\n")
    if options["out"] or not options["export"]:
        out = options["out"] or "curves.png"
        plot_curves(runs, out, options["algorithm"])
        sys.stdout.write(f"wrote {out}\n")
        _draw_goals(runs, Path(out))
    return 0


def _draw_goals(runs: Sequence[Run], out: Path) -> None:
    """Draw the goals of those runs that followed some into an image beside that of the curves."""
    from worldmpc.report.goals import GOALS, load_goals, plot_goals

    files = {f"{run.task}, {run.source}": run.source / GOALS for run in runs if (run.source / GOALS).is_file()}
    if files:
        target = out.with_name(f"{out.stem}-goals{out.suffix}")
        plot_goals({name: load_goals(file) for name, file in files.items()}, target)
        sys.stdout.write(f"wrote {target}\n")


def tasks(words: list[str]) -> int:
    """List the names of all tasks, and those that stand for a task with an agent; or of one suite."""
    from worldmpc.config import NAMED_TASKS
    from worldmpc.envs import list_tasks

    if len(words) > 1:
        raise ConfigError(f"tasks: expected one suite at most, got {' '.join(words)}")
    names = list_tasks(words[0]) if words else [*list_tasks(), *NAMED_TASKS]
    sys.stdout.write("\n".join(names) + "\n")
    return 0


def _show(found: Any, show: Callable[[Any, Console], None], file: str | None) -> None:
    """Print what was found; as JSON also into a file, or instead for ``-``."""
    from worldmpc.report.compare import to_json

    if file == "-":
        sys.stdout.write(to_json(found))
        return
    show(found, console_for(None))
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        to_json(found, file)


def _paths(words: list[str], options: Mapping[str, Option], command: str) -> tuple[dict[str, Any], list[str]]:
    values, paths = split_words(words, options)
    for word in paths:
        name, equals, _ = word.partition("=")
        if equals and "/" not in name:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"options are {', '.join(options)}"
            raise ConfigError(f"{word}: unknown option; {hint} (a path with '=' in it begins with ./)")
    if not paths:
        raise ConfigError(f"{command}: expected at least one path, as in `worldmpc {command} runs`")
    return values, paths


def _check_algorithm(name: str) -> None:
    from worldmpc.report.reference import algorithms

    if name not in algorithms():
        near = difflib.get_close_matches(name, algorithms(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(algorithms())}"
        raise ConfigError(f"algorithm: unknown reference algorithm '{name}'; {hint}")
