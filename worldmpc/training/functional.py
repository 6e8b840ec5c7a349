"""Training as functions over components: a visible loop, of which every part can be exchanged.

::

    state = functional_training_loop(config, ppo_config, policy, curriculum, policy_store, step_fn=my_step, custom_losses=[my_loss])

or, with the loop in your own hands::

    components = create_training_components(config, ppo_config, policy, vecenv, experience, policy_store)
    state = TrainingState()
    while state.agent_steps < config.total_timesteps:
        metrics = default_training_step(state, components, config, experience)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldmpc.config import ConfigError, OptimConfig, PPOConfig
from worldmpc.data.rollout import Experience
from worldmpc.envs.vector import VecEnv
from worldmpc.learners.ppo import PPOOptimizer
from worldmpc.on_policy import CustomLoss
from worldmpc.optim import learning_rate_scale
from worldmpc.runtime import resolve_device
from worldmpc.training import session
from worldmpc.training.collector import RolloutCollector
from worldmpc.training.configs import TrainerConfig, TrainingConfig
from worldmpc.training.curriculum import Curriculum, CurriculumTask
from worldmpc.training.evaluation import PolicyEvaluator
from worldmpc.training.policy_store import PolicyStore, TrainingCheckpointer
from worldmpc.training.session import Components, Seats, StepFunction, TaskSource, TrainingState, make_experience
from worldmpc.training.stats import StatsLogger, start_wandb

Suite = Mapping[str, Sequence[CurriculumTask | str]]
"""Category -> tasks."""


def create_training_components(
    config: TrainerConfig,
    ppo_config: PPOConfig,
    policy: nn.Module,
    vecenv: VecEnv,
    experience: Experience,
    policy_store: PolicyStore | None = None,
    wandb_run: Any = None,
    *,
    suite: Suite | None = None,
) -> Components:
    """Put the components together that :func:`default_training_step` uses.

    Args:
        config: of the loop.
        ppo_config: of the update; a ``discount`` of the environments takes the place of its ``gamma`` beforehand.
        policy: learns; moved to the device.
        vecenv: where it learns.
        experience: the rollout to fill.
        policy_store: where policies are saved; needed with ``config.run_dir``.
        wandb_run: gets all records as well.
        suite: what is evaluated on; needed with ``config.evaluate_interval``.

    Raises:
        ConfigError: something that the configuration needs is missing.
    """
    device = resolve_device(config.device)
    if config.run_dir is not None and policy_store is None:
        raise ConfigError("policy_store: needed to save policies; give one, or leave trainer.run_dir out")
    if config.evaluate_interval and suite is None:
        raise ConfigError("suite: needed to evaluate; give one, or set trainer.evaluate_interval=0")
    policy.to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=config.adam_eps, fused=True)
    evaluator = None
    if config.evaluate_interval and suite is not None:
        evaluator = PolicyEvaluator(suite, policy_store, device, episodes=config.evaluate_episodes, seed=config.seed)
    checkpointer = None
    if config.run_dir is not None and policy_store is not None:
        checkpointer = TrainingCheckpointer(Path(config.run_dir) / "checkpoints", policy_store, wandb_run)
    return {
        "collector": RolloutCollector(vecenv, policy, experience, device, seed=config.seed),
        "ppo": PPOOptimizer(policy, optimizer, device, ppo_config, max_loss=config.max_loss, seed=config.seed),
        "optimizer": optimizer,
        "stats_logger": StatsLogger(
            config.run_dir,
            wandb_run,
            total_steps=config.total_timesteps,
            action_repeat=vecenv.spec.action_repeat,
            tensorboard=config.tensorboard,
            progress=config.progress,
        ),
        "checkpointer": checkpointer,
        "evaluator": evaluator,
    }


def default_training_step(
    state: TrainingState,
    components: Components,
    config: TrainerConfig,
    experience: Experience,
    custom_losses: Sequence[CustomLoss] | None = None,
) -> dict[str, float]:
    """Collect a rollout, train on it, and count the epoch.

    Returns:
        The update's metrics, and ``episode_return`` and ``episode_length``, means over the episodes that ended, where any did.

    Raises:
        LossError: a loss is not finite or too large; its update was not applied.
        EnvError: an environment failed.
    """
    collector, ppo = components["collector"], components["ppo"]
    stats, steps = collector.collect()
    schedule = OptimConfig(lr=config.learning_rate, schedule=config.schedule, final_lr_scale=config.final_lr_scale)
    for group in components["optimizer"].param_groups:
        group["lr"] = config.learning_rate * learning_rate_scale(schedule, state.agent_steps, config.total_timesteps)
    progress = min(state.agent_steps / config.total_timesteps, 1.0)
    losses = ppo.update(experience, custom_loss_fns=custom_losses, progress=progress)
    state.agent_steps += steps
    state.epoch += 1
    state.updates = ppo.updates
    components["stats_logger"].add_stats(stats)
    return losses | {name: sum(values) / len(values) for name, values in stats.items() if values}


def functional_training_loop(
    config: TrainerConfig,
    ppo_config: PPOConfig,
    policy: nn.Module | None,
    curriculum: TaskSource,
    policy_store: PolicyStore | None = None,
    step_fn: StepFunction | None = None,
    custom_losses: Sequence[CustomLoss] | None = None,
    wandb_run: Any = None,
    *,
    suite: Suite | None = None,
    resume: bool = False,
    on_epoch: Callable[[TrainingState, Components], None] | None = None,
) -> TrainingState:
    """Train until ``config.total_timesteps`` or until ``state.should_stop``.

    Every epoch the curriculum chooses a task; each task has environments of its own, whose episodes go on when it is chosen again.

    Args:
        config: of the loop.
        ppo_config: of the update.
        policy: learns; None: one that ``policy_store`` makes.
        curriculum: chooses tasks, and is told the mean return of the episodes that ended, where it has ``report(name, score)``.
        policy_store: where policies are saved, and come from; anything with its ``create``, ``save`` and ``policy`` will do.
        step_fn: takes the place of :func:`default_training_step`.
        custom_losses: added to the loss, see :data:`worldmpc.on_policy.CustomLoss`.
        wandb_run: gets all records as well.
        suite: what is evaluated on; None: the curriculum's tasks, where it says them.
        resume: go on, bit for bit, where the last checkpoint in ``config.run_dir`` was written; if there is none, begin.
        on_epoch: called after every epoch; may set ``state.should_stop``.

    Returns:
        The last state. It has been saved where there is a ``run_dir``.

    Raises:
        ConfigError: something is missing, tasks whose dimensions or discounts differ, a step that does not count its decisions, or a
            ``run_dir`` that holds an earlier training which is not resumed.
        LossError: a loss is not finite or too large; its update was not applied.
        EnvError: an environment failed.
    """
    step, state = step_fn or default_training_step, TrainingState()
    if suite is None and isinstance(curriculum, Curriculum):
        suite = {"tasks": curriculum.tasks}
    if not resume:
        session.require_fresh(config)
    saved = session.load(config, policy_store) if resume else None
    if saved is not None:
        session.call(curriculum, "load_state_dict", saved["curriculum"])
    with contextlib.ExitStack() as stack:
        seats = Seats(config, stack, None if saved is None else saved["collectors"])
        task = curriculum.get_task()
        envs, discount = seats.envs(task), task.env_cfg().discount
        policy = session.initial_policy(policy, policy_store, envs.spec, saved)
        ppo_config = ppo_config if discount is None else dataclasses.replace(ppo_config, gamma=discount)
        experience = make_experience(ppo_config, envs, resolve_device(config.device))
        components = create_training_components(config, ppo_config, policy, envs, experience, policy_store, wandb_run, suite=suite)
        stack.callback(components["stats_logger"].close)
        if saved is not None:
            session.restore(saved, state, components, experience)
        elif resume:
            components["stats_logger"].resume(0)  # of a training that ended before its first checkpoint
        while state.agent_steps < config.total_timesteps and not state.should_stop:
            components["collector"] = seats.collector(task, policy, experience)
            _run_epoch(step, state, components, config, experience, custom_losses, task, curriculum)
            if on_epoch is not None:
                on_epoch(state, components)
            if state.epoch % config.checkpoint_interval == 0 or state.should_stop or state.agent_steps >= config.total_timesteps:
                session.save(state, components, experience, curriculum, seats)
            task = curriculum.get_task()
    return state


def run_training(
    config: TrainingConfig, *, custom_losses: Sequence[CustomLoss] | None = None, step_fn: StepFunction | None = None, resume: bool = False
) -> tuple[TrainingState, nn.Module]:
    """Train as a configuration says, and return the last state and the policy.

    Raises:
        ConfigError: a task that is not there or does not fit; see :func:`functional_training_loop` for the rest.
    """
    trainer, curriculum = config.trainer, config.make_curriculum()
    folder = "." if trainer.run_dir is None else Path(trainer.run_dir) / "policies"  # without a run_dir nothing is ever saved there
    store = PolicyStore(folder, config.agent, resolve_device(trainer.device), seed=trainer.seed)
    with curriculum.tasks[0].make_envs(trainer.seed, num_envs=1) as envs:
        policy = store.create(envs).policy
    run = start_wandb(config.wandb, config.experiment_name, config.to_dict())
    try:
        state = functional_training_loop(trainer, config.ppo, policy, curriculum, store, step_fn, custom_losses, run, resume=resume)
    finally:
        if run is not None:
            run.finish()
    return state, policy


def _run_epoch(
    step: StepFunction,
    state: TrainingState,
    components: Components,
    config: TrainerConfig,
    experience: Experience,
    custom_losses: Sequence[CustomLoss] | None,
    task: CurriculumTask,
    curriculum: TaskSource,
) -> None:
    """Do one epoch, tell the curriculum, evaluate where that is due, and log."""
    steps, epoch = state.agent_steps, state.epoch
    state.metrics = step(state, components, config, experience, custom_losses)
    state.epoch = epoch + 1
    if state.agent_steps <= steps and not state.should_stop:
        raise ConfigError("step_fn: state.agent_steps did not grow; add the decisions that it collected, or set state.should_stop")
    if "episode_return" in state.metrics:
        session.call(curriculum, "report", task.name, state.metrics["episode_return"])
    evals = None
    if components["evaluator"] is not None and state.epoch % config.evaluate_interval == 0:
        policy = components["ppo"].policy
        evals = state.evals = components["evaluator"].evaluate(policy, index=state.epoch)
    losses = {name: value for name, value in state.metrics.items() if not name.startswith("episode_")}
    components["stats_logger"].process_and_log(state.agent_steps, state.epoch, losses, updates=state.updates, evals=evals)
