"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from worldmpc.files import write_whole, written_aside


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.v2.txt"
    write_whole(path, "ä\n")
    with written_aside(path) as partial:
        partial.write_text("half")
        assert path.read_text(encoding="utf-8") == "ä\n" and partial.parent == path.parent and partial.suffix == ".txt"
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_former_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="on the way"), written_aside(path) as partial:
        partial.write_text("half")
        raise RuntimeError("on the way")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "notes"):
        pass
    assert list(tmp_path.iterdir()) == []
