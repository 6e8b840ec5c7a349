"""Records of ``python -m benchmarks.overhead`` as a markdown table."""

from __future__ import annotations

import re
from typing import Any

from worldmpc.report.records import named_table

SCHEMA = "worldmpc.overhead/1"
"""What every record says about itself."""
_ABLATION = re.compile(r"A[0-9]")
"""Labels that are held against A0; all others against tdmpc2."""


def overhead_table(words: str) -> str:
    """Return the markdown table of a record: parameters, memory and milliseconds of every variant, beside those of the baseline.

    Raises:
        RunError: not one file, or one that is no such record.
    """
    return named_table(words, SCHEMA, "benchmarks.overhead", _table)


def _table(record: dict[str, Any]) -> str:
    rows = {row["label"]: row for row in record["rows"]}
    lines = ["| | parameters | memory, MiB | update, ms | | decision, ms | |", "|---|--:|--:|--:|--:|--:|--:|"]
    lines += ["| " + " | ".join(_cells(row, rows)) + " |" for row in rows.values()]
    text = (
        "Median milliseconds, measured in turns; an update holds its share of reanalyses. Beside them the change: of `A1` and on against "
        "`A0`, of the others against `tdmpc2`. Memory: parameters, slow copies and Adam's moments."
    )
    return "\n".join([*lines, "", text])


def _cells(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    label = row["label"]
    base = rows["A0" if _ABLATION.match(label) else "tdmpc2"]
    update, plan = row["update_ms"], row["plan"]["median_ms"]
    changes = (update / base["update_ms"] - 1, plan / base["plan"]["median_ms"] - 1)
    shown = ["" if row is base else f"{change:+.0%}" for change in changes]
    return [f"`{label}`", f"{row['parameters']['total']:,}", f"{row['memory_mib']:.2f}", f"{update:.2f}", shown[0], f"{plan:.2f}", shown[1]]
