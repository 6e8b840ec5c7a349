"""Provenance names machine and code, not people and places."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from worldmpc.report.provenance import command_line, git_commit, machine_info, machine_line


def test_machine() -> None:
    info = machine_info()
    assert set(info) == {"cpu", "cores", "ram_gib", "gpu", "os", "python", "torch", "cuda"}
    assert info["cores"] >= 1 and info["cpu"]
    text = json.dumps(info)
    assert platform.node() not in text and str(Path.home()) not in text
    assert getpass.getuser() not in text.split()
    assert machine_line(info).startswith(str(info["cpu"])) and "torch" in machine_line(info)
    assert (machine_line("a box"), machine_line(None)) == ("a box", "unknown")


def git(folder: Path, *arguments: str) -> str:
    """Run git with an identity of its own."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    code = tmp_path / "code"
    code.mkdir()
    git(tmp_path, "init", "-q")
    (code / "a.py").write_text("1\n")
    assert git_commit(code) is None
    git(tmp_path, "add", "code")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(code) == commit
    (tmp_path / "elsewhere.txt").write_text("x")
    assert git_commit(code) == commit
    (code / "a.py").write_text("2\n")
    assert git_commit(code) == f"{commit}-dirty"
    # As in a virtual environment inside somebody else's repository.
    (tmp_path / "untracked").mkdir()
    assert git_commit(tmp_path / "untracked") is None


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["/home/somebody/bin/worldmpc", "train", "steps=100", f"run_dir={tmp_path}/runs/a b", "/somewhere/else/x.yaml"]
    assert command_line(argv) == "worldmpc train steps=100 'run_dir=runs/a b' x.yaml"
    assert command_line(["/x/worldmpc/__main__.py", "compare", "runs"]) == "python -m worldmpc compare runs"
