"""The command line: ``worldmpc train | evaluate | tournament | clone | play | compare | report | bench | tasks``.

Each command is a module with a function that takes the words behind its name and returns the exit status. Modules are imported
when they are used, so that help costs no import of torch. Every error that a user can cause ends as one line on stderr.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

from worldmpc.cli.errors import report_error
from worldmpc.cli.text import COMMANDS, command_help, overview
from worldmpc.config import ConfigError

_MODULES = {
    "train": "worldmpc.cli.train:train",
    "evaluate": "worldmpc.cli.evaluate:evaluate",
    "tournament": "worldmpc.cli.tournament:tournament",
    "clone": "worldmpc.cli.clone:clone",
    "play": "worldmpc.cli.play:play",
    "compare": "worldmpc.cli.reports:compare",
    "report": "worldmpc.cli.reports:report",
    "bench": "worldmpc.cli.bench:bench",
    "tasks": "worldmpc.cli.reports:tasks",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done, or stopped by SIGTERM with the run saved. 1: a failure while running. 2: input that cannot be used. 130: Ctrl-C.

    Args:
        argv: words behind the program's name; None: those of this process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = _dispatch(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has enough of it (`worldmpc tasks | head`); without this, flushing at exit fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error)


def _dispatch(words: list[str]) -> int:
    if not words:
        sys.stderr.write(overview())
        return 2
    command, rest = words[0], words[1:]
    if command in ("-h", "--help", "help"):
        name = rest[0] if rest else ""
        sys.stdout.write(command_help(name) if name in COMMANDS else overview())
        return 0
    if command in ("-V", "--version"):
        sys.stdout.write(f"worldmpc {importlib.metadata.version('worldmpc')}\n")
        return 0
    if command not in COMMANDS:
        raise _unknown_command(command)
    if any(word in ("-h", "--help") for word in rest):
        sys.stdout.write(command_help(command))
        return 0
    module, _, name = _MODULES[command].partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    return function(rest)


def _unknown_command(command: str) -> ConfigError:
    if "=" in command:
        return ConfigError(f"expected a command before '{command}', as in `worldmpc train {command}`")
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
    return ConfigError(f"unknown command '{command}'; {hint}")


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Our own warnings in one line; those of other packages with their place in the source."""
    ours = category is UserWarning
    text = f"worldmpc: warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
