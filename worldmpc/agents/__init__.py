"""Agents: each wires parts into an algorithm."""

from __future__ import annotations

import importlib
import math

import torch

from worldmpc.config import LATENT, RunConfig, updates_worth
from worldmpc.types import Agent, EnvSpec

CLASSES = {
    **dict.fromkeys(LATENT, "worldmpc.agents.tdmpc2:TDMPC2"),
    "director": "worldmpc.agents.director:Director",
    "mpc": "worldmpc.agents.mpc:MPC",
    "mbmpc": "worldmpc.agents.mbmpc:MBMPC",
    "pets": "worldmpc.agents.mbmpc:MBMPC",
    "dqn": "worldmpc.agents.dqn:DQN",
    "ppo": "worldmpc.agents.ppo:PPO",
    "sac": "worldmpc.agents.sac:SAC",
    "td3": "worldmpc.agents.td3:TD3",
}
"""``agent`` -> ``module:class``, imported when first used."""


def make_agent(config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu") -> Agent:
    """Return the untrained agent that a configuration names, for environments of this kind.

    Raises:
        ConfigError: an observation or action space that the agent or its planner does not support.
    """
    flat = config.agent == "director" and config.trainer == "online"
    module, _, name = CLASSES["tdmpc2" if flat else config.agent].partition(":")
    kind = getattr(importlib.import_module(module), name)
    decisions = math.ceil(config.steps / spec.action_repeat)
    total_updates = kind.count_updates(config, decisions) if hasattr(kind, "count_updates") else updates_worth(decisions, config.train.utd)
    return kind(config, spec, device, total_updates=max(total_updates, 1))
