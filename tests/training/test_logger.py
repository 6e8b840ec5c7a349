"""Sinks of the logger: what goes in comes out, a resumed run leaves no trace of what it lost."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from worldmpc.config import LogConfig
from worldmpc.training.logger import EVAL_COLUMNS, RunLogger, Throughput

QUIET = LogConfig(tensorboard=False, progress="none")


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        """Start at 100 s."""
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def record(decisions: int, loss: float = 1.0) -> dict[str, float]:
    """A record after some decisions, at action repeat 2."""
    return {"decisions": decisions, "env_steps": 2 * decisions, "updates": decisions, "episodes": 0, "train/loss": loss}


def evaluation(decisions: int, value: float) -> dict[str, float | None]:
    """An evaluation after some decisions, at action repeat 2."""
    return {"decisions": decisions, "env_steps": 2 * decisions, "updates": 0, "return_mean": value, "success": None}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(Step, value) of a tag as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_files(tmp_path: Path) -> None:
    with RunLogger(tmp_path / "run", QUIET) as log:
        log.log(record(10, 0.5))
        log.log(record(20, float("nan")))
        log.log_eval(evaluation(10, 123.456))
        # Readable while the run goes on.
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"decisions": 10, "env_steps": 20, "updates": 10, "episodes": 0, "train/loss": 0.5}
    assert json.loads(lines[1])["train/loss"] is None
    assert (tmp_path / "run" / "eval.csv").read_text().splitlines() == [",".join(EVAL_COLUMNS), "10,20,0,123.456,,,,,,,,"]
    assert not (tmp_path / "run" / "tb").exists()


def test_wrong_records(tmp_path: Path) -> None:
    log = RunLogger(tmp_path, QUIET)
    with pytest.raises(ValueError, match="record without env_steps, updates, episodes"):
        log.log({"decisions": 1})
    with pytest.raises(ValueError, match="unknown column retrun_mean"):
        log.log_eval({"retrun_mean": 1.0})
    with pytest.raises(ValueError, match="row without return_mean"):
        log.log_eval({"decisions": 1, "env_steps": 2})


def test_an_earlier_run_is_not_mixed_in(tmp_path: Path) -> None:
    with RunLogger(tmp_path, QUIET) as log:
        log.log(record(10))
    with RunLogger(tmp_path, QUIET) as log, pytest.raises(FileExistsError, match="holds an earlier run"):
        log.log(record(10))


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with RunLogger(tmp_path, LogConfig(progress="none")) as log:
        for decisions in (10, 20, 30, 40):
            log.log(record(decisions, float(decisions)))
        for decisions in (0, 25, 35):
            log.log_eval(evaluation(decisions, float(decisions)))
    for name in ("metrics.jsonl", "eval.csv"):
        with (tmp_path / name).open("a") as file:
            file.write('{"decisions": 5' if name == "metrics.jsonl" else "45,90")
    with RunLogger(tmp_path, LogConfig(progress="none")) as log:
        log.truncate(30)
        log.log(record(40, -40.0))
        log.log_eval(evaluation(35, -35.0))
        with pytest.raises(RuntimeError, match="before the first record"):
            log.truncate(30)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["decisions"], row["train/loss"]) for row in records] == [(10, 10), (20, 20), (30, 30), (40, -40)]
    rows = [line.split(",")[:4] for line in (tmp_path / "eval.csv").read_text().splitlines()[1:]]
    assert rows == [["0", "0", "0", "0"], ["25", "50", "0", "25"], ["35", "70", "0", "-35"]]
    assert scalars(tmp_path, "train/loss") == [(20, 10), (40, 20), (60, 30), (80, -40)]
    assert scalars(tmp_path, "eval/return_mean") == [(0, 0), (50, 25), (70, -35)]
    assert list(tmp_path.glob(".*.partial")) == []


def test_resume_before_anything_was_written(tmp_path: Path) -> None:
    (tmp_path / "eval.csv").write_text("decisions,env_st")
    with RunLogger(tmp_path, QUIET) as log:
        log.truncate(100)
        log.log_eval(evaluation(110, 1.0))
    assert (tmp_path / "eval.csv").read_text().startswith(",".join(EVAL_COLUMNS) + "\n110,220")


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"decisions": 1, "env_st\n{"decisions": 2, "env_steps": 4}\n')
    with pytest.raises(ValueError, match="line 1: not a JSON record"):
        RunLogger(tmp_path, QUIET).truncate(5)


def test_missing_tensorboard_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError("no tensorboard here")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    out = io.StringIO()
    with RunLogger(tmp_path, LogConfig(progress="none"), console=Console(file=out, width=200)) as log:
        log.log(record(10))
        log.log(record(20))
    assert out.getvalue().count("no tensorboard here") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_plain_progress(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=80)
    with RunLogger(tmp_path, LogConfig(tensorboard=False), total_env_steps=1000, console=console, clock=clock) as log:
        log.log({**record(1), "train/reward_loss": 0.25})
        log.log_eval({**evaluation(1, 12.5), "prior_return_mean": 7.0})
        for decisions in range(0, 251):
            log.progress(decisions, 2 * decisions, decisions)
            clock.now += 0.125
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == (
        "env_steps 160/1,000  decisions 80  8.0 decisions/s  8.0 updates/s  left 0:00:52  return 12.5  prior 7.0  loss 1  reward_loss 0.25"
    )
    assert lines[-1].startswith("env_steps 500/1,000  decisions 250")


def test_live_progress(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with RunLogger(tmp_path, LogConfig(tensorboard=False), total_env_steps=1000, console=console, clock=clock) as log:
        for decisions in (0, 100, 200, 500):
            log.progress(decisions, 2 * decisions, decisions)
            clock.now += 1.0
        log.message("a checkpoint [1] was written")
    assert "100%" in out.getvalue() and "decisions 500" in out.getvalue() and "a checkpoint [1] was written" in out.getvalue()


def test_none_is_silent_but_for_messages(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    with RunLogger(tmp_path, QUIET, total_env_steps=10, console=Console(file=out), clock=clock) as log:
        log.progress(0, 0, 0)
        clock.now += 100
        log.progress(5, 10, 5)
        log.table([{"network": "encoder", "parameters": 12345}])
        log.message("hello")
    assert out.getvalue() == "hello\n"


def test_table(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunLogger(tmp_path, LogConfig(tensorboard=False), console=Console(file=out, width=80)) as log:
        log.table([{"network": "encoder", "parameters": 12345}, {"network": "policy", "parameters": 7}])
    assert "12,345" in out.getvalue() and "parameters" in out.getvalue()


def test_throughput() -> None:
    clock = Clock()
    rates = Throughput(clock, decisions=1000)
    clock.now += 10
    assert rates.since_last(decisions=1200, updates=50) == {"time/decisions_per_s": 20, "time/updates_per_s": 5}
    with rates.paused():
        clock.now += 1000
    clock.now += 10
    assert rates.since_last(decisions=1300, updates=50) == {"time/decisions_per_s": 10, "time/updates_per_s": 0}
    assert rates.overall(decisions=1300) == {"time/decisions_per_s": 15}
    assert rates.seconds == 20
    assert rates.since_last(decisions=1400) == {"time/decisions_per_s": 0}
