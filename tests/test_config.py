"""Configuration: values that no run can use are refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from worldmpc.config import (
    AGENTS,
    PRESETS,
    TUNED,
    ConfigError,
    RunConfig,
    flat_fields,
    lookup,
    make_config,
    merge,
    network_width,
    plans,
    validate,
)

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


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_agent_survives_plain_data(agent: str, preset: str) -> None:
    """Also through JSON, which knows lists and no tuples."""
    config = make_config(preset, agent=agent)
    assert RunConfig.from_dict(config.to_dict()) == config == RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def test_tuned_settings_are_settings() -> None:
    for agent, tasks in TUNED.items():
        for task in tasks:
            assert make_config("tuned", agent=agent, task=task).task == task


def test_a_section_may_be_given_by_its_name() -> None:
    by_name = make_config(agent="mpc", planner="mppi", **{"planner.horizon": 9})
    assert by_name == make_config(agent="mpc", **{"planner.horizon": 9, "planner.name": "mppi"})
    assert by_name.planner.num_pi_trajs == 0  # the agent's own defaults stay
    assert make_config(planner={"horizon": 4}).planner.horizon == 4
    with pytest.raises(ConfigError, match="planner.name: expected one of mppi"):
        make_config(planner="mpi")
    with pytest.raises(ConfigError, match="^env: expected keys below it, as in env.<key>=<value>, got 'async'"):
        make_config(env="async")
    with pytest.raises(ConfigError, match="^agent: unknown agent 'ddpg'; one of tdmpc2, mpc"):
        make_config(agent="ddpg")


def test_merging_changes_neither_side() -> None:
    base, over = {"a": {"x": 1}, "planner": {"horizon": 3}}, {"a": {"y": 2}, "planner": "cem"}
    assert merge(base, over) == {"a": {"x": 1, "y": 2}, "planner": {"horizon": 3, "name": "cem"}}
    assert merge(over, base) == {"a": {"x": 1, "y": 2}, "planner": {"horizon": 3, "name": "cem"}}
    assert base == {"a": {"x": 1}, "planner": {"horizon": 3}} and over == {"a": {"y": 2}, "planner": "cem"}


@pytest.mark.parametrize(
    ("agent", "expected"), [("tdmpc2", 512), ("dqn", 256), ("ppo", 64), ("sac", 256), ("td3", 256), ("mbmpc", 200), ("mpc", 200)]
)
def test_width_of_networks(agent: str, expected: int) -> None:
    assert network_width(make_config(agent=agent)) == expected
    assert plans(make_config(agent=agent)) == (agent in ("tdmpc2", "mbmpc", "mpc"))
