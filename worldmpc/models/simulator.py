"""The true simulator as a model: copies of a MuJoCo environment, put into imagined states and stepped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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
    """Dynamics that step the environment's own code, one row after the other on the CPU.

    A state is the whole observation of :class:`~worldmpc.envs.simulator_state.SimulatorState`, [Z] = the task's observation and
    then the simulator's state, of which only the latter matters for a step: ``observe`` and ``encode`` are the identity. Reward,
    termination, action scaling and action repeat are those of the environment, as its wrappers apply them; time limits are not
    part of the dynamics. There are no gradients. A row whose simulation diverges (dm_control raises ``PhysicsError``) is NaN
    from there on, which planners count as the worst.

    Args:
        make_env: returns a new environment in the common form with ``env.simulator_state`` set, as
            ``partial(make_env, task, config=config.env)`` does. Called ``num_threads`` times.
        num_threads: copies that are stepped at the same time. Worth it only where MuJoCo's own part of a step, during which
            other threads run, is large: see :meth:`step`.

    Raises:
        ConfigError: the environment does not append the simulator's state to its observations.
    """

    predicts_reward = True

    def __init__(self, make_env: Callable[[], gymnasium.Env[Any, Any]], num_threads: int = 1) -> None:
        if num_threads < 1:
            raise ConfigError(f"num_threads: expected at least 1, got {num_threads}")
        self._copies = [_Copy(make_env()) for _ in range(num_threads)]
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        env = self._copies[0].env
        assert isinstance(env.observation_space, Box) and isinstance(env.action_space, Box)
        self.state_dim, self.action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.discrete = bool(getattr(getattr(env, "env_spec", None), "discrete", False))

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
        states, actions = z.reshape(-1, self.state_dim).cpu().numpy(), action.reshape(-1, self.action_dim).cpu().numpy()
        rows = np.full((len(states), self.state_dim + 2), np.nan, states.dtype)
        parts = [slice(*ends) for ends in pairwise(np.linspace(0, len(rows), len(self._copies) + 1, dtype=int))]
        jobs = [(copy, states[part], actions[part], rows[part]) for copy, part in zip(self._copies, parts, strict=True)]
        if self._pool is None:
            _Copy.step(*jobs[0])
        else:
            list(self._pool.map(lambda job: _Copy.step(*job), jobs))
        following, reward, cont = torch.from_numpy(rows).to(z).split((self.state_dim, 1, 1), -1)
        return ModelStep(following.reshape(z.shape), reward.reshape(z.shape[:-1]), cont.reshape(z.shape[:-1]))

    def close(self) -> None:
        """End the threads and free the simulators."""
        if self._pool is not None:
            self._pool.shutdown()
        for copy in self._copies:
            copy.env.close()


class _Copy:
    """An environment that is put into states."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        layers = list(_layers(env))
        simulator = next((layer for layer in layers if isinstance(layer, SimulatorState)), None)
        if simulator is None:
            raise ConfigError("env.simulator_state: dynamics=simulator needs it; set env.simulator_state=true")
        self.env, self.simulator = env, simulator
        self.limits = [layer for layer in layers if isinstance(layer, TimeLimit)]
        env.reset(seed=0)

    def step(self, states: np.ndarray, actions: np.ndarray, rows: np.ndarray) -> None:
        """Step states [N, Z] by actions [N, A] into rows [N, Z + 2]: the next state, reward, and 1 unless it terminated."""
        states = states[:, -self.simulator.state_dim :]
        for index in np.flatnonzero(np.isfinite(states).all(1)):
            self.simulator.set_state(states[index])
            for limit in self.limits:
                limit._elapsed_steps = 0
            try:
                obs, reward, terminated, _, _ = self.env.step(actions[index])
            except EnvError as error:
                if type(error.__cause__).__name__ != "PhysicsError":
                    raise
                continue
            rows[index, :-2], rows[index, -2], rows[index, -1] = obs, reward, not terminated


def _layers(env: Any) -> Iterator[Any]:
    """Yield an environment's wrappers, the outermost first."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
