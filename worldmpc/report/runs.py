"""Reading run folders and result files, and writing the latter.

A run folder is what ``worldmpc train`` writes; a result file is a CSV of evaluations of one or more
runs, small enough to be committed as evidence. Both become a :class:`Run`.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from worldmpc.config import AGENTS, PlannerConfig, merge
from worldmpc.files import write_whole
from worldmpc.report.overrides import overrides_of
from worldmpc.report.provenance import machine_line

REQUIRED = ("task", "seed", "env_steps", "return_mean")
"""Columns without which a CSV is not a result file."""


class RunError(ValueError):
    """A run folder or result file that cannot be read; the message says which file and why."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run; NaN where a number was not recorded. The fields are the columns of ``eval.csv``."""

    decisions: int
    env_steps: int
    """Simulator steps."""
    updates: int
    return_mean: float
    return_min: float
    return_max: float
    return_std: float
    length_mean: float
    """Decisions."""
    success: float
    prior_return_mean: float
    episodes: int
    seconds: float


EVAL_COLUMNS = tuple(item.name for item in fields(Evaluation))
RESULT_COLUMNS = ("task", "agent", "preset", "planner", "label", "seed", *EVAL_COLUMNS)
_RECORDED = ("command", "commit", "machine", "action_repeat", "overrides")
_INTEGERS = {"decisions", "env_steps", "updates", "episodes"}


class Kind(NamedTuple):
    """What runs that differ by their seeds alone have in common."""

    task: str
    agent: str
    preset: str
    planner: str
    label: str

    @property
    def name(self) -> str:
        """Label and preset, and the planner where it is not the agent's usual one."""
        planner = "" if self.planner == usual_planner(self.agent) else f" with {self.planner}"
        return f"{self.label}{planner}, {self.preset}"


def usual_planner(agent: str) -> str:
    """Return the name of the planner that an agent has by default; an agent of this name may be none of ours."""
    return str(merge({"planner": {"name": PlannerConfig().name}}, AGENTS.get(agent, {}))["planner"]["name"])


@dataclass(frozen=True)
class Run:
    """One seed of one agent on one task."""

    task: str
    """Canonical, as in ``dmc/cartpole-swingup``."""
    seed: int
    agent: str
    preset: str
    planner: str
    """Its name; of a result file without that column, the agent's usual one."""
    label: str
    """What results and tables call the run; the agent's name where it was given none."""
    evals: tuple[Evaluation, ...]
    """By increasing simulator step, one per step."""
    source: Path
    """Run folder or result file."""
    action_repeat: int | None = None
    commit: str | None = None
    command: str | None = None
    machine: str | None = None
    overrides: Mapping[str, Any] | None = None
    """Dotted keys in which it differs from its preset, see :mod:`worldmpc.report.overrides`; ``None`` where a file does not say."""
    notes: tuple[str, ...] = field(default=())
    """What was tolerated while reading."""

    @property
    def kind(self) -> Kind:
        """What all seeds of one line in a table, or of one curve, have in common."""
        return Kind(self.task, self.agent, self.preset, self.planner, self.label)

    @property
    def env_steps(self) -> int:
        """Simulator steps of the last evaluation, 0 before the first."""
        return self.evals[-1].env_steps if self.evals else 0

    @property
    def eval_interval(self) -> int:
        """Usual distance between evaluations in simulator steps, 0 with fewer than two."""
        steps = [row.env_steps for row in self.evals]
        return int(statistics.median(b - a for a, b in zip(steps, steps[1:], strict=False))) if len(steps) > 1 else 0

    def nearest(self, step: int) -> Evaluation:
        """Return the evaluation nearest to a simulator step; of two equally near, the earlier one.

        Raises:
            RunError: the run has no evaluation.
        """
        if not self.evals:
            raise RunError(f"{self.source}: no evaluation yet")
        return min(self.evals, key=lambda row: (abs(row.env_steps - step), row.env_steps))


def load_run(path: str | Path) -> Run:
    """Read a finished or running run folder.

    A last line that a kill cut short is left out and named in ``notes``; a run before its first evaluation has none.

    Raises:
        RunError: no such folder, no ``config.json`` or ``meta.json``, or a file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder")
    config, meta = _read_json(folder / "config.json"), _read_json(folder / "meta.json")
    spec = meta.get("spec")
    spec = spec if isinstance(spec, Mapping) else {"task": spec}
    evals, notes = _read_evals(folder / "eval.csv")
    try:
        return Run(
            task=str(spec.get("task") or spec.get("name") or config["task"]),
            seed=int(config["seed"]),
            agent=str(config["agent"]),
            preset=str(config["preset"]),
            planner=str(config["planner"]["name"]),
            label=str(config.get("label") or config["agent"]),
            evals=evals,
            source=folder,
            action_repeat=spec.get("action_repeat", meta.get("action_repeat")),
            commit=meta.get("commit"),
            command=meta.get("command"),
            machine=machine_line(meta.get("machine")),
            overrides=overrides_of(config),
            notes=notes,
        )
    except KeyError as error:
        raise RunError(f"{folder / 'config.json'}: no key {error}") from error
    except (TypeError, ValueError) as error:
        raise RunError(f"{folder / 'config.json'}: {error}") from error


def load_result_folder(path: str | Path) -> list[Run]:
    """Read all result CSVs of a folder; those of folders in it belong to other tables.

    Raises:
        RunError: no such folder, or a result file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    return [run for file in sorted(folder.glob("*.csv")) if is_result_file(file) for run in load_results(file)]


def load_results(path: str | Path) -> list[Run]:
    """Read a result CSV: ``#`` lines of provenance, then one row per evaluation.

    Columns beyond task, seed, env_steps and return_mean may be missing.

    Raises:
        RunError: no such file, a missing column, or a row that cannot be read.
    """
    file = Path(path)
    text, notes = _complete_text(file)
    heads = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    shared, per_run = _read_head(file, heads)
    rows = _read_rows(file, text)
    missing = [name for name in REQUIRED if rows and name not in rows[0].values]
    if missing:
        raise RunError(f"{file}: no column {', '.join(missing)}")
    groups: dict[tuple[Kind, int], list[Evaluation]] = {}
    for row in rows:
        seed = _number(file, row.line, "seed", row.values["seed"], integer=True)
        groups.setdefault((_kind(row.values), int(seed)), []).append(_evaluation(file, row))
    runs = []
    for key, found in groups.items():
        evals, repeated = _in_order(file, found)
        head = shared | per_run.get(key, {})
        kind, seed = key
        known = {name: head.get(name) for name in _RECORDED}
        names = (kind.agent, kind.preset, kind.planner, kind.label)
        runs.append(Run(kind.task, seed, *names, evals, file, notes=notes + repeated, **known))
    return runs


def find_runs(paths: Iterable[str | Path] | str | Path) -> list[Run]:
    """Read every run below the given paths: run folders, folders of them at any depth, result CSVs.

    CSV files found inside a folder that are no result files are passed over; one that is named itself is an error.

    Raises:
        RunError: a path that does not exist, that holds no run, or a run that cannot be read.
    """
    runs: list[Run] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not path.exists():
            raise RunError(f"{path}: no such file or folder")
        found = load_results(path) if path.is_file() else _find_below(path)
        if not found:
            raise RunError(f"{path}: no run folder and no result CSV in it")
        runs += found
    return runs


def export_results(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the evaluations of runs as a result CSV that can be committed, and return its path.

    Command, commit, machine and overrides of every run stand in ``# run:`` lines, one JSON record each.

    Raises:
        RunError: no run, a run without evaluation, or two runs of one task, agent, preset, planner, label and seed.
    """
    path = Path(path)
    if not runs:
        raise RunError(f"{path}: no run to export")
    ordered = sorted(runs, key=_identity)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if _identity(before) == _identity(after):
            raise RunError(f"{path}: two runs of {_describe(before)}: {before.source} and {after.source}")
    for run in ordered:
        if not run.evals:
            raise RunError(f"{run.source}: no evaluation yet, nothing to export")
    out = io.StringIO()
    out.write("# worldmpc results, one row per evaluation; env_steps are simulator steps, returns are undiscounted\n")
    for run in ordered:
        head = {**run.kind._asdict(), "seed": run.seed}
        head |= {name: getattr(run, name) for name in _RECORDED}
        out.write(f"# run: {json.dumps(head)}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(RESULT_COLUMNS)
    for run in ordered:
        for row in run.evals:
            writer.writerow([*run.kind, run.seed, *(_cell(getattr(row, name)) for name in EVAL_COLUMNS)])
    write_whole(path, out.getvalue())
    return path


def is_result_file(file: Path) -> bool:
    """Return whether a CSV has the columns of a result file (benchmarks and the like have others)."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        header = next((line for line in lines if not line.startswith("#")), "")
    return set(REQUIRED) <= set(header.strip().split(","))


class _Row(NamedTuple):
    line: int
    values: dict[str, str]


def _identity(run: Run) -> tuple[Kind, int]:
    return run.kind, run.seed


def _describe(run: Run) -> str:
    label = "" if run.label == run.agent else f", label {run.label}"
    return f"{run.task}, {run.agent}, preset {run.preset}, planner {run.planner}{label}, seed {run.seed}"


def _kind(values: Mapping[str, Any]) -> Kind:
    """Of a result file's row or header record; older ones have fewer columns."""
    agent = values.get("agent") or "tdmpc2"
    planner, label = values.get("planner") or usual_planner(agent), values.get("label") or agent
    return Kind(values["task"], agent, values.get("preset") or "default", planner, label)


def _find_below(folder: Path) -> list[Run]:
    if (folder / "config.json").exists():
        return [load_run(folder)]
    runs: list[Run] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            runs += _find_below(entry)
        elif entry.suffix == ".csv" and is_result_file(entry):
            runs += load_results(entry)
    return runs


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise RunError(f"{file}: missing; is {file.parent} a run folder?")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise RunError(f"{file}: expected a JSON object, got a {type(data).__name__}")
    return data


def _read_evals(file: Path) -> tuple[tuple[Evaluation, ...], tuple[str, ...]]:
    if not file.exists():
        return (), (f"{file}: no evaluation yet",)
    text, notes = _complete_text(file)
    evals, repeated = _in_order(file, [_evaluation(file, row) for row in _read_rows(file, text)])
    return evals, notes + repeated


def _complete_text(file: Path) -> tuple[str, tuple[str, ...]]:
    """Text up to the last line break: what follows is a line that was cut while being written."""
    if not file.exists():
        raise RunError(f"{file}: no such file")
    whole = file.read_text(encoding="utf-8", errors="replace")
    complete, newline, rest = whole.rpartition("\n")
    notes = (f"{file}: last line was cut short and is left out",) if rest else ()
    return complete + newline, notes


def _read_rows(file: Path, text: str) -> list[_Row]:
    rows: list[_Row] = []
    header: list[str] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        cells = next(csv.reader([line]))
        if header is None:
            header = cells
        elif len(cells) != len(header):
            raise RunError(f"{file}, line {number}: expected {len(header)} columns, got {len(cells)}")
        else:
            rows.append(_Row(number, dict(zip(header, cells, strict=True))))
    return rows


def _read_head(file: Path, lines: Sequence[str]) -> tuple[dict[str, Any], dict[tuple[Kind, int], dict[str, Any]]]:
    """``# command: ...`` and the like hold for all runs of the file, ``# run: {...}`` for one."""
    shared: dict[str, Any] = {}
    per_run: dict[tuple[Kind, int], dict[str, Any]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if name == "run":
            try:
                record = json.loads(value)
                per_run[_kind(record), int(record["seed"])] = record
            except (json.JSONDecodeError, KeyError) as error:
                raise RunError(f"{file}: cannot read header '# {line}'") from error
        elif colon and name in ("command", "commit", "machine"):
            shared[name] = value.strip()
    return shared, per_run


def _evaluation(file: Path, row: _Row) -> Evaluation:
    for name in ("env_steps", "return_mean"):
        if name not in row.values:
            raise RunError(f"{file}: no column {name}")
    return Evaluation(**{name: _number(file, row.line, name, row.values.get(name, ""), name in _INTEGERS) for name in EVAL_COLUMNS})


def _number(file: Path, line: int, name: str, text: str, integer: bool) -> Any:
    if not text:
        if name in ("env_steps", "seed"):
            raise RunError(f"{file}, line {line}: no {name}")
        return 0 if integer else float("nan")
    try:
        return int(float(text)) if integer else float(text)
    except (ValueError, OverflowError) as error:
        raise RunError(f"{file}, line {line}: {name}: expected a number, got '{text}'") from error


def _in_order(file: Path, evals: Sequence[Evaluation]) -> tuple[tuple[Evaluation, ...], tuple[str, ...]]:
    """Sort by step; of several evaluations at one step the last written counts."""
    by_step = {row.env_steps: row for row in evals}
    notes = (f"{file}: {len(evals) - len(by_step)} repeated evaluation(s); the last one counts",) if len(by_step) < len(evals) else ()
    return tuple(by_step[step] for step in sorted(by_step)), notes


def _cell(value: float) -> str:
    """Numbers as text; NaN as an empty cell."""
    if isinstance(value, int):
        return str(value)
    return "" if value != value else f"{value:.8g}"
