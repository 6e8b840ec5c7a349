"""Devices and threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from worldmpc.config import ConfigError
from worldmpc.runtime import resolve_device


@pytest.mark.parametrize("name", ["meta", "tpu", "CPU", "cpu:0", "cuda:x", ""])
def test_devices_are_named_exactly(name: str) -> None:
    """Whatever torch would make of them."""
    with pytest.raises(ConfigError, match=f"^device: expected auto, cpu, cuda, cuda:<index> or mps, got '{name}'$"):
        resolve_device(name)


def test_devices() -> None:
    """Those of this machine come back as they are; errors name the key."""
    assert resolve_device("cpu") == "cpu" and resolve_device("auto") in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="^replay.storage_device: 'cuda:1' asked for, .*; use replay.storage_device=cpu"):
            resolve_device("cuda:1", "replay.storage_device")


def test_threads_of_one_run_do_not_limit_the_next() -> None:
    """After a run on one thread, the next is offered what torch began with."""
    code = (
        "import torch; from worldmpc.runtime import set_threads, suggested_threads\n"
        "torch.set_num_threads(3)\n"
        "set_threads(1)\n"
        "assert suggested_threads(512) == 3 and suggested_threads(None) == 2, suggested_threads(512)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
