"""Evaluation on environments of its own, without touching the state of training."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import gymnasium
import numpy as np
import torch

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import Task, VecEnv, borrowed_envs
from worldmpc.functional import tree_where
from worldmpc.noise import derive_seed
from worldmpc.opponents.games import GameResult, Stopped
from worldmpc.training.episodes import EpisodeTally
from worldmpc.types import ActOutput, Agent, EnvStep, Mode

MAX_DECISIONS = 1_000
"""Longest episode that an evaluation plays where the environment itself sets no limit."""


MAX_ENVS = 10
"""Environments that an evaluation steps side by side, where the environment itself sets a time limit."""


@contextmanager
def evaluation_envs(
    task: Task, config: EnvConfig, episodes: int, *, seed: int, at_most: int = MAX_ENVS, render: bool = False
) -> Iterator[VecEnv]:
    """Make the environments of an evaluation for the length of a ``with`` block, in this process.

    There is one per episode, but no more than ``at_most`` where episodes have a time limit; an environment object is as many as it is.

    Raises:
        ConfigError: see :func:`worldmpc.envs.make_envs`.
        EnvError: an environment failed.
    """
    is_object = isinstance(task, gymnasium.Env | gymnasium.vector.VectorEnv)
    local = dataclasses.replace(config, num_envs=1 if is_object else min(episodes, at_most), workers="sync", num_workers=None)
    with ExitStack() as stack:
        plain = EnvConfig() if isinstance(task, gymnasium.vector.VectorEnv) else local
        envs = stack.enter_context(borrowed_envs(task, plain, seed=seed, render=render))
        if envs.spec.episode_length is None and envs.num_envs < episodes and not is_object:
            envs = stack.enter_context(borrowed_envs(task, dataclasses.replace(local, num_envs=episodes), seed=seed, render=render))
        yield envs


Watch = Callable[[torch.Tensor, ActOutput, EnvStep], None]
"""``(observations acted on, answer, what followed)``, of all environments."""


class EvalResult(NamedTuple):
    """Episodes of one evaluation."""

    returns: list[float]
    lengths: list[int]
    success: list[float]
    """1 or 0 per episode, NaN where the environment does not report success; of games 1, 0.5 for a draw, or 0."""
    frames: list[np.ndarray]
    """Frames [height, width, 3] uint8 of the first environment's first episode, if asked for."""
    games: dict[str, list[GameResult]] = {}
    """Of a game of two the episodes by opponent."""

    @property
    def mean_return(self) -> float:
        """Mean return over the episodes."""
        return float(np.mean(self.returns))


def evaluate(
    agent: Agent,
    envs: VecEnv,
    episodes: int,
    *,
    mode: Mode = "eval",
    index: int = 0,
    record: bool = False,
    stop: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
) -> EvalResult:
    """Play whole episodes, all environments side by side.

    Where the environment has no time limit, episodes are cut after :data:`MAX_DECISIONS`, with a warning; one environment then plays one
    episode.

    Episode seeds and noise depend on (seed of the agent, ``index``) alone, so that an evaluation can be repeated, and neither
    depends on training nor changes it.

    Args:
        agent: acts.
        envs: environments of the evaluation's own; they are reset.
        episodes: episodes in all; every environment plays the same number of them, or one fewer.
        mode: ``eval`` plans, ``prior`` acts with the policy's mean.
        index: number of the evaluation.
        record: keep frames of the first episode; needs environments made with ``render=True``.
        stop: asked before every decision; where it says True the evaluation ends.
        watch: told of every decision of the first environment's first episode.

    Raises:
        ConfigError: the agent cannot act in this mode.
        EnvError: an environment failed.
        Stopped: ``stop`` said so.
        ValueError: more episodes than environments, where an episode may have no end.
    """
    if mode not in agent.modes:
        raise ConfigError(f"mode: agent={agent.config.agent} as configured acts in {' or '.join(agent.modes)}, not in '{mode}'")
    if envs.spec.episode_length is None and episodes > envs.num_envs:
        raise ValueError(
            f"{envs.spec.name} has no time limit: make {episodes} environments for {episodes} episodes, or set env.episode_length"
        )
    count = min(envs.num_envs, episodes)
    quota = torch.tensor([episodes // envs.num_envs + (env < episodes % envs.num_envs) for env in range(envs.num_envs)])
    agent.reset_eval_noise(index)
    obs = envs.reset(seed=derive_seed(agent.config.seed, "eval", index))
    carry = agent.init_carry(envs.num_envs)
    tally = EpisodeTally(envs.num_envs, envs.spec.episode_length or MAX_DECISIONS)
    played = torch.zeros(envs.num_envs, dtype=torch.int64)
    result = EvalResult([], [], [], [])
    first = count > 0  # the first environment's first episode is under way
    while bool((played < quota).any()):
        if stop():
            raise Stopped
        if first and record:
            result.frames.append(envs.render()[0])
        output = agent.act(carry, obs, mode)
        step = envs.step(output.action)
        if first and watch is not None:
            watch(obs, output, step)
        obs, carry = step.obs, output.carry
        fresh = step.terminated | step.truncated | ~step.valid
        if bool(fresh.any()):
            carry = tree_where(fresh, agent.init_carry(envs.num_envs), carry)
        for env, episode in tally.note(step).items():
            if played[env] < quota[env]:
                result.returns.append(episode.ret)
                result.lengths.append(episode.length)
                result.success.append(episode.success)
            played[env] += 1
            first = first and env != 0
    if envs.spec.episode_length is None and (cut := result.lengths.count(MAX_DECISIONS)):
        warnings.warn(
            f"{envs.spec.name} sets no time limit: {cut} of {episodes} episodes had no end after {MAX_DECISIONS} decisions "
            "and count as over; env.episode_length sets a limit",
            stacklevel=2,
        )
    return result
