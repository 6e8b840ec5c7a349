"""The results table in markdown files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from worldmpc.report.runs import Run, export_results
from worldmpc.report.tables import BEGIN, END, main, results_table


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


def test_no_results_yet(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert results_table(tmp_path / "results") == "No results in `results/` yet."
    (tmp_path / "results" / "speed.csv").write_text("what,seconds\n")
    assert results_table(tmp_path / "results") == "No results in `results/` yet."
