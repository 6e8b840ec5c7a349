"""Tables of variants' curves and of bfloat16's errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from worldmpc.report.precision import curves_table, precision_table
from worldmpc.report.runs import Run, RunError, export_results
from worldmpc.report.tables import block_marks, main


@pytest.fixture
def files(make_run: Callable[..., Run], tmp_path: Path) -> dict[str, Path]:
    """Three seeds of a baseline, and a variant of one seed that was evaluated less often."""
    base = [make_run([(0, 1.0), (20_000, 100.0), (40_000, 500.0 + 10 * seed)], seed=seed) for seed in (1, 2, 3)]
    variant = [make_run([(0, 1.0), (40_000, 480.0), (60_000, 700.0)], seed=1)]
    export_results(base, tmp_path / "base.csv")
    export_results(variant, tmp_path / "with_less.csv")
    return {"base": tmp_path / "base.csv", "with less": tmp_path / "with_less.csv"}


def summary(mean: float) -> dict[str, float]:
    return {"mean": mean, "p5": mean / 2, "median": mean, "p95": mean * 2}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record of ``benchmarks.precision``."""
    planning = {"states": 200, "value_error_relative": summary(0.001), "elite_overlap": summary(0.5), "plan_mean_moved": summary(0.02)}
    losses = {"total_loss": summary(0.01)}
    learning = {
        "batches": 50,
        "relative_error_of_losses": losses,
        "total_loss": summary(7.0),
        "cosine_of_gradients": summary(0.4),
        "ratio_of_gradient_norms": summary(0.45),
    }
    data = {"task": "dmc/cartpole-swingup", "preset": "cpu", "updates": 47_500, "planning": planning, "learning": learning}
    (tmp_path / "precision.json").write_text(json.dumps(data))
    return tmp_path / "precision.json"


def test_curves_at_the_steps_in_common(files: dict[str, Path]) -> None:
    lines = curves_table(files).splitlines()
    assert lines[0] == "| variant | seeds | 40,000 | data |"
    assert lines[2] == f"| base | 3 | **520** (510..530) | `{files['base'].as_posix()}` |"
    assert lines[3] == f"| with less | 1 | 480 | `{files['with less'].as_posix()}` |"
    assert len({line.count("|") for line in lines[:4]}) == 1 and "dmc/cartpole-swingup" in lines[-1]


def test_curves_that_cannot_be_compared(files: dict[str, Path], make_run: Callable[..., Run], tmp_path: Path) -> None:
    for other, words in (
        (make_run([(0, 1.0), (40_000, 2.0)], task="gym/Pendulum-v1"), "several tasks"),
        (make_run([(0, 1.0), (30_000, 2.0)]), "no simulator step"),
    ):
        export_results([other], tmp_path / "other.csv")
        with pytest.raises(RunError, match=words):
            curves_table({**files, "other": tmp_path / "other.csv"})
    with pytest.raises(RunError, match="no result files"):
        curves_table({})


def test_precision(record: Path) -> None:
    lines = precision_table(record).splitlines()
    assert lines[2] == "| value of an imagined sequence | relative error | 0.10% | 0.05% .. 0.20% |"
    assert "| total loss | relative error | 1.00% | 0.50% .. 2.00% |" in lines
    assert "47,500 updates: 200 states, 50 batches" in lines[-1]


@pytest.mark.parametrize("text", ["", "[]", '{"task": 1}', '{"planning": {}, "learning": {}}'])
def test_other_records_of_precision_are_refused(record: Path, text: str) -> None:
    record.write_text(text)
    with pytest.raises(RunError, match=r"precision\.json: no record of benchmarks\.precision"):
        precision_table(record)


def test_blocks_of_both(files: dict[str, Path], record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, folder = record.parent / "page.md", record.parent / "variants"
    page.write_text("\n".join(mark for kind in ("variants", "precision") for mark in block_marks(kind)))
    folder.mkdir()
    files["with less"].rename(folder / "with_less.csv")
    options = ["--variants", str(folder), "--baseline", str(files["base"]), "--precision", str(record)]
    assert main([str(page), *options]) == 0 and main([str(page), "--check", *options]) == 0
    assert "with less" in page.read_text() and "elites" in page.read_text()
    record.unlink()
    assert main([str(page), "--check", *options]) == 2
    assert "precision.json" in capsys.readouterr().err
