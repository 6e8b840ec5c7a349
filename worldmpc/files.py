"""Files that are whole or not there, also where their writer is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a name of the same suffix beside a file; what a ``with`` block writes there takes the file's place where it succeeds.

    The folder is made where there is none. After an error the former file is untouched, and nothing else is left.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8, by :func:`written_aside`.

    Raises:
        OSError: it could not be written.
    """
    with written_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")
