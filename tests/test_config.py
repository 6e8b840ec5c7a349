"""Configuration: values that no run can use are refused by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from worldmpc.config import ConfigError, RunConfig, flat_fields, lookup, make_config, validate

FLOATS = [name for name, _ in flat_fields() if isinstance(lookup(RunConfig(), name), float)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*FLOATS, "env.discount"])
def test_numbers_are_finite(name: str, value: float) -> None:
    """Every float, also those without a range."""
    with pytest.raises(ConfigError, match=f"^{name}: expected a finite number"):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planner.temperature": -0.1}, "planner.temperature: expected 0 or more, got -0.1"),
        ({"seed": 2**63}, "seed: expected less than 2\\*\\*63"),
        ({"optim.schedule": "warmup"}, "optim.warmup_updates: expected at least 1 for optim.schedule=warmup, got 0"),
        ({"device": "meta"}, "device: expected auto, cpu, cuda, cuda:<index> or mps, got 'meta'"),
        ({"replay.storage_device": "tpu"}, "replay.storage_device: expected auto, cpu"),
    ],
)
def test_unusable_values(changes: dict[str, Any], message: str) -> None:
    """One line that names the key."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_config(**changes)


def test_values_at_the_edge() -> None:
    """These are fine."""
    config = make_config(**{"planner.temperature": 0, "seed": 2**63 - 1, "optim.schedule": "cosine", "device": "cuda:1"})
    assert validate(config) == config
    assert make_config(**{"optim.schedule": "warmup", "optim.warmup_updates": 1}).optim.warmup_updates == 1
    assert validate(dataclasses.replace(config, device="mps")).device == "mps"
