"""What goals say and how near they are come to, as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worldmpc.report.goal_records import SCHEMA, goals_table
from worldmpc.report.runs import RunError

MACHINE = {"cpu": "abacus", "cores": 2, "ram_gib": 1.0, "gpu": None, "os": "Linux", "python": "3", "torch": "2"}
ROW = {"task": "maze/u", "seed": 3, "updates": 8000, "codes_after": 5000, "recon_loss": 1.5, "marginal_entropy": 1.75, "perplexity": 6.04}
IN_USE = {"perplexity_held_out": 3.25}
REACHED = {"places": 12, "reached": 0.8125, "without_goal": 0.625, "where_it_began": 0.5, "random_actions": 0.25}
HELD = {"reached_of_held_action": 0.75, "without_goal_of_held_action": 0.125, "where_it_began_of_held_action": 0.375}


def test_codes_and_what_was_reached_stand_in_one_row(tmp_path: Path) -> None:
    file = tmp_path / "goals.json"
    file.write_text(
        json.dumps({"schema": SCHEMA, "command": "look", "machine": MACHINE, "threads": 1, "rows": [ROW | IN_USE | REACHED | HELD]})
    )
    table = goals_table(str(file))
    assert "| maze/u | 3 | 5,000 | 1.500 | 1.750 | 6.0 | 3.2 |" in table
    assert "| maze/u | 3 | 8,000 | **0.812** | 0.625 | 0.500 | 0.250 | **0.750** | 0.125 | 0.375 |" in table
    assert "at most 12 places per run" in table and "`look`" in table and "abacus" in table


def test_a_record_of_something_else(tmp_path: Path) -> None:
    assert "Not measured yet" in goals_table(str(tmp_path / "later.json"))
    (tmp_path / "other.json").write_text('{"schema": "worldmpc.overhead/1"}')
    with pytest.raises(RunError, match="no record of benchmarks.director_goals"):
        goals_table(str(tmp_path / "other.json"))
