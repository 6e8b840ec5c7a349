"""All planners on one model, at an equal number of imagined model steps per decision: what they reach, and what a plan takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmpc.agents import make_agent
from worldmpc.bench.budget import PLAIN, PLANNERS, Traits, budgeted, check_name, count, traits_of
from worldmpc.bench.measure import interleave, summary
from worldmpc.config import ConfigError, RunConfig, make_config, planner_reads
from worldmpc.envs import VecEnv, canonical_task
from worldmpc.models.analytic import ANALYTIC
from worldmpc.models.official import is_official
from worldmpc.planners import make_planner
from worldmpc.runtime import resolve_device
from worldmpc.training.checkpoint import CheckpointError
from worldmpc.training.evaluator import evaluate, evaluation_envs
from worldmpc.training.restore import find_checkpoint, load_agent, task_spec
from worldmpc.types import Agent, Model

HORIZONS = {"gym/Acrobot-v1": 50, "gym/MountainCar-v0": 100, "gym/MountainCarContinuous-v0": 100}
"""Decisions to look ahead with a task's equations, where 20 are too few."""
DEFAULT_HORIZON = 20

Values = Mapping[str, Any]
"""Nested configuration values."""


class Subject(NamedTuple):
    """A model to plan with, and how much every planner may imagine with it for one decision."""

    task: str
    checkpoint: str | None
    """What the model was learned by; None: the task's equations."""
    horizon: int
    evaluations: int
    """Model steps per environment and decision."""
    traits: Traits = PLAIN
    prior: bool = False
    """It has a learned prior over action sequences."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{'analytic' if self.checkpoint is None else 'latent'} {self.task}"


def analytic(task: str, horizon: int | None, evaluations: int) -> Subject:
    """Return a task's equations as something to plan with.

    Raises:
        ConfigError: a task without known equations.
    """
    task = canonical_task(task)
    if task not in ANALYTIC:
        raise ConfigError(
            f"task: no known equations for {task}; there are for {', '.join(ANALYTIC)}; use checkpoint=RUN for a learned model"
        )
    return Subject(task, None, horizon or HORIZONS.get(task, DEFAULT_HORIZON), evaluations)


def learned(checkpoint: str, horizon: int | None, evaluations: int) -> Subject:
    """Return the model of a run or checkpoint as something to plan with; ``horizon`` None: what it was trained with.

    Raises:
        ConfigError: its agent does not plan, or it does not say what to play.
        CheckpointError: no usable checkpoint.
    """
    if is_official(find_checkpoint(checkpoint)):
        raise ConfigError(f"checkpoint: {checkpoint} is a published file, which does not say what to play; use a run folder")
    agent, config = load_agent(checkpoint, device="cpu")
    if ":" in config.task or agent.spec.name != config.task:
        raise ConfigError(
            f"checkpoint: {checkpoint} was trained on {agent.spec.name}, which needs code of its own; use one of a named task"
        )
    model = planning_model(agent)
    if not hasattr(model, "terminal_value"):
        raise ConfigError(f"checkpoint: {checkpoint} is of agent={config.agent}, which does not plan; use one of tdmpc2, mbmpc or pets")
    prior = getattr(model, "trajectory", None) is not None
    return Subject(config.task, checkpoint, horizon or config.planner.horizon, evaluations, traits_of(model), prior)


def make(subject: Subject, planner: Values, changes: Values, seed: int, device: str) -> Agent:
    """Return the agent that plans with a subject.

    Args:
        subject: the model.
        planner: values of ``planner``.
        changes: nested configuration values of ``env`` and ``planner``, which count for the planners that read them.
        seed: of episodes and planning.
        device: where to plan.

    Raises:
        ConfigError: a planner that cannot be had with this model or these actions.
    """
    shared = {key: value for key, value in changes.get("planner", {}).items() if planner_reads(planner, key)}
    changes = {**changes, "planner": {**shared, **planner}}
    if subject.checkpoint is not None:
        return load_agent(subject.checkpoint, device=device, seed=seed, overrides=changes)[0]
    config = make_config(agent="mpc", task=subject.task, seed=seed, device=resolve_device(device), **changes)
    return make_agent(config, task_spec(subject.task, config), config.device)


def planning_model(agent: Agent) -> Model:
    """Return what an agent plans with: its model, or what it composes of the parts of that."""
    return getattr(agent, "planning", agent.model)


def prepare(subject: Subject, names: Sequence[str], changes: Values, *, iterations: int, device: str) -> dict[str, dict[str, Any] | str]:
    """Return for each planner the values of ``planner`` within the budget, or why it cannot be had with this model.

    Raises:
        ConfigError: an unknown planner, too few evaluations for one, or values of ``changes`` that cannot be used.
    """
    # What is wrong with the changes is no planner's fault.
    RunConfig.from_dict({"planner": changes.get("planner", {})})
    make(subject, {}, {name: values for name, values in changes.items() if name != "planner"}, 1, device)
    plain = {"prior": "none", "guidance": 0.0, "gradient_steps": 0, "horizon": subject.horizon}
    small = {"num_samples": 64, "num_elites": 4, "num_pi_trajs": 0}  # any sizes will do
    plans: dict[str, dict[str, Any] | str] = {}
    for name in names:
        check_name(name)
        if PLANNERS[name].get("prior") == "learned" and not subject.prior:
            plans[name] = "this model has no learned prior over action sequences"
            continue
        try:
            make(subject, {**plain, **small, **PLANNERS[name]}, changes, 1, device)
        except (ConfigError, CheckpointError) as error:
            plans[name] = _reason(error)
        else:
            plans[name] = budgeted(name, subject.evaluations, subject.horizon, subject.traits, iterations)
    return plans


def compare(
    subject: Subject, plans: Mapping[str, Values | str], changes: Values, *, seeds: Sequence[int], episodes: int, repeats: int, device: str
) -> Iterator[dict[str, Any]]:
    """Yield a row per planner, as plain data for JSON: counted model steps, milliseconds of a decision, and returns.

    Decisions are timed in one environment, those of all planners in turns; then each planner plays. A planner that cannot be had has
    a ``reason`` instead.

    Args:
        subject: the model.
        plans: what :func:`prepare` returned.
        changes: nested configuration values of ``env`` and ``planner``.
        seeds: of episodes and planning.
        episodes: per seed, side by side.
        repeats: timed decisions.
        device: where to plan.
    """
    agents: dict[str, Agent] = {}
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, plan in plans.items():
        rows[name] = {"model": subject.label, **subject._asdict(), "traits": subject.traits._asdict(), "planner": name, "reason": plan}
        if isinstance(plan, str):
            continue
        agent: Any = make(subject, plan, changes, seeds[0], device)
        with _environments(agent, 1) as envs:
            obs = envs.reset()
        config, spec, model = agent.config, agent.spec, planning_model(agent)
        try:
            planner = make_planner(config.planner, spec.action_dim, agent.discount, getattr(model, "num_q", 2), spec.discrete)
            counted = count(planner, model, obs.to(agent.device))
        except ConfigError as error:
            rows[name]["reason"] = _reason(error)
            continue
        rows[name] |= {"reason": None, "device": str(agent.device), "threads": torch.get_num_threads(), "counted": counted}
        settings = config.to_dict() | {"run_dir": None}  # a place on this machine
        rows[name] |= {"sizes": dict(plan), "episodes": episodes, "repeats": repeats, "config": settings}
        agents[name], calls[name] = agent, _decision(agent, obs)
    times = interleave(calls, repeats, torch.device(resolve_device(device)))
    for name, row in rows.items():
        if name in agents:
            returns = {seed: _returns(make(subject, row["sizes"], changes, seed, device), episodes) for seed in seeds}
            means = [float(np.mean(found)) for found in returns.values()]
            row |= {"plan": summary(times[name]), "returns": returns}
            row |= {"return_mean": float(np.mean(means)), "return_min": min(means), "return_max": max(means)}
        yield row


def _reason(error: Exception) -> str:
    """Return what is wrong, of an error ``planner.<key>: what is wrong; what to do`` or a checkpoint's; raise all others."""
    if isinstance(error, ConfigError) and not str(error).startswith("planner."):
        raise error
    text = str(error).removeprefix("checkpoint: ") if isinstance(error, CheckpointError) else str(error).partition(": ")[2]
    return text.partition(";")[0]


def _decision(agent: Agent, obs: Tensor) -> Callable[[], Any]:
    carry = agent.init_carry(len(obs))
    return lambda: agent.act(carry, obs, "eval")


def _environments(agent: Agent, episodes: int) -> AbstractContextManager[VecEnv]:
    return evaluation_envs(agent.config.task, agent.config.env, episodes, seed=agent.config.seed)


def _returns(agent: Agent, episodes: int) -> list[float]:
    with _environments(agent, episodes) as envs:
        return evaluate(agent, envs, episodes).returns
