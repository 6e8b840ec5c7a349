"""Where a run's numbers go: metrics.jsonl, eval.csv, TensorBoard, and the console.

The logger takes plain numbers; nothing in here looks at tensors. Importing this file does not import torch or TensorBoard.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from worldmpc.config import LogConfig
from worldmpc.files import write_whole

COUNTERS = ("decisions", "env_steps", "updates", "episodes")
EVAL_COLUMNS = (
    "decisions",
    "env_steps",
    "updates",
    "return_mean",
    "return_min",
    "return_max",
    "return_std",
    "length_mean",
    "success",
    "prior_return_mean",
    "episodes",
    "seconds",
)
_RATE_WINDOW = 30.0
"""Seconds over which the displayed rates are taken."""


class Throughput:
    """Rates of named counters, since the last call and overall, without the time spent in :meth:`paused`.

    ``Throughput(decisions=5000)`` starts from the counters of a resumed run.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, earlier: float = 0.0, **counters: float) -> None:
        """Start the clock at the given counters; counters that are not named start at 0. ``earlier``: seconds of a resumed run so far."""
        self._clock = clock
        self._earlier = earlier
        self._idle = 0.0
        self._start = self._last = self._now()
        self._first = dict(counters)
        self._before = dict(counters)

    def since_last(self, **counters: float) -> dict[str, float]:
        """Return ``{"time/decisions_per_s": ...}`` since the last call, for each counter given (per second)."""
        now = self._now()
        rates = _rates(counters, self._before, now - self._last)
        self._last = now
        self._before |= counters
        return rates

    def overall(self, **counters: float) -> dict[str, float]:
        """Return ``{"time/decisions_per_s": ...}`` since the start, for each counter given (per second)."""
        return _rates(counters, self._first, self._now() - self._start)

    @property
    def seconds(self) -> float:
        """Seconds since the start, without pauses, and those of a resumed run before it."""
        return self._earlier + self._now() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the rates, as for an evaluation."""
        begin = self._clock()
        try:
            yield
        finally:
            self._idle += self._clock() - begin

    def _now(self) -> float:
        return self._clock() - self._idle


class _Console(Console):
    """A console whose reader may go away, as that of ``| head``: what is shown must not end what is done."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class RunLogger:
    """Writes the numbers of one run into its folder and shows them.

    Files are opened at the first record. A folder that already holds records is continued only after :meth:`truncate`.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        config: LogConfig | None = None,
        *,
        total_env_steps: int | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        plain_seconds: float = 10.0,
    ) -> None:
        """Prepare the sinks; without a folder only the console can be used.

        total_env_steps: simulator steps the run goes to, for bar and time left. plain_seconds: between plain progress lines.
        """
        self.run_dir = Path(run_dir or ".")
        if run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self._config = config or LogConfig()
        self._console = console or _Console()
        self._metrics_path = self.run_dir / "metrics.jsonl"
        self._eval_path = self.run_dir / "eval.csv"
        self._snapshots_path = self.run_dir / "snapshots.jsonl"
        self._games_path = self.run_dir / "games.jsonl"
        self._metrics: TextIO | None = None
        self._games: TextIO | None = None
        self._snapshots: TextIO | None = None
        self._evals: TextIO | None = None
        self._writer: Any = None
        self._tensorboard = self._config.tensorboard
        self._continues = False
        self._purge_step: int | None = None
        mode = self._config.progress
        mode = ("live" if self._console.is_terminal else "plain") if mode == "auto" else mode
        self._display = _Display(self._console, mode, total_env_steps, clock, plain_seconds)

    def __enter__(self) -> RunLogger:
        """Return the logger; :meth:`close` is called at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def truncate(self, decisions: int) -> None:
        """Continue a run from a checkpoint: drop all records later than it, and whatever a kill cut short.

        Call once, before the first record. Also hides the dropped part in TensorBoard.

        decisions: counter of the checkpoint.

        Raises:
            ValueError: a line before the last of either file cannot be read.
            RuntimeError: records were written before.
        """
        if self._metrics is not None or self._evals is not None or self._writer is not None:
            raise RuntimeError("truncate: call it before the first record")
        records = _keep_records(self._metrics_path, decisions)
        rows = _keep_evals(self._eval_path, decisions)
        _keep_records(self._snapshots_path, decisions)
        _keep_records(self._games_path, decisions)
        self._display.remember(records[-1] if records else {})
        if rows:
            self._display.remember({f"eval/{name}": float(value) for name, value in rows[-1].items() if value})
        last = [int(record["env_steps"]) for record in records[-1:]] + [int(float(row["env_steps"])) for row in rows[-1:]]
        self._purge_step = max(last) + 1 if last else 0
        self._continues = True

    def log(self, record: Mapping[str, float]) -> None:
        """Append a record to metrics.jsonl and TensorBoard (over simulator steps).

        ``record`` holds the counters decisions, env_steps, updates, episodes, and metrics named ``group/name``. Numbers that are not
        finite become null in metrics.jsonl.

        Raises:
            ValueError: a counter is missing.
            FileExistsError: the folder holds an earlier run that is not being continued.
        """
        missing = [name for name in COUNTERS if name not in record]
        if missing:
            raise ValueError(f"log: record without {', '.join(missing)}")
        if self._metrics is None:
            self._metrics = self._open(self._metrics_path)
        plain = {name: int(value) if name in COUNTERS else float(value) for name, value in record.items()}
        safe = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        self._metrics.write(json.dumps(safe, allow_nan=False) + "\n")
        self._metrics.flush()
        self._scalars({name: value for name, value in plain.items() if name not in COUNTERS}, int(plain["env_steps"]))
        self._display.remember(plain)

    def log_eval(self, row: Mapping[str, float | None]) -> None:
        """Append an evaluation to eval.csv and TensorBoard (``eval/<column>`` over simulator steps).

        ``row`` holds some of :data:`EVAL_COLUMNS`, at least decisions, env_steps and return_mean; None and NaN become empty cells.

        Raises:
            ValueError: an unknown column, or one of the three is missing.
            FileExistsError: the folder holds an earlier run that is not being continued.
        """
        unknown = [name for name in row if name not in EVAL_COLUMNS]
        missing = [name for name in ("decisions", "env_steps", "return_mean") if row.get(name) is None]
        if unknown or missing:
            raise ValueError(f"log_eval: unknown column {', '.join(unknown)}" if unknown else f"log_eval: row without {', '.join(missing)}")
        if self._evals is None:
            self._evals = self._open(self._eval_path)
            if not self._eval_path.stat().st_size:
                self._evals.write(",".join(EVAL_COLUMNS) + "\n")
        self._evals.write(",".join(_cell(row.get(name)) for name in EVAL_COLUMNS) + "\n")
        self._evals.flush()
        scalars = {f"eval/{name}": float(value) for name, value in row.items() if value is not None and name not in COUNTERS}
        self._scalars({name: value for name, value in scalars.items() if not math.isnan(value)}, int(row["env_steps"] or 0))
        self._display.remember(scalars)
        if self._writer is not None:
            self._writer.flush()

    def log_snapshot(self, record: Mapping[str, Any]) -> None:
        """Append plain nested data about a few examples, with its ``decisions``, to snapshots.jsonl.

        Raises:
            ValueError: there is no ``decisions``, or a number that is not finite.
            FileExistsError: the folder holds an earlier run that is not being continued.
        """
        self._snapshots = self._append("log_snapshot", record, self._snapshots, self._snapshots_path)

    def log_game(self, record: Mapping[str, Any]) -> None:
        """Append a game of training, or a series of an evaluation, with its ``decisions`` to games.jsonl, and a score to TensorBoard.

        Raises:
            ValueError: there is no ``decisions``, or a number that is not finite.
            FileExistsError: the folder holds an earlier run that is not being continued.
        """
        self._games = self._append("log_game", record, self._games, self._games_path)
        if "score" in record:
            self._scalars({f"eval/score_{record['opponent']}": float(record["score"])}, int(record["env_steps"]))

    def message(self, text: str) -> None:
        """Show a line on the console, whatever the progress display."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, rows: Sequence[Mapping[str, object]], title: str = "parameters") -> None:
        """Show a table once, such as the parameters per network; the keys of the first row are the columns."""
        if self._config.progress == "none" or not rows:
            return
        table = Table(title=title, title_justify="left")
        for name, value in rows[0].items():
            table.add_column(name, justify="right" if isinstance(value, int | float) else "left")
        for row in rows:
            table.add_row(*(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in rows[0]))
        self._console.print(table)

    def progress(self, decisions: int, env_steps: int, updates: int) -> None:
        """Show how far the run is; cheap enough to be called after every decision.

        Rates, time left, and the last return and losses seen by :meth:`log` and :meth:`log_eval` are added.
        """
        self._display.update(decisions, env_steps, updates)

    def close(self) -> None:
        """Show the last state, and flush and close everything; further calls do nothing."""
        self._display.close()
        for file in (self._metrics, self._evals, self._snapshots, self._games):
            if file is not None:
                file.close()
        if self._writer is not None:
            self._writer.close()
        self._metrics = self._evals = self._snapshots = self._games = self._writer = None

    def _append(self, verb: str, record: Mapping[str, Any], file: TextIO | None, path: Path) -> TextIO:
        """Append a line of JSON to a file, opened where it is not yet."""
        if "decisions" not in record:
            raise ValueError(f"{verb}: record without decisions")
        file = self._open(path) if file is None else file
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        return file

    def _open(self, path: Path) -> TextIO:
        if not self._continues and path.exists() and path.stat().st_size:
            raise FileExistsError(f"{path}: holds an earlier run; resume it, choose another run_dir, or remove it")
        return path.open("a", encoding="utf-8", newline="")

    def _scalars(self, values: Mapping[str, float], env_steps: int) -> None:
        if self._tensorboard and self._writer is None:
            self._writer = self._make_writer()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, env_steps)

    def _make_writer(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self._tensorboard = False
            self.message(f"warning: no TensorBoard events, its import failed ({error}); metrics.jsonl has the same numbers")
            return None
        return SummaryWriter(str(self.run_dir / "tb"), purge_step=self._purge_step)


class _Display:
    """Live bar on a terminal, or a plain line now and then."""

    def __init__(
        self,
        console: Console,
        mode: Literal["live", "plain", "none"],
        total: int | None,
        clock: Callable[[], float],
        plain_seconds: float,
    ) -> None:
        self._console = console
        self._mode = mode
        self._total = total
        self._clock = clock
        # Four refreshes a second look live; a refreshing thread would take the interpreter from the training loop.
        self._seconds = 0.25 if mode == "live" else plain_seconds
        self._shown_at = clock()
        self._history: deque[tuple[float, int, int, int]] = deque()
        self._known: dict[str, float] = {}
        self._pending = False
        self._live: Live | None = None
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"))
        self._bar = Progress(*columns, auto_refresh=False, expand=True)
        self._task = self._bar.add_task("simulator steps", total=total)

    def remember(self, record: Mapping[str, float]) -> None:
        wanted = ("eval/return_mean", "eval/prior_return_mean")
        self._known |= {name: value for name, value in record.items() if name in wanted or (name.startswith("train/") and "loss" in name)}

    def update(self, decisions: int, env_steps: int, updates: int) -> None:
        if self._mode == "none":
            return
        now = self._clock()
        entry = (now, decisions, env_steps, updates)
        if not self._history:
            self._history.append(entry)
        self._last = entry
        self._pending = True
        if now - self._shown_at >= self._seconds:
            self._show(now)

    def close(self) -> None:
        if self._pending:
            self._show(self._clock())
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, now: float) -> None:
        self._shown_at = now
        self._pending = False
        if self._history[-1][0] < self._last[0]:
            self._history.append(self._last)
        while len(self._history) > 2 and now - self._history[1][0] >= _RATE_WINDOW:
            self._history.popleft()
        if self._mode == "plain":
            self._console.print("  ".join(self._parts()), markup=False, highlight=False, soft_wrap=True)
            return
        self._bar.update(self._task, completed=self._last[2])
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self._live.start()
        self._live.update(Group(self._bar, Text("  ".join(self._parts()))), refresh=True)

    def _parts(self) -> list[str]:
        (begin, *old), (end, *new) = self._history[0], self._last
        seconds = end - begin
        decision_rate, step_rate, update_rate = ((b - a) / seconds if seconds > 0 else 0.0 for a, b in zip(old, new, strict=True))
        decisions, env_steps, _ = new
        of_total = f"/{self._total:,}" if self._total else ""
        parts = [f"env_steps {env_steps:,}{of_total}", f"decisions {decisions:,}"]
        parts.append(f"{decision_rate:.1f} decisions/s  {update_rate:.1f} updates/s")
        if self._total and step_rate > 0:
            parts.append(f"left {_duration((self._total - env_steps) / step_rate)}")
        names = {"eval/return_mean": "return", "eval/prior_return_mean": "prior"}
        for name in [*names, *sorted(name for name in self._known if name not in names)]:
            if name in self._known:
                digits = ".1f" if name in names else ".3g"
                parts.append(f"{names.get(name, name.removeprefix('train/'))} {self._known[name]:{digits}}")
        return parts


def _rates(now: Mapping[str, float], before: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {f"time/{name}_per_s": (value - before.get(name, 0)) / seconds if seconds > 0 else 0.0 for name, value in now.items()}


def _duration(seconds: float) -> str:
    """3700 -> 1:01:40."""
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.8g}"


def _keep_records(path: Path, decisions: int) -> list[dict[str, Any]]:
    """Rewrite metrics.jsonl without what is later than ``decisions``; return what stays."""
    kept: list[dict[str, Any]] = []
    lines: list[str] = []
    for number, line in _complete_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a JSON record ({error.msg})") from error
        if record["decisions"] <= decisions:
            kept.append({name: math.nan if value is None else value for name, value in record.items()})
            lines.append(line)
    _replace(path, lines)
    return kept


def _keep_evals(path: Path, decisions: int) -> list[dict[str, str]]:
    """Rewrite eval.csv without what is later than ``decisions``; return what stays."""
    numbered = list(_complete_lines(path))
    if not numbered:
        _replace(path, [])
        return []
    header = next(csv.reader(io.StringIO(numbered[0][1])))
    kept: list[dict[str, str]] = []
    lines = [numbered[0][1]]
    for number, line in numbered[1:]:
        cells = next(csv.reader(io.StringIO(line)), [])
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: expected {len(header)} columns, got {len(cells)}")
        row = dict(zip(header, cells, strict=True))
        if int(float(row["decisions"])) <= decisions:
            kept.append(row)
            lines.append(line)
    _replace(path, lines)
    return kept


def _complete_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(Number, line) of all lines that end in a line break; one that does not was cut while being written."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            yield number, line.rstrip("\r\n")


def _replace(path: Path, lines: Sequence[str]) -> None:
    """Write the whole file at once, so that a kill in between loses nothing; no file stays no file."""
    if path.exists():
        write_whole(path, "".join(f"{line}\n" for line in lines))
