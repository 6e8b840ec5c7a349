"""One update of Director's own networks: goal autoencoder, worker, manager. The world model is read and stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc import losses
from worldmpc.config import RunConfig
from worldmpc.data.transitions import first_windows
from worldmpc.functional import Captured, maybe_compile, seconds_compiling
from worldmpc.learners.descent import Descent
from worldmpc.models.goal_directed import GoalDirected, with_goal
from worldmpc.models.hierarchy import Hierarchy
from worldmpc.models.value_based import polyak
from worldmpc.noise import NoiseSpec, NoiseStream
from worldmpc.types import Metrics, Noise, SequenceBatch


class HierarchyLearner:
    """Learns goals and worker in every update, the manager in every ``manager.update_every``-th one.

    All state is changed in place, so that an update can be captured as a graph.

    Args:
        config: the run's configuration.
        hierarchy: the networks.
        planning: what plans see: the world model, which is read alone, and what goal and task count.
        stream: random numbers of the updates.
        total_updates: length of the learning-rate schedule.
    """

    def __init__(self, config: RunConfig, hierarchy: Hierarchy, planning: GoalDirected, stream: NoiseStream, total_updates: int) -> None:
        self.config, self.hierarchy, self.planning, self.model, self.stream = config, hierarchy, planning, planning.model, stream
        rates = {"goals": config.goal_vae.lr / config.optim.lr}
        rates |= dict.fromkeys(("manager.actor", "manager.critics"), config.manager.lr / config.optim.lr)
        rates |= {} if hierarchy.worker is None else {"worker.q": 1.0, "worker.pi": 1.0}
        self.descent = Descent(hierarchy, rates, config, total_updates)
        device = self.descent.skipped.device
        self.worker_scale, self.manager_scales = torch.ones((), device=device), torch.ones(2, device=device)
        self.temperature = torch.ones((), device=device)
        self._coefs = losses.coefficients(config.policy, config.loss, config.planner, self.model.action_dim)
        self.managed: Metrics = {}
        """Metrics of the manager's last update."""
        self._losses = {name: maybe_compile(loss, config.compile) for name, loss in _LOSSES.items()}
        self._steps: dict[str, Callable[..., Metrics]] = {"follow": self.follow, "manage": self.manage}
        if config.cuda_graph:
            self._steps = {name: Captured(step) for name, step in self._steps.items()}

    @property
    def skipped(self) -> Tensor:
        """How many updates were not applied, in full or in part, []."""
        return self.descent.skipped.clone()

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.descent.updates

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling the losses took."""
        return seconds_compiling(*self._losses.values())

    def update(self, batch: SequenceBatch) -> Metrics:
        """Do one update on windows of ``T`` steps, of which the first ``config.window`` teach the worker."""
        self.descent.begin()
        self.temperature.fill_(self.hierarchy.goals.temperature(self.updates))
        manages = self.updates % self.config.manager.update_every == 0
        size = batch.reward.shape[1]
        few = min(self.config.worker.batch_size or size, size)
        metrics = self._steps["follow"](first_windows(batch, few), self.stream.draw(self.noise_specs(few)))
        if manages:
            rows = min(self.config.manager.batch_size, size)
            specs = losses.imagination_noise(self.config.manager, self.hierarchy, self.model.action_dim, rows)
            self.managed = self._steps["manage"](batch.obs[0, :rows], self.stream.draw(specs))
        self.descent.updates += 1
        return metrics | self.managed

    def noise_specs(self, batch_size: int) -> dict[str, NoiseSpec]:
        """Declare the noise that goals and worker learn with, from ``batch_size`` windows."""
        hierarchy, steps = self.hierarchy, self.config.window
        specs = losses.autoencoder_noise(hierarchy.goals, (steps + 1) * batch_size)
        specs |= losses.goal_noise(hierarchy.goals, steps, batch_size)
        if hierarchy.worker is not None:
            specs |= losses.worker_noise(hierarchy.worker, self.model, steps, batch_size)
        return specs

    def follow(self, batch: SequenceBatch, noise: Noise) -> Metrics:
        """Learn goals and worker from the first steps of windows, for goals that may lie behind them."""
        steps = self.config.window
        with torch.no_grad():
            z = self.model.encode(batch.obs[: steps + 1])
        real = torch.cat((torch.ones_like(batch.mask[:1]), batch.mask[:steps]))
        loss, metrics = self._losses["goals"](self.hierarchy.goals, z.flatten(0, 1), real.flatten(), self.temperature, noise)
        _, skip = self.descent.step("goals", loss, torch.zeros_like(self.descent.skipped))
        lost = metrics["goal_vae/recon_loss"] - metrics["goal_vae/latent_entropy"]
        self.hierarchy.goals.adapt(metrics["goal_vae/kl"], lost, skip)
        goal = losses.choose_goals(self.config.worker, self.hierarchy.goals, self.model, batch, steps, noise)
        if self.hierarchy.worker is not None:
            found, skip = self._work(batch, z, goal, noise, skip)
            metrics |= found
        else:
            share = batch.mask[:steps] / batch.mask[:steps].sum().clamp(min=1)
            metrics["worker/goal_reward"] = (self.hierarchy.similarity(z[1:], goal) * share).sum()
        self.descent.skipped += skip
        return metrics

    def _work(self, batch: SequenceBatch, z: Tensor, goal: Tensor, noise: Noise, skip: Tensor) -> tuple[Metrics, Tensor]:
        worker, steps, tau = self.hierarchy.worker, self.config.window, self.config.loss.tau
        assert worker is not None
        own = losses.WorkerBatch(
            with_goal(z[:-1], goal), batch.action[:steps], with_goal(z[1:], goal), batch.terminated[:steps], batch.mask[:steps]
        )
        value_loss, metrics = self._losses["value"](self.hierarchy, self.model, own, self.config.worker.gamma, noise)
        _, skip = self.descent.step("worker.q", value_loss, skip)
        scale = self.worker_scale
        policy_loss, found = self._losses["policy"](self.planning.weights(), worker, self.model, own, self._coefs, scale, noise)
        _, skip = self.descent.step("worker.pi", policy_loss, skip)
        for running, name in ((scale, "worker/pi_scale"), (worker.task_range, "worker/task_range")):
            running.copy_(torch.where(skip > 0, running, found[name]))
        polyak(worker.slow_q, worker.q, tau * (1 - skip))
        return metrics | found, skip

    def manage(self, obs: Tensor, noise: Noise) -> Metrics:
        """Learn the manager from trajectories imagined from observations [N, O]."""
        own, manager = self.config.manager, self.hierarchy.manager
        with torch.no_grad():
            z = self.model.encode(obs)
        imagined = self._losses["imagine"](self.planning.weights(), self.hierarchy, self.model, z, noise)
        critic_loss, returns, metrics = self._losses["critics"](own, self.hierarchy, self.model, imagined)
        scales, tau = self.manager_scales, self.config.loss.tau
        actor_loss, new, found = self._losses["actor"](own, self.hierarchy, self.model, imagined, returns, scales, tau)
        _, skip = self.descent.step("manager.critics", critic_loss, torch.zeros_like(self.descent.skipped))
        _, skip = self.descent.step("manager.actor", actor_loss, skip)
        scales.copy_(torch.where(skip > 0, scales, new))
        manager.adapt(found["manager/entropy"], skip)
        polyak(manager.slow_critics, manager.critics, own.tau * (1 - skip))
        self.descent.skipped += skip
        return metrics | found

    def state_dict(self) -> dict[str, Any]:
        """Return optimisers, running scales and counter; the parameters belong to the agent's model."""
        scales = {"worker_scale": self.worker_scale, "manager_scales": self.manager_scales}
        return {**self.descent.state_dict(), **scales, "managed": dict(self.managed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; weights that the configuration fixes are its own."""
        self.descent.load_state_dict(state)
        self.worker_scale.copy_(state["worker_scale"])
        self.manager_scales.copy_(state["manager_scales"])
        self.managed = dict(state["managed"])
        self.hierarchy.goals.fix_weight()
        self.hierarchy.manager.fix_weight()
        if self.hierarchy.worker is not None:
            self.hierarchy.worker.task_range.clamp_(min=self.config.worker.task_range)


_LOSSES: dict[str, Callable[..., Any]] = {
    "goals": losses.autoencoder_loss,
    "value": losses.worker_value_loss,
    "policy": losses.worker_policy_loss,
    "imagine": losses.imagine,
    "critics": losses.manager_critic_loss,
    "actor": losses.manager_actor_loss,
}
