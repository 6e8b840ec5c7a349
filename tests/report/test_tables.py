"""The tables of results and benchmarks in markdown files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.report.test_benchmarks import GPU, bench_record, bench_row
from worldmpc.report.runs import Run, export_results
from worldmpc.report.tables import benchmarks_table, block_marks, main, results_table

BEGIN, END = block_marks("results")


@pytest.fixture
def project(make_run: Callable[..., Run], tmp_path: Path) -> Path:
    """A folder with two result files and a README with a marked block."""
    cartpole = [make_run([(0, 1.0), (50_000, 500.0), (100_000, 830.0 + seed)], seed=seed) for seed in (1, 2, 3)]
    export_results(cartpole, tmp_path / "results" / "cartpole.csv")
    export_results([make_run([(0, -1400.0), (20_000, -200.0)], task="gym/Pendulum-v1")], tmp_path / "results" / "pendulum.csv")
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nEnd.\n")
    return tmp_path


def test_table(project: Path) -> None:
    lines = results_table(project / "results").splitlines()
    assert lines[2] == (
        "| dmc/cartpole-swingup | cpu | 3 | 100,000 | **832** (831..833) | 666 | 839 (790..868) | pass | `results/cartpole.csv` |"
    )
    assert lines[3] == "| gym/Pendulum-v1 | cpu | 1 (*) | 20,000 | **-200** (-200..-200) | -160 | - | - | `results/pendulum.csv` |"
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_rewrite_then_check(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, options = project / "README.md", ["--results", str(project / "results")]
    before = readme.read_text()
    assert main([str(readme), "--check", *options]) == 1
    assert "stale" in capsys.readouterr().out
    assert readme.read_text() == before
    assert main([str(readme), *options]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nEnd.\n") and "cartpole-swingup" in text and "old" not in text
    assert main([str(readme), "--check", *options]) == 0
    (project / "results" / "pendulum.csv").unlink()
    assert main([str(readme), "--check", *options]) == 1


def test_unusable_files(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = project / "other.md"
    other.write_text("no markers")
    assert main([str(other), "--results", str(project / "results")]) == 2
    assert "expected exactly one block" in capsys.readouterr().err
    assert main([str(project / "none.md"), "--results", str(project / "results")]) == 2
    assert main([str(project / "README.md"), "--results", str(project / "nowhere")]) == 2


def write_benchmarks(project: Path) -> Path:
    """A folder of two records and two JSON files of other kinds."""
    folder = project / "benchmarks" / "results"
    folder.mkdir(parents=True)
    cpu = bench_record([bench_row("cpu"), bench_row("cpu", planner={"mpc": False, "horizon": 5}, end_to_end=False, threads=1)])
    fast = {"compile": True, "cuda_graph": True, "model": {"size": "48"}, "env": {"num_envs": 8}}
    gpu = bench_record([bench_row("default", device="cuda", planner={"precision": "bf16"}, **fast)], GPU)
    for name, data in {"a.json": cpu, "b.json": gpu, "compiled.json": {"rows": [{"set": "x"}]}, "old.json": [1]}.items():
        (folder / name).write_text(json.dumps(data))
    return folder


def test_benchmarks(project: Path) -> None:
    lines = benchmarks_table(write_benchmarks(project)).splitlines()
    times = "**12.3** (50%) | **4.00** (25%) | 40 | 9000 | dmc/cartpole-swingup"
    assert lines[0].startswith(
        "| model | preset | device | precision | compile | seeds | envs | obs + actions | plan ms | update ms | decisions/s |"
    )
    assert lines[2] == f"| cpu | cpu | cpu, 2 threads | fp32 | no | 1 | 1 | 24 + 6 | {times} | Some CPU, 2 cores | `results/a.json` |"
    assert lines[3] == (
        "| cpu | cpu planner.mpc=false planner.horizon=5 | cpu, 1 thread | fp32 | no | 1 | 1 | 24 + 6 "
        "| - | **4.00** (25%) | - | - | - | Some CPU, 2 cores | `results/a.json` |"
    )
    assert lines[4] == f"| 48 | default | cuda | bf16 / fp32 | compile + graph | 1 | 8 | 24 + 6 | {times} | Some GPU | `results/b.json` |"
    assert len({line.count("|") for line in lines[:5]}) == 1 and lines[5] == "" and "Median milliseconds" in lines[6]


def test_both_blocks_of_a_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, readme, other = write_benchmarks(project), project / "README.md", project / "other.md"
    marks = block_marks("benchmarks")
    readme.write_text(f"{readme.read_text()}\n{marks[0]}\n{marks[1]}\nLast.\n")
    other.write_text("\n".join(marks))
    files, folders = [str(readme), str(other)], ["--results", str(project / "results"), "--benchmarks", str(folder)]
    assert main([*files, *folders]) == 0
    text = readme.read_text()
    assert text.index("cartpole-swingup | cpu | 3") < text.index("End.") < text.index("Some GPU") < text.index("Last.")
    assert "Some GPU" in other.read_text() and "prior alone" not in other.read_text()
    assert main([*files, "--check", *folders]) == 0
    (folder / "b.json").unlink()
    capsys.readouterr()
    assert main([*files, "--check", *folders]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2 and readme.read_text() == text
    readme.write_text(text.replace(marks[1], ""))
    assert main([*files, *folders]) == 2
    assert f"expected exactly one block from {marks[0]}" in capsys.readouterr().err
    (folder / "a.json").write_text('{"schema": "worldmpc.bench/1"')
    assert main([str(other), *folders]) == 2
    assert "a.json: not JSON" in capsys.readouterr().err
    assert main([str(other), "--benchmarks", str(project / "nowhere")]) == 2


def test_no_benchmarks_yet(tmp_path: Path) -> None:
    assert "No benchmarks in" in benchmarks_table(tmp_path)


def test_no_results_yet(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert results_table(tmp_path / "results") == "No results in `results/` yet."
    (tmp_path / "results" / "speed.csv").write_text("what,seconds\n")
    assert results_table(tmp_path / "results") == "No results in `results/` yet."
