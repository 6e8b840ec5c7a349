"""Run folders and result files are read as they were written, and robustly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from worldmpc.report.runs import EVAL_COLUMNS, Run, RunError, export_results, find_runs, load_results, load_run
from worldmpc.training import logger

POINTS = [(0, 5.0), (10_000, 200.0), (20_000, 400.5)]


def test_reads_a_run_folder(make_folder: Callable[..., Path]) -> None:
    run = load_run(make_folder(POINTS, seed=3))
    assert (run.task, run.seed, run.agent, run.preset, run.action_repeat) == ("dmc/cartpole-swingup", 3, "tdmpc2", "cpu", 2)
    assert [(row.env_steps, row.return_mean) for row in run.evals] == POINTS
    assert run.evals[1].decisions == 5_000 and run.evals[1].prior_return_mean == 160
    assert math.isnan(run.evals[0].success)
    assert (run.env_steps, run.eval_interval, run.notes) == (20_000, 10_000, ())
    assert run.nearest(14_000).env_steps == 10_000 and run.nearest(15_000).env_steps == 10_000
    assert run.machine == "Test CPU, 2 cores, 8.0 GiB, no GPU, python 3.11, torch 2.13"


def test_columns_are_those_the_logger_writes() -> None:
    assert EVAL_COLUMNS == logger.EVAL_COLUMNS


@pytest.mark.parametrize("rest", ["15000,30000,15000,60", "15000,30000,15000,600,1,2,3,500,,1,10,3", "1"])
def test_a_cut_last_line_is_left_out_and_said(make_folder: Callable[..., Path], rest: str) -> None:
    folder = make_folder(POINTS)
    with (folder / "eval.csv").open("a") as file:
        file.write(rest)
    run = load_run(folder)
    assert run.env_steps == 20_000
    assert "last line was cut short" in run.notes[0]


def test_damage_elsewhere_is_an_error(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(POINTS)
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(text.replace("5000,10000", "5000,ten"))
    with pytest.raises(RunError, match=r"eval.csv, line 3: env_steps: expected a number, got 'ten'"):
        load_run(folder)
    (folder / "eval.csv").write_text(text.replace("5000,10000,", "5000,"))
    with pytest.raises(RunError, match="line 3: expected 12 columns, got 11"):
        load_run(folder)


def test_missing_files(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        load_run(tmp_path / "nothing")
    folder = make_folder(POINTS)
    (folder / "eval.csv").unlink()
    run = load_run(folder)
    assert run.evals == () and "no evaluation yet" in run.notes[0]
    with pytest.raises(RunError, match="no evaluation yet"):
        run.nearest(0)
    (folder / "meta.json").unlink()
    with pytest.raises(RunError, match=r"meta.json: missing; is .* a run folder\?"):
        load_run(folder)


def test_repeated_evaluations_count_once(make_folder: Callable[..., Path]) -> None:
    run = load_run(make_folder([*POINTS, (10_000, 250.0)]))
    assert [row.return_mean for row in run.evals] == [5.0, 250.0, 400.5]
    assert "1 repeated evaluation" in run.notes[0]


def test_results_round_trip(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    runs = [load_run(make_folder(POINTS, seed=seed)) for seed in (2, 1)]
    path = export_results(runs, tmp_path / "results" / "cartpole.csv")
    text = path.read_text()
    assert text.startswith("#") and "worldmpc train seed=1" in text and "abc123" in text and "Test CPU" in text
    back = load_results(path)
    expected = sorted(runs, key=lambda run: run.seed)
    assert [repr(run.evals) for run in back] == [repr(run.evals) for run in expected]
    blank = {"source": path}
    assert [repr(replace(run, **blank)) for run in back] == [repr(replace(run, **blank)) for run in expected]
    with pytest.raises(RunError, match="two runs of dmc/cartpole-swingup, tdmpc2, preset cpu, planner mppi, seed 1"):
        export_results([expected[0], expected[0]], path)
    with pytest.raises(RunError, match="no run"):
        export_results([], path)


def test_results_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "hand.csv"
    head = "# command: worldmpc train\n# commit: 42\n# machine: a box\n"
    file.write_text(f"{head}task,seed,env_steps,return_mean\ndmc/cup-catch,1,100000,950\n")
    (run,) = load_results(file)
    assert run.kind == ("dmc/cup-catch", "tdmpc2", "default", "mppi", "tdmpc2") and run.kind.name == "tdmpc2, default"
    assert (run.command, run.commit, run.machine) == ("worldmpc train", "42", "a box")
    file.write_text("task,seed,return_mean\ndmc/cup-catch,1,950\n")
    with pytest.raises(RunError, match="no column env_steps"):
        load_results(file)


def test_labels_keep_runs_apart(make_folder: Callable[..., Path], make_run: Callable[..., Run], tmp_path: Path) -> None:
    folder = make_folder(POINTS)
    assert load_run(folder).label == "tdmpc2"
    config = json.loads((folder / "config.json").read_text())
    for label, name in ((None, "tdmpc2"), ("multi-gamma", "multi-gamma")):
        (folder / "config.json").write_text(json.dumps(config | {"label": label}))
        assert load_run(folder).label == name
    runs = [make_run(POINTS), load_run(folder)]
    assert [run.kind.name for run in runs] == ["tdmpc2, cpu", "multi-gamma, cpu"]
    back = load_results(export_results(runs, tmp_path / "both.csv"))
    assert sorted((run.label, run.seed, run.agent, run.command or "") for run in back) == [
        ("multi-gamma", 1, "tdmpc2", "worldmpc train seed=1"),
        ("tdmpc2", 1, "tdmpc2", "worldmpc train"),
    ]
    with pytest.raises(RunError, match="planner mppi, label multi-gamma, seed 1"):
        export_results([runs[1], runs[1]], tmp_path / "both.csv")


def test_finds_folders_and_files(make_folder: Callable[..., Path], make_run: Callable[..., Run], tmp_path: Path) -> None:
    make_folder(POINTS, seed=1)
    make_folder(POINTS, seed=2, task="gym/Pendulum-v1")
    (tmp_path / "runs" / "speed.csv").write_text("what,seconds\nupdate,0.1\n")
    export_results([make_run(POINTS, task="dmc/cup-catch")], tmp_path / "runs" / "more" / "cup.csv")
    found = find_runs(tmp_path / "runs")
    assert sorted((run.task, run.seed) for run in found) == [("dmc/cartpole-swingup", 1), ("dmc/cup-catch", 1), ("gym/Pendulum-v1", 2)]
    assert len(find_runs([tmp_path / "runs" / "dmc", tmp_path / "runs" / "more" / "cup.csv"])) == 2
    with pytest.raises(RunError, match="no such file or folder"):
        find_runs([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no run folder"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(RunError, match="no column"):
        find_runs([tmp_path / "runs" / "speed.csv"])
