"""What agents have in common: random streams, a discount, opinions about observations and actions, a source of transitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from worldmpc.config import ConfigError, RunConfig, discount_from_episode_length, seed_decisions
from worldmpc.data.replay import make_replay
from worldmpc.data.source import ReplaySource
from worldmpc.data.transitions import n_step_transitions
from worldmpc.noise import NoiseStream
from worldmpc.types import EnvSpec


class Streams(dict[str, NoiseStream]):
    """The random streams of an agent, by purpose: ``explore``, ``eval``, ``update``, and ``more`` of its own."""

    def __init__(self, seed: int, device: torch.device, *more: str) -> None:
        super().__init__({name: NoiseStream(seed, name, device=device) for name in ("explore", "eval", "update", *more)})
        self._seed, self._device = seed, device

    def acting(self, mode: str) -> NoiseStream:
        """Return the stream of a mode of acting."""
        return self["explore" if mode == "explore" else "eval"]

    def restart_eval(self, *index: int) -> None:
        """Start the evaluation stream anew, so that evaluations neither depend on nor disturb anything else."""
        self["eval"] = NoiseStream(self._seed, "eval", *index, device=self._device)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all streams."""
        return {name: stream.state_dict() for name, stream in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved states; a stream that the saved agent had no use for begins."""
        for name, stream in self.items():
            if name in state:
                stream.load_state_dict(state[name])


def discount_of(config: RunConfig, spec: EnvSpec) -> float:
    """Return the discount per decision: as configured, or from the episode length."""
    return discount_from_episode_length(spec.episode_length) if config.env.discount is None else config.env.discount


def vector_dim(spec: EnvSpec) -> int:
    """Return the number of observation dimensions.

    Raises:
        ConfigError: observations are not vectors.
    """
    if len(spec.obs_shape) != 1:
        raise ConfigError(f"task: observations of shape {list(spec.obs_shape)} are not supported, only vectors")
    return spec.obs_shape[0]


class Part(Protocol):
    """Something that an agent may have, with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


def state_of(part: Part | None) -> dict[str, Any] | None:
    """Return the state of a part, None of none."""
    return None if part is None else part.state_dict()


def restore(part: Part | None, state: Mapping[str, Any] | None) -> None:
    """Restore a part, if there is one.

    Raises:
        ValueError: there is a part but no state, or a state but no part.
    """
    if (part is None) != (state is None):
        raise ValueError("the agent was saved with other parts: one has a state and is not there, or is there and has none")
    if part is not None and state is not None:
        part.load_state_dict(state)


def require_actions(spec: EnvSpec, agent: str, discrete: bool) -> None:
    """Check that an environment has the kind of actions that an agent needs.

    Raises:
        ConfigError: it has the other kind.
    """
    if discrete and not spec.discrete:
        others = "agent=sac, td3, ppo or tdmpc2"
        raise ConfigError(f"agent: {agent} needs a discrete action space, {spec.name} has Box actions; use {others}")
    if spec.discrete and not discrete:
        others = "agent=dqn, sac, ppo or tdmpc2"
        raise ConfigError(f"agent: {agent} needs a Box action space, {spec.name} has Discrete actions; use {others}")


def transition_source(
    config: RunConfig, spec: EnvSpec, device: torch.device, num_envs: int, generator: torch.Generator, n_step: int, discount: float
) -> ReplaySource:
    """Return a replay that hands out transitions of ``n_step`` steps [B, ...]."""
    replay = make_replay(config, spec, num_envs, n_step, device=device)
    return ReplaySource(
        replay,
        config.loss.batch_size,
        config.train.utd,
        seed_decisions(config, spec.episode_length),
        generator,
        convert=lambda windows: n_step_transitions(windows, discount),
    )
