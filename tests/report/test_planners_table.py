"""The table of records of ``worldmpc bench planners``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worldmpc.report.planners import COLUMNS, SCHEMA, best, cells, parse_rows, planners_table
from worldmpc.report.runs import RunError
from worldmpc.report.tables import block_marks, main

MACHINE = {"cpu": "Some CPU", "cores": 2, "ram_gib": 8.0, "gpu": None, "python": "3.11", "torch": "2.13"}
SIZES = {"name": "cem", "iterations": 6, "num_samples": 17, "gradient_steps": 0}


def row(planner: str, mean: float | None, reason: str | None = None, model: str = "analytic gym/X-v1", **sizes: Any) -> dict[str, Any]:
    """A row of a record; without ``mean`` one that could not be had."""
    data: dict[str, Any] = {"model": model, "planner": planner, "horizon": 20, "evaluations": 2000, "reason": reason}
    if mean is None:
        return data
    numbers = {"return_mean": mean, "return_min": mean - 5, "return_max": mean + 4, "counted": 2040.0, "episodes": 10}
    return data | numbers | {"sizes": SIZES | sizes, "returns": {"1": [1.0], "2": [2.0], "3": [3.0]}, "plan": {"median_ms": 12.345}}


def record(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "command": "worldmpc bench planners", "commit": "abc", "machine": MACHINE, "rows": list(rows)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two records, and JSON of other kinds."""
    place = tmp_path / "benchmarks" / "results"
    place.mkdir(parents=True)
    first = record(
        row("cem", -150.0),
        row("mcts", None, "mcts needs a discrete action space"),
        row("icem", -140.4, name="icem"),
        row("mppi", 0.5, model="latent dmc/y", iterations=1),
    )
    second = record(row("mcts", -145.0, num_simulations=100), row("cem+gradient", -141.0, gradient_steps=5))
    for name, data in {"a.json": first, "b.json": second, "bench.json": {"schema": "worldmpc.bench/1"}, "list.json": [1]}.items():
        (place / name).write_text(json.dumps(data))
    return place


def test_table(folder: Path) -> None:
    lines = planners_table(folder).splitlines()
    model = "analytic gym/X-v1"
    assert lines[0] == "| model | planner | horizon | candidates | model steps | seeds x episodes | return (min..max) | ms per decision |"
    assert lines[2:8] == [
        f"| {model} | cem | 20 | 6 x 17 | 2040 | 3 x 10 | -150 (-155..-146) | 12.3 |",
        f"| {model} | mcts | 20 | mcts needs a discrete action space | - | - | - | - |",
        f"| {model} | icem | 20 | 6 x 17, falling | 2040 | 3 x 10 | **-140** (-145..-136) | 12.3 |",
        f"| {model} | mcts | 20 | 100 simulations | 2040 | 3 x 10 | -145 (-150..-141) | 12.3 |",
        f"| {model} | cem+gradient | 20 | 6 x 17, 5 gradient steps | 2040 | 3 x 10 | -141 (-146..-137) | 12.3 |",
        "| latent dmc/y | mppi | 20 | 17 | 2040 | 3 x 10 | **0.50** (-4.50..4.50) | 12.3 |",
    ]
    assert {line.count("|") for line in lines[:8]} == {len(COLUMNS) + 1} and lines[8] == ""
    assert lines[9].startswith("Return: ") and lines[11:] == [
        f"* `results/{name}.json`: `worldmpc bench planners`; Some CPU, 2 cores, 8.0 GiB, no GPU, python 3.11, torch 2.13" for name in "ab"
    ]


def test_the_best_of_each_model_ties_included() -> None:
    rows = parse_rows(record(row("a", 1.0), row("b", 2.0), row("c", 2.0), row("d", None, "no"), row("e", -7.0, model="other")), "x")
    assert [found.planner for found in best(rows)] == ["b", "c", "e"]
    assert cells(rows[3])[3:] == ["no", "-", "-", "-", "-"]


def test_block_in_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder / "page.md"
    page.write_text("# Planners\n\n" + "\nformer text\n".join(block_marks("planners")) + "\n")
    options = ["--planners", str(folder)]
    assert main([str(page), "--check", *options]) == 1
    assert main([str(page), *options]) == 0 and main([str(page), "--check", *options]) == 0
    assert "6 x 17, falling" in page.read_text() and "former text" not in page.read_text()
    (folder / "b.json").unlink()
    assert main([str(page), "--check", *options]) == 1
    (folder / "a.json").write_text('{"schema": ')
    capsys.readouterr()
    assert main([str(page), *options]) == 2
    assert "a.json: not JSON" in capsys.readouterr().err


def test_no_records_yet(tmp_path: Path) -> None:
    assert planners_table(tmp_path).startswith("No comparison of planners in ")
    with pytest.raises(RunError, match="nowhere: no such folder"):
        planners_table(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["machine", "rows", "command"])
def test_records_that_lack_something_are_refused(part: str) -> None:
    broken = record(row("cem", 1.0))
    del broken[part]
    with pytest.raises(RunError, match=r"x\.json: no record of worldmpc bench planners of this version \(KeyError"):
        parse_rows(broken, "x.json")
    cut = row("cem", 1.0)
    del cut["plan"]
    with pytest.raises(RunError, match="KeyError"):
        parse_rows(record(cut), "x.json")
