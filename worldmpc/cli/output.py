"""Tables and JSON on the console."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from worldmpc.config import ConfigError
from worldmpc.files import write_whole

PIPE_WIDTH = 140
"""Columns of a table that is not shown on a terminal."""


def console_for(target: str | None) -> Console:
    """Return where tables go: stderr where the JSON goes to stdout, which must then hold nothing else."""
    console = Console(stderr=target == "-")
    return console if console.is_terminal else Console(stderr=target == "-", width=PIPE_WIDTH)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours, no line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def check_target(target: str | None, option: str = "json") -> None:
    """Check that what an option asks for can be written to a file, before hours go into what it is to hold.

    Raises:
        ConfigError: a folder, or a place where nothing can be written.
    """
    if target in (None, "-"):
        return
    path = Path(target)
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {target} ({error.strerror}); choose another file") from error


def write_json(target: str | None, record: Mapping[str, Any]) -> None:
    """Write a record to a file, or to stdout for ``-``; nothing for None."""
    if target is None:
        return
    text = json.dumps(record, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    write_whole(Path(target), text)
