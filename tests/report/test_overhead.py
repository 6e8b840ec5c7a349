"""What variants cost, as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worldmpc.report.overhead import SCHEMA, overhead_table
from worldmpc.report.runs import RunError

MACHINE = {"cpu": "abacus", "cores": 2, "ram_gib": 1.0, "gpu": None, "os": "Linux", "python": "3", "torch": "2"}


def row(label: str, update: float, plan: float) -> dict[str, object]:
    return {"label": label, "parameters": {"q": 1000, "total": 12345}, "memory_mib": 1.5, "update_ms": update, "plan": {"median_ms": plan}}


def test_changes_stand_beside_what_they_change(tmp_path: Path) -> None:
    rows = [row("A0", 10, 2), row("A4", 11.5, 2), row("tdmpc2", 20, 4), row("bmpc", 30, 3)]
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"schema": SCHEMA, "command": "measure", "machine": MACHINE, "threads": 1, "rows": rows}))
    table = overhead_table(str(file))
    assert "| `A0` | 12,345 | 1.50 | 10.00 |  | 2.00 |  |" in table and "| `A4` | 12,345 | 1.50 | 11.50 | +15% | 2.00 | +0% |" in table
    assert "| `bmpc` | 12,345 | 1.50 | 30.00 | +50% | 3.00 | -25% |" in table and "`measure`" in table


def test_no_record_yet_and_no_record_at_all(tmp_path: Path) -> None:
    assert "Not measured yet" in overhead_table(str(tmp_path / "later.json"))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(RunError, match="no record of benchmarks.overhead"):
        overhead_table(str(tmp_path / "other.json"))
