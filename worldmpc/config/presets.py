"""Values that belong together: each agent's defaults, presets, and settings tuned for a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldmpc.config.base import ConfigError, merge
from worldmpc.config.readers import LATENT

_MBMPC = {
    "task": "gym/CartPole-v1",
    "steps": 20_000,
    "eval_freq": 2_500,
    "planner": {"name": "policy_guided", "horizon": 15, "num_samples": 128, "num_elites": 16, "iterations": 3},
    "train": {"seed_decisions": 500},
    "replay": {"capacity": 100_000},
    "optim": {"lr": 1e-3},
    "loss": {"batch_size": 256},
}

AGENTS: dict[str, dict[str, Any]] = {
    "tdmpc2": {},
    "tdmpc_square": {"policy": {"objective": "max_q+planner_prior"}},
    "boom": {"policy": {"objective": "max_q+weighted_prior"}},
    "bmpc": {
        "model": {"value": "v", "policy": "clipped", "num_q": 2, "log_std_min": -3.0, "log_std_max": 1.0},
        "policy": {"objective": "kl_to_planner", "skip_seed_updates": True},
        "value": {"target": "model", "bootstrap": "mean"},
        "reanalyze": {"interval": 10},
    },
    "director": {},
    "mpc": {
        "task": "gym/CartPole-v1",
        "steps": 1_000,
        "eval_freq": 1_000,
        "dynamics": {"name": "analytic"},
        "planner": {"name": "cem", "horizon": 15, "num_samples": 256, "num_elites": 32, "iterations": 4, "num_pi_trajs": 0},
        "train": {"seed_decisions": 0},
    },
    "mbmpc": _MBMPC,
    "pets": merge(
        _MBMPC,
        {
            "task": "gym/Pendulum-v1",
            "steps": 10_000,
            "eval_freq": 1_000,
            "dynamics": {"name": "ensemble"},
            "planner": {"name": "cem", "num_pi_trajs": 0},
            "mbmpc": {"learn_policy": False},
        },
    ),
    "dqn": {
        "task": "gym/CartPole-v1",
        "steps": 50_000,
        "eval_freq": 5_000,
        "env": {"discount": 0.99},
        "optim": {"lr": 5e-4, "grad_clip_norm": 10.0},
        "loss": {"batch_size": 64},
        "replay": {"capacity": 100_000},
        "train": {"utd": 0.5, "seed_decisions": 1_000},
    },
    "ppo": {
        "task": "gym/CartPole-v1",
        "steps": 100_000,
        "eval_freq": 10_000,
        "env": {"num_envs": 8},
        "optim": {"lr": 3e-4},
        "train": {"seed_decisions": 0},
    },
    "sac": {
        "task": "gym/Pendulum-v1",
        "steps": 20_000,
        "eval_freq": 2_000,
        "env": {"discount": 0.99},
        "optim": {"lr": 1e-3},
        "train": {"seed_decisions": 500},
    },
    "td3": {
        "task": "gym/Pendulum-v1",
        "steps": 20_000,
        "eval_freq": 2_000,
        "env": {"discount": 0.98},
        "optim": {"lr": 1e-3},
        "train": {"seed_decisions": 1_000},
    },
}
"""What each agent changes against the defaults of the sections; presets and overrides come on top."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": {
        "model": {"size": "cpu"},
        "planner": {"num_samples": 96, "num_elites": 16, "num_pi_trajs": 8, "iterations": 3},
        "loss": {"batch_size": 128},
        "reanalyze": {"batch_size": 10},
        "opponent_simulation": {"hidden": (64, 64)},
        "manager": {"batch_size": 64},
        "worker": {"batch_size": 64},
        "steps": 100_000,
        "eval_freq": 10_000,
    },
    "debug": {
        "model": {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_enc_layers": 2, "num_q": 2},
        "dynamics": {"hidden": (16, 16), "members": 2, "particles": 2, "max_epochs": 3},
        "mbmpc": {"hidden": (16,), "fit_every": 100, "gradient_steps": 10},
        "dqn": {"hidden": (16,)},
        "ppo": {"hidden": (16,), "rollout_steps": 32, "minibatch_size": 32},
        "sac": {"hidden": (16,)},
        "td3": {"hidden": (16,)},
        "planner": {"num_samples": 16, "num_elites": 4, "num_pi_trajs": 4, "iterations": 2, "num_simulations": 4},
        "loss": {"batch_size": 8},
        "manager": {"batch_size": 8},
        "reanalyze": {"batch_size": 2},
        "opponent_simulation": {"hidden": (16,), "batch_size": 8},
        "train": {"seed_decisions": 50},
        "steps": 500,
        "eval_freq": 250,
        "eval": {"episodes": 2},
        "checkpoint": {"every": 250},
        "log": {"every": 50},
    },
}
"""What each preset changes: ``cpu`` for TD-MPC2 and its relatives alone, whose defaults need a GPU; ``debug`` for all."""

TUNED: dict[str, dict[str, dict[str, Any]]] = {
    # Beginning with RL Baselines3 Zoo's settings, https://github.com/DLR-RM/rl-baselines3-zoo/tree/master/hyperparams
    "dqn": {
        "gym/CartPole-v1": {
            "steps": 50_000,
            "optim": {"lr": 2.3e-3, "schedule": "cosine", "final_lr_scale": 0.01},
            "dqn": {"hidden": (128, 128), "n_step": 5, "target_every": 250, "epsilon_fraction": 0.16},
        },
    },
    "mbmpc": {
        "gym/CartPole-v1": {
            "steps": 10_000,
            "dynamics": {"hidden": (64, 64)},
            "planner": {"name": "cem", "horizon": 30, "num_samples": 128, "num_elites": 16, "iterations": 2, "num_pi_trajs": 16},
        },
    },
    "mpc": {
        # A reward of 1 per step is all the same until a sequence ends within the horizon: it must see the cart reach the edge.
        "gym/CartPole-v1": {
            "steps": 1,
            "planner": {"horizon": 80, "num_samples": 512, "num_elites": 16, "iterations": 2, "num_playouts": 16},
        },
        "gym/Pendulum-v1": {"steps": 1, "planner": {"horizon": 20}},
    },
    "pets": {
        "gym/Pendulum-v1": {
            "steps": 10_000,
            "eval_freq": 2_500,
            "dynamics": {"hidden": (64, 64), "particles": 5, "max_epochs": 30},
            "planner": {"horizon": 15, "num_samples": 100, "num_elites": 10, "iterations": 3},
        },
    },
    "ppo": {
        "gym/CartPole-v1": {
            "steps": 100_000,
            "env": {"num_envs": 8},
            "optim": {"lr": 1e-3, "schedule": "linear", "final_lr_scale": 0.01},
            "ppo": {
                "rollout_steps": 32,
                "minibatch_size": 256,
                "update_epochs": 20,
                "gamma": 0.98,
                "gae_lambda": 0.8,
                "anneal_clip": True,
            },
        },
        "gym/Acrobot-v1": {
            "steps": 500_000,
            "eval_freq": 50_000,
            "env": {"num_envs": 16},
            "optim": {"lr": 1e-3},
            "ppo": {"rollout_steps": 128, "gae_lambda": 0.94},
        },
        "gym/Pendulum-v1": {
            "steps": 100_000,
            "env": {"num_envs": 4},
            "optim": {"lr": 1e-3},
            "ppo": {"rollout_steps": 1024, "minibatch_size": 64, "update_epochs": 10, "gamma": 0.9},
        },
    },
    "tdmpc2": {
        # Values of choices are next to the same while the pole stands, and plans that take the best of them follow the model's errors. A
        # soft prior, whose sequences are all there is to weigh, is left only where the return says so.
        "gym/CartPole-v1": merge(
            PRESETS["cpu"],
            {
                "steps": 20_000,
                "eval_freq": 5_000,
                "env": {"discount": 0.97},
                "planner": {"horizon": 8, "num_samples": 128, "num_elites": 128, "num_pi_trajs": 128, "iterations": 1},
                "loss": {"horizon": 3, "entropy_coef": 0.2},
                "optim": {"schedule": "cosine", "final_lr_scale": 0.01},
            },
        ),
        # Repeated actions reach the goal by chance far more often.
        "gym/Acrobot-v1": merge(
            PRESETS["cpu"],
            {
                "steps": 50_000,
                "env": {"action_repeat": 4, "discount": 0.97},
                "planner": {"horizon": 5},
                "loss": {"horizon": 3, "entropy_coef": 0.05},
                "optim": {"schedule": "cosine", "final_lr_scale": 0.01},
            },
        ),
    },
}
"""Settings of ``preset=tuned``: agent -> task -> values."""


NAMED_TASKS: dict[str, dict[str, Any]] = {
    "director_walker_walk": {
        "task": "dmc/walker-walk",
        "agent": "director",
        "goal_vae": {"n_latents": 8, "n_classes": 8},
        "manager": {"goal_interval": 8},
    },
    "director_humanoid_walk": {
        "task": "dmc/humanoid-walk",
        "agent": "director",
        "goal_vae": {"n_latents": 20, "n_classes": 12},
        "manager": {"goal_interval": 15},
    },
}
"""Names that stand for a task, an agent and its settings for that task."""


def expand_task(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was given with the task and agent that a name of :data:`NAMED_TASKS` stands for, and the settings that come with it.

    Raises:
        ConfigError: another agent is asked for.
    """
    name = given.get("task")
    if name not in NAMED_TASKS:
        return dict(given), {}
    settings = dict(NAMED_TASKS[name])
    task, agent = settings.pop("task"), settings.pop("agent")
    if given.get("agent", agent) != agent:
        raise ConfigError(f"agent: task={name} is a name for agent={agent} with settings; use task={task} with agent={given['agent']}")
    return {**given, "task": task, "agent": agent}, settings


def preset_values(preset: str, agent: str, task: str | None = None) -> dict[str, Any]:
    """Return what an agent's defaults and a preset change against the defaults of the sections.

    Raises:
        ConfigError: unknown preset or agent, or a task that nothing is tuned for.
    """
    if agent not in AGENTS:
        raise ConfigError(f"agent: unknown agent '{agent}'; one of {', '.join(AGENTS)}")
    own = merge(AGENTS[agent], {"agent": agent, "preset": preset})
    if preset == "tuned":
        if agent in LATENT and agent not in TUNED:
            raise ConfigError(f"preset: agent={agent} has no tuned settings; use preset=cpu, or agent=tdmpc2, which has some")
        if agent not in TUNED:
            raise ConfigError(f"preset: agent={agent} needs no tuned settings: its defaults are tuned for {own['task']}; leave preset out")
        task = task or str(own.get("task", "its default task"))
        known: Mapping[str, dict[str, Any]] = TUNED[agent]
        if task not in known:
            raise ConfigError(f"preset: agent={agent} has no tuned settings for {task}; it has them for task={' or '.join(known)}")
        return merge(own, known[task])
    if preset not in PRESETS:
        raise ConfigError(f"preset: unknown preset '{preset}'; one of {', '.join([*PRESETS, 'tuned'])}")
    if preset == "cpu" and agent not in LATENT:
        return own
    values = merge(own, PRESETS[preset])
    return merge(values, {"planner": {"num_pi_trajs": 0}}) if agent in ("mpc", "pets") else values  # they have no policy that proposes
