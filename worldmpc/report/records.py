"""Records that a marked block of a page names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldmpc.report.provenance import machine_line
from worldmpc.report.runs import RunError


def named_table(words: str, schema: str, tool: str, make: Callable[[dict[str, Any]], str]) -> str:
    """Return what is made of the record in a file, and under it the file, the command and the machine.

    Args:
        words: of the block: the file.
        schema: that the record must have.
        tool: what writes such records.
        make: text of a record.

    Raises:
        RunError: not one file, or one that is no such record.
    """
    file = Path(words)
    if not file.exists():
        return f"Not measured yet: no `{file.as_posix()}`."
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["schema"] != schema:
            raise ValueError(record["schema"])
        where = f"`{file.as_posix()}`: `{record['command']}`; {machine_line(record['machine'])}, {record['threads']} threads."
        return "\n".join([make(record), "", where])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: no record of {tool} ({error!r})") from error
