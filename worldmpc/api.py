"""The library in six verbs: make_envs, make_agent, train, evaluate, save, load."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium

from worldmpc import agents
from worldmpc import envs as environments
from worldmpc.config import (
    ConfigError,
    EnvConfig,
    LogConfig,
    OpponentsConfig,
    RunConfig,
    auxiliary_warning,
    lookup,
    make_config,
    merge,
    nest,
)
from worldmpc.envs import Task, VecEnv
from worldmpc.noise import derive_seed
from worldmpc.opponents.match import Envs, Match, player_spec
from worldmpc.opponents.pool import SELF_PLAY, Pool
from worldmpc.runtime import keep_freed_memory, resolve_device
from worldmpc.training import evaluator
from worldmpc.training.checkpoint import save_checkpoint
from worldmpc.training.logger import RunLogger
from worldmpc.training.playing import play_against
from worldmpc.training.restore import check_dimensions, load_agent, trusted_task
from worldmpc.training.specs import spec_dict
from worldmpc.training.trainer import Hook, TrainState, make_state
from worldmpc.training.trainer import train as run_loop
from worldmpc.training.two_player import seat_opponents
from worldmpc.types import Agent, EnvSpec, Mode

_OF_A_RUN = ("seeds", "threads", "run_dir", "resume", "eval_freq", "eval", "checkpoint", "log")
"""Keys and sections that :func:`worldmpc.run` reads, and an agent in memory does not."""


def make_envs(
    task: Task,
    config: EnvConfig | None = None,
    *,
    seed: int = 1,
    render: bool = False,
    opponents: str | Sequence[str] | OpponentsConfig | None = None,
) -> Envs:
    """Make ``config.num_envs`` environments of a task and step them together; of a game of two they have opponents in them.

    Args:
        task: see :func:`worldmpc.envs.make_envs`, which makes them.
        config: how they are made.
        seed: of episodes and opponents.
        render: they are asked for frames.
        opponents: whom a game of two is played against, by name or as in a configuration: ``["weak", "strong"]``, ``"SAC:runs/a"``;
            None: snapshots of the agent that is trained.

    Raises:
        ConfigError: see :func:`worldmpc.envs.make_envs`; or opponents of a task that has one player, or that are unknown or do not fit.
        CheckpointError: an opponent's checkpoint cannot be read.
        EnvError: an environment's own code raised an error.
    """
    envs = environments.make_envs(task, config, seed=seed, render=render)
    try:
        if envs.spec.seats is None:
            if opponents is not None:
                raise ConfigError(f"opponents: {envs.spec.name} has one player; leave them out, or make a game of two, as hockey")
            return envs
        named: dict[str, Any] = {}
        if opponents is not None:
            named["opponents"] = dataclasses.asdict(opponents) if isinstance(opponents, OpponentsConfig) else opponents
        return seat_opponents(envs, make_config(seed=seed, **named))
    except BaseException:
        if not isinstance(task, gymnasium.Env | gymnasium.vector.VectorEnv):
            envs.close()
        raise


def make_agent(envs: Envs | EnvSpec, preset: str = "default", **overrides: Any) -> Agent:
    """Make an untrained agent for environments.

    Args:
        envs: the environments, or what they say about themselves.
        preset: named set of values; see :data:`worldmpc.config.PRESETS`.
        overrides: configuration on top, as in :func:`worldmpc.config.make_config`: ``agent="dqn", seed=2, **{"planner.horizon": 5}``.

    Raises:
        ConfigError: a value that cannot be used, that the environments have otherwise, or that only a whole run reads.
    """
    spec = envs if isinstance(envs, EnvSpec) else envs.spec
    # The agent remembers how its environments were made, so that `evaluate` and `load` play the same task.
    fixed: dict[str, Any] = {"env.action_repeat": spec.action_repeat, "env.episode_length": spec.episode_length}
    known: dict[str, Any] = {"task": spec.name}
    if not isinstance(envs, EnvSpec):
        fixed |= {"env.num_envs": envs.num_envs, "env.simulator_state": envs.config.simulator_state}
        if envs.config.discount is not None:  # else the agent's or preset's own stays
            known["env.discount"] = envs.config.discount
    if isinstance(envs, Match) and (names := _opponents_of(envs)):
        known["eval.opponents"] = names
    over = nest(overrides)
    config = make_config(preset, **merge(nest({**known, **fixed}), over))
    _check_overrides(config, over, fixed)
    agent = agents.make_agent(config, spec, resolve_device(config.device))
    if (warning := auxiliary_warning(config.multi_gamma)) is not None:
        warnings.warn(warning, stacklevel=2)
    return agent


def train(
    agent: Agent, envs: Envs, steps: int, *, hooks: Sequence[Hook] = (), state: TrainState | None = None, progress: bool = True
) -> TrainState:
    """Train an agent in memory; :func:`worldmpc.run` does the same with evaluations, checkpoints and files.

    What changes over a run (``dqn.epsilon_*``, ``optim.schedule``, ``ppo.anneal_clip``) follows the steps that the agent was made for,
    ``make_agent(envs, steps=1500)``, and not those of this call.

    Args:
        agent: learns, in place.
        envs: what to act in.
        steps: simulator steps to reach, counted from the beginning of ``state``.
        hooks: called after the updates of every step, as ``hook(state, metrics)``; ``state.stop = True`` ends training.
        state: what an earlier call returned, to go on from there with its replay.
        progress: show a progress display.

    Raises:
        ConfigError: the environments have other observations or actions than the agent, or are not those of ``state``.
        DivergenceError: a loss exploded.
        EnvError: an environment failed.
    """
    keep_freed_memory()
    _check_fits(agent, envs)
    if state is None:
        state = make_state(agent, envs)
    if state.agent is not agent or state.envs is not envs:
        raise ConfigError("state: belongs to another agent or other environments; pass state.agent and state.envs, or leave state out")
    state.stop = False
    total = -(-steps // envs.spec.action_repeat)
    display = RunLogger(None, LogConfig(progress="auto" if progress else "none", tensorboard=False), total_env_steps=steps)
    with display:
        show: Hook = lambda current, metrics: display.progress(current.decisions, current.env_steps, current.updates)  # noqa: E731
        run_loop(state, (show, *hooks), total)
    return state


def evaluate(
    agent: Agent,
    task: Task | Envs | None = None,
    episodes: int = 10,
    *,
    mode: Mode = "eval",
    index: int = 0,
    opponents: str | Sequence[str] | None = None,
) -> evaluator.EvalResult:
    """Play whole episodes with the planner (``mode="eval"``) or with the policy prior alone (``mode="prior"``).

    A game of two is played ``episodes`` times against each opponent, from both seats and, in hockey, with both starters; ``games`` of the
    result has them by opponent.

    Args:
        agent: acts.
        task: a task's name, a function that makes the environment, or environments, which begin other episodes (training that goes on with
            them begins new ones); None: the task that the agent was made for.
        episodes: how many.
        mode: who acts.
        index: another number gives other episodes.
        opponents: names of whom to play in a game of two; None: those that the agent's environments were made with, or the bots of hockey,
            or chance.

    Raises:
        ConfigError: the agent was made for an environment without a name and ``task`` is None, the task has other observations or actions,
            or the agent cannot act in this mode; or opponents of a task that has one player, or that are unknown or do not fit.
        CheckpointError: an opponent's checkpoint cannot be read.
        EnvError: an environment failed.
    """
    names = [opponents] if isinstance(opponents, str) else opponents
    if isinstance(task, Match):
        result = _play(agent, task.joint, episodes, names, mode, index)
        task.reset()  # whoever goes on with it meets its own opponents, in their seats
        return result
    if isinstance(task, VecEnv):
        return _play(agent, task, episodes, names, mode, index)
    if task is None:
        task = trusted_task(agent.config.task)
        if "/" not in task:
            raise ConfigError(f"task: the agent was made for the environment object {task}; pass a function that makes it")
    with evaluator.evaluation_envs(task, agent.config.env, episodes, seed=derive_seed(agent.config.seed, "eval")) as envs:
        return _play(agent, envs, episodes, names, mode, index)


def _play(agent: Agent, envs: VecEnv, episodes: int, opponents: Sequence[str] | None, mode: Mode, index: int) -> evaluator.EvalResult:
    """Play episodes of a task of one player, or games against opponents."""
    _check_fits(agent, envs)
    if envs.spec.seats is not None:
        return play_against(agent, envs, episodes, opponents, mode=mode, index=index)
    if opponents is not None:
        raise ConfigError(f"opponents: {envs.spec.name} has one player; leave them out, or play a game of two, as hockey")
    return evaluator.evaluate(agent, envs, episodes, mode=mode, index=index)


def save(agent: Agent, path: str | Path) -> Path:
    """Write an agent, its optimisers and its configuration to a folder of plain tensors and JSON; one that exists is replaced.

    Raises:
        CheckpointError: it could not be written; what was there before is intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_checkpoint(
        path.parent, path.name, {"agent": agent.state_dict()}, {"config": agent.config.to_dict(), "spec": spec_dict(agent.spec)}
    )


def load(path: str | Path, task: Task | None = None, *, device: str = "auto") -> Agent:
    """Load an agent from a folder that :func:`save` wrote, a run folder, a checkpoint, or a published ``.pt`` file (which needs ``task``).

    Raises:
        ConfigError: the task does not fit, or is missing for a published file.
        CheckpointError: the folder is no intact checkpoint.
    """
    return load_agent(path, task, device=device)[0]


def _check_overrides(config: RunConfig, overrides: Mapping[str, Any], envs: Mapping[str, Any]) -> None:
    """Refuse what is of a run alone, and what the environments, which are there already, have otherwise."""
    for name in overrides:
        if name in _OF_A_RUN:
            raise ConfigError(f"{name}: only worldmpc.run reads it, an agent in memory does not; leave it out")
    for name, value in envs.items():
        if (given := lookup(config, name)) != value:
            raise ConfigError(f"{name}: the environments were made with {value}, got {given}; pass it to make_envs, in EnvConfig")


def _opponents_of(match: Match) -> list[str]:
    """Return the names of those who are played against, without snapshots."""
    phases = match.pool.phases if isinstance(match.pool, Pool) else ()
    return list(dict.fromkeys(entry.name for phase in phases for entry in phase.entries if entry.name != SELF_PLAY))


def _check_fits(agent: Agent, envs: Envs) -> None:
    spec = envs.spec if envs.spec.seats is None else player_spec(envs.spec)
    check_dimensions("the agent", agent.spec.obs_shape[0], agent.spec.action_dim, spec, agent.spec.discrete)
