"""Fixtures of the whole suite."""

import os

import pytest

os.environ.setdefault("MUJOCO_GL", "disabled")
pytest_plugins = ["tests.libraries"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors are fastest on one thread, and two test processes then do not disturb each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded():
    """Tests draw the same numbers every time."""
    import torch

    torch.manual_seed(0)
