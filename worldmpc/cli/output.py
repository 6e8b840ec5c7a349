"""Tables and JSON on the console."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

PIPE_WIDTH = 140
"""Columns of a table that is not shown on a terminal."""


def console_for(target: str | None) -> Console:
    """Return where tables go: stderr where the JSON goes to stdout, which must then hold nothing else."""
    console = Console(stderr=target == "-")
    return console if console.is_terminal else Console(stderr=target == "-", width=PIPE_WIDTH)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours, no line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def write_json(target: str | None, record: Mapping[str, Any]) -> None:
    """Write a record to a file, or to stdout for ``-``; nothing for None."""
    if target is None:
        return
    text = json.dumps(record, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(text, encoding="utf-8")
