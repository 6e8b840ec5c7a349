"""The true simulator as a model: a copy of a MuJoCo environment, put into imagined states and stepped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from worldmpc.config import ConfigError
from worldmpc.envs.simulator_state import SimulatorState
from worldmpc.envs.wrappers import EnvError
from worldmpc.types import ModelStep


class SimulatorModel:
    """Dynamics that step the environment's own code, one row after the other on the CPU; a row costs what a step of it costs.

    A state is the whole observation of :class:`~worldmpc.envs.simulator_state.SimulatorState`, [Z] = the task's observation and
    then the simulator's state, of which only the latter matters for a step: ``encode`` and ``observe`` are the identity. Reward,
    termination, action scaling and action repeat are those of the environment, as its wrappers apply them; time limits are not
    part of the dynamics. There are no gradients. A row whose simulation diverges (dm_control raises ``PhysicsError``) is NaN
    from there on, which planners count as the worst.

    Threads do not help: MuJoCo's own part of a step, during which other threads could run, is 10 to 50 % of it.

    Args:
        make_env: returns a new environment in the common form with the simulator's state in its observations, as
            ``partial(make_env, task, config=config.env)`` with ``env.simulator_state`` does. Called once.

    Raises:
        ConfigError: the environment does not append the simulator's state to its observations.
    """

    predicts_reward = True

    def __init__(self, make_env: Callable[[], gymnasium.Env[Any, Any]]) -> None:
        self._env = make_env()
        layers = list(_layers(self._env))
        simulator = next((layer for layer in layers if isinstance(layer, SimulatorState)), None)
        if simulator is None:
            raise ConfigError("env.simulator_state: dynamics=simulator needs it; set env.simulator_state=true")
        self._simulator, self._limits = simulator, [layer for layer in layers if isinstance(layer, TimeLimit)]
        self._env.reset(seed=0)
        observation, action = self._env.observation_space, self._env.action_space
        assert isinstance(observation, Box) and isinstance(action, Box)
        self.state_dim, self.action_dim = observation.shape[0], action.shape[0]
        self.discrete = bool(getattr(getattr(self._env, "env_spec", None), "discrete", False))

    def encode(self, obs: Tensor) -> Tensor:
        """[..., Z] -> [..., Z], the same.

        Raises:
            ConfigError: the simulator's state is not part of the observations.
        """
        if obs.shape[-1] != self.state_dim:
            raise ConfigError(
                f"env.simulator_state: the simulator's state makes observations of {self.state_dim} numbers, "
                f"these have {obs.shape[-1]}; set env.simulator_state=true"
            )
        return obs

    def observe(self, z: Tensor) -> Tensor:
        """[..., Z] -> [..., Z], the same."""
        return z

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., Z], [..., A] -> z [..., Z], reward [...], cont [...] (0 or 1), on the device of ``z``.

        Raises:
            ConfigError: gradients are asked for.
            EnvError: the environment raised an error.
        """
        if torch.is_grad_enabled() and (z.requires_grad or action.requires_grad):
            raise ConfigError("dynamics.name: the simulator has no gradients; set planner.gradient_steps=0 and planner.guidance=0")
        states = z.reshape(-1, self.state_dim)[:, -self._simulator.state_dim :].cpu().numpy()
        actions = action.reshape(-1, self.action_dim).cpu().numpy()
        rows = np.full((len(states), self.state_dim + 2), np.nan, states.dtype)  # the next state, reward, and 1 unless it terminated
        for index in np.flatnonzero(np.isfinite(states).all(1)):
            self._simulator.set_state(states[index])
            for limit in self._limits:
                limit._elapsed_steps = 0
            try:
                obs, reward, terminated, _, _ = self._env.step(actions[index])
            except EnvError as error:
                if type(error.__cause__).__name__ != "PhysicsError":
                    raise
                continue
            rows[index, :-2], rows[index, -2], rows[index, -1] = obs, reward, not terminated
        following, reward, cont = torch.from_numpy(rows).to(z).split((self.state_dim, 1, 1), -1)
        return ModelStep(following.reshape(z.shape), reward.reshape(z.shape[:-1]), cont.reshape(z.shape[:-1]))

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()


def _layers(env: Any) -> Iterator[Any]:
    """Yield an environment's wrappers, the outermost first."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
