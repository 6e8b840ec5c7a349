"""What imagined opponents know of unseen games, as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worldmpc.report.opponent_models import SCHEMA, opponent_models_table
from worldmpc.report.runs import RunError

MACHINE = {"cpu": "abacus", "cores": 2, "ram_gib": 1.0, "gpu": None, "os": "Linux", "python": "3", "torch": "2"}
ROW = {
    "run": "runs/x",
    "seed": 2,
    "opponent": "weak",
    "games": 40,
    "decisions": 900,
    "uniform": -2.77,
    "marginal": 1.5,
    "network_weak": 4.25,
}
KNOWN = {"network_anyone": 3.5, "belief": 4.126, "identified": 0.875, "named_anyone": 0.1}


def test_one_row_per_run_and_opponent(tmp_path: Path) -> None:
    rows = [ROW | KNOWN, ROW | KNOWN | {"opponent": "a|b", "network_a|b": 5.0}]
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"schema": SCHEMA, "command": "look", "machine": MACHINE, "threads": 1, "rows": rows}))
    lines = opponent_models_table(str(file)).splitlines()
    names = "| belief | network of weak | network of anyone | network of a\\|b | frequencies | uniform |"
    assert lines[0] == f"| seed | plays | games | identified {names}"
    assert lines[2] == "| 2 | weak | 40 | 88 % | **4.13** | 4.25 | 3.50 |  | 1.50 | -2.77 |"
    assert lines[3] == "| 2 | a\\|b | 40 | 88 % | **4.13** | 4.25 | 3.50 | 5.00 | 1.50 | -2.77 |"
    assert "`look`" in lines[-1] and "abacus" in lines[-1]


def test_a_record_of_something_else(tmp_path: Path) -> None:
    assert "Not measured yet" in opponent_models_table(str(tmp_path / "later.json"))
    (tmp_path / "other.json").write_text('{"schema": "worldmpc.overhead/1"}')
    with pytest.raises(RunError, match="no record of benchmarks.opponent_models"):
        opponent_models_table(str(tmp_path / "other.json"))
