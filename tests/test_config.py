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
    nest,
    network_width,
    plans,
    validate,
)
from worldmpc.config.readers import CHOSEN, READERS
from worldmpc.config.variants import auxiliary_warning

FLOATS = [name for name, _ in flat_fields() if isinstance(lookup(RunConfig(), name), float)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*FLOATS, "env.discount"])
def test_numbers_are_finite(name: str, value: float) -> None:
    """Every float, also those without a range."""
    with pytest.raises(ConfigError, match=f"^{name}: expected a finite number"):
        RunConfig.from_dict(nest({name: value}))


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
    for agent in ("td3", "sac"):
        with pytest.raises(ConfigError, match=f"agent={agent} needs no tuned settings: its defaults are tuned for gym/Pendulum-v1"):
            make_config("tuned", agent=agent)


@pytest.mark.parametrize(
    ("agent", "overrides", "message"),
    [
        (
            "dqn",
            {"planner": "cem"},
            "planner.name: agent=dqn never reads it; leave it out, or use agent=.*, boom, director, mpc, mbmpc or pets",
        ),
        ("dqn", {"dynamics.name": "ensemble"}, "dynamics.name: agent=dqn never reads it; leave it out, or use agent=mpc, mbmpc or pets"),
        ("dqn", {"sac.alpha": 3}, "sac.alpha: agent=dqn never reads it; leave it out, or use agent=sac"),
        ("dqn", {"loss": {"batch_size": 32, "rho": 0.5}}, "loss.rho: agent=dqn never reads it; leave it out, or use agent=tdmpc2"),
        ("tdmpc2", {"dynamics": "ensemble"}, "dynamics.name: agent=tdmpc2 never reads it"),
        ("mpc", {"dynamics.hidden": [3]}, "dynamics.hidden: agent=mpc never reads it; leave it out, or use agent=mbmpc or pets"),
        ("mpc", {"optim.lr": 1e-3}, "optim.lr: agent=mpc never reads it"),
        *(("ppo", {key: 5}, f"{key}: agent=ppo never reads it") for key in ("train.utd", "loss.batch_size", "replay.capacity")),
        ("ppo", {"train.seed_decisions": 0}, "train.seed_decisions: agent=ppo never reads it"),  # also where it changes nothing
        ("ppo", {"ppo.gamma": 0.9, "env.discount": 0.95}, "ppo.gamma: env.discount=0.95 takes its place; leave one of them out"),
        (
            "tdmpc2",
            {"planner.keep_elites": 0.5},
            "planner.keep_elites: planner.name=mppi never reads it; .*planner.name=icem",
        ),
        ("mpc", {"planner": {"name": "mppi", "momentum": 0.5}}, "planner.momentum: planner.name=mppi never reads it; .*=cem or icem"),
        ("mpc", {"planner": {"name": "diffusion", "prior_steps": 20}}, "planner.prior_steps: planner.prior=none never reads it"),
        ("mpc", {"planner.c_puct": 3}, "planner.c_puct: planner.name=cem never reads it; leave it out, or use planner.name=mcts"),
        ("mpc", {"planner.mpc": False}, "planner.mpc: false acts with the policy prior alone, and agent=mpc has none.*; leave it true"),
        ("pets", {"planner.mpc": False}, "planner.mpc: .* agent=pets has none"),
        ("mbmpc", {"planner.mpc": False, "mbmpc.learn_policy": False}, "planner.mpc: .*mbmpc.learn_policy=false"),
        ("dqn", {"planner.hroizon": 3}, "planner.hroizon: unknown configuration key; did you mean planner.horizon"),
    ],
)
def test_keys_without_effect_are_refused(agent: str, overrides: dict[str, Any], message: str) -> None:
    """What presets and agents set is not asked for, and passes."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_config("debug", agent=agent, **overrides)


def test_keys_with_an_effect_are_not_refused() -> None:
    """Each section with an agent that it is for; and data, of which nobody asked for a part."""
    assert set(READERS) <= {name for name, _ in flat_fields()} | {name.partition(".")[0] for name, _ in flat_fields()}
    for name, readers in READERS.items():
        keys = [key for key, _ in flat_fields() if key == name or (key.startswith(f"{name}.") and key not in READERS)]
        for agent in readers:
            config = make_config(agent=agent)
            values = {key: lookup(config, key) for key in keys}
            assert keys and make_config(agent=agent, **values) == config
    assert make_config("tuned", agent="ppo", **{"env.discount": 0.9}).env.discount == 0.9  # over the preset's ppo.gamma
    assert set(CHOSEN) | {choice for choice, _ in CHOSEN.values()} <= {name for name, _ in flat_fields()}
    odd = {"agent": "dqn", "planner": {"horizon": 9}}
    assert RunConfig.from_dict(odd).planner.horizon == 9


@pytest.mark.parametrize("num_envs", [1, 3])
def test_minibatches_need_not_divide_a_rollout(num_envs: int) -> None:
    assert make_config(agent="ppo", **{"env.num_envs": num_envs, "ppo.minibatch_size": 100}).ppo.minibatch_size == 100


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        ({}, None),
        (
            {"multi_gamma.loss_weight": 0.1, "multi_gamma.head": "separate"},
            "nothing reads multi_gamma.head, multi_gamma.loss_weight without",
        ),
        ({"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary"]}, "holds the task's own discount alone"),
        ({"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9], "multi_gamma.loss_weight": 0.1}, None),
    ],
)
def test_auxiliary_values_without_effect_are_said(overrides: dict[str, Any], warning: str | None) -> None:
    found = auxiliary_warning(make_config(**overrides).multi_gamma)
    assert found is None if warning is None else warning in (found or "")


def test_a_section_may_be_given_by_its_name() -> None:
    by_name = make_config(agent="mpc", planner="mppi", **{"planner.horizon": 9})
    assert by_name == make_config(agent="mpc", **{"planner.horizon": 9, "planner.name": "mppi"})
    assert by_name.planner.num_pi_trajs == 0  # the agent's own defaults stay
    assert make_config(planner={"horizon": 4}).planner.horizon == 4
    with pytest.raises(ConfigError, match="planner.name: expected one of mppi"):
        make_config(planner="mpi")
    with pytest.raises(ConfigError, match="^env: expected keys below it, as in env.<key>=<value>, got 'async'"):
        make_config(env="async")
    with pytest.raises(ConfigError, match="^agent: unknown agent 'ddpg'; one of tdmpc2, tdmpc_square, boom, bmpc, director, mpc"):
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


def test_a_name_stands_for_a_task_and_its_settings() -> None:
    config = make_config("cpu", task="director_walker_walk", manager={"goal_interval": 5}, steps=10_000)
    assert (config.task, config.agent, config.steps, config.manager.goal_interval) == ("dmc/walker-walk", "director", 10_000, 5)
    assert (config.goal_vae.n_latents, config.goal_vae.n_classes, config.model.size) == (8, 8, "cpu")
    large = make_config(task="director_humanoid_walk")
    assert (large.task, large.goal_vae.n_latents, large.goal_vae.n_classes, large.manager.goal_interval) == (
        "dmc/humanoid-walk",
        20,
        12,
        15,
    )
    assert make_config(task="director_walker_walk", agent="director") == make_config(task="director_walker_walk")
    with pytest.raises(
        ConfigError, match="^agent: task=director_walker_walk is a name for agent=director.*use task=dmc/walker-walk with agent=boom"
    ):
        make_config(task="director_walker_walk", agent="boom")
