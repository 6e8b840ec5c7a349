"""An agent from one mapping, ready to act and to learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, RunConfig, make_config
from worldmpc.config.base import nest
from worldmpc.envs import canonical_task
from worldmpc.runtime import resolve_device
from worldmpc.training.restore import load_agent, task_spec
from worldmpc.training.two_player import attach_references
from worldmpc.types import Agent, EnvSpec


def create_agent(config: RunConfig | Mapping[str, Any], spec: EnvSpec | None = None, *, games: int = 1) -> Agent:
    """Return the agent that a configuration describes, with the references that it imagines loaded.

    Args:
        config: a configuration, or a mapping of its keys, nested or dotted, as ``{"task": "hockey", "agent": "tdmpc2", "preset": "cpu",
            "opponent_simulation": {"enabled": True, "opponent_agents": ["weak"]}}``. ``type`` may stand for ``agent``, in any case of
            letters; ``checkpoint_path`` names what was trained, onto which the other keys come, but for ``preset`` and another agent.
        spec: what the environments said about themselves; None: one of the task is made and asked.
        games: games that are watched at once, where it learns from references.

    Raises:
        ConfigError: a key or value that cannot be used, or a reference that is unknown or does not fit.
        CheckpointError: a checkpoint that cannot be read.
    """
    if games < 1:
        raise ConfigError(f"games: expected at least 1, got {games}")
    if isinstance(config, RunConfig):
        agent = make_agent(config, spec or task_spec(canonical_task(config.task), config), resolve_device(config.device))
    elif isinstance(config, Mapping):
        agent = _from_mapping(nest(config), spec)
    else:
        raise ConfigError(f"config: expected a RunConfig or a mapping of its keys, got {type(config).__name__}")
    attach_references(agent, games)
    return agent


def _from_mapping(values: dict[str, Any], spec: EnvSpec | None) -> Agent:
    kind, checkpoint = values.pop("type", None), values.pop("checkpoint_path", None)
    if kind is not None:
        if "agent" in values:
            raise ConfigError(f"type: stands for agent, which is given as well ({values['agent']}); leave one of them out")
        values["agent"] = str(kind).lower()
    if checkpoint is None:
        made = make_config(str(values.pop("preset", "default")), **values)
        return make_agent(made, spec or task_spec(canonical_task(made.task), made), resolve_device(made.device))
    if "preset" in values:
        raise ConfigError(f"preset: {checkpoint} has its configuration; leave preset out, or checkpoint_path")
    device, task, asked = str(values.pop("device", "auto")), values.pop("task", None), values.pop("agent", None)
    agent = load_agent(Path(checkpoint), spec or task, device=device, overrides=values, learn=True)[0]
    if asked not in (None, agent.config.agent):
        raise ConfigError(f"{'type' if kind else 'agent'}: {checkpoint} holds agent={agent.config.agent}, not {asked}; leave it out")
    return agent
