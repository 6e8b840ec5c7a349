"""A world model together with a goal, for planners: latent and goal beside each other are the state, and the goal stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from worldmpc.config import WorkerConfig, goal_weight
from worldmpc.models.hierarchy import Worker
from worldmpc.models.similarity import Similarity
from worldmpc.models.world_model import WorldModel
from worldmpc.types import ModelStep


class Weights(NamedTuple):
    """What goal and task count in plans, and in what stands for them."""

    goal: Tensor | float
    """Of the goal reward, []."""
    task: float


GOAL_ALONE = Weights(1.0, 0.0)
"""Of plans that forget the task."""


def plan_weights(config: WorkerConfig, worker: Worker | None) -> Weights:
    """Return the weights of goal and task; a worker's goals count less the more the running range of the task's values exceeds its least.

    So goals decide where the task has nothing to say, and less the more it has. A bonus, or goals alone, are weighted as they are.
    """
    weight = goal_weight(config)
    if worker is None or not config.task_weight:
        return Weights(weight, config.task_weight)
    return Weights(weight * config.task_range / worker.task_range, config.task_weight)


class GoalDirected:
    """Satisfies :class:`worldmpc.types.Model` for states [..., 2 Z]; its reward is that of the task and that of the goal, weighted.

    Args:
        model: the world model.
        worker: proposes actions and values goals; None: both are the world model's own, and the goal is a bonus to rewards alone.
        similarity: goal reward of the latent that a step leads to.
        weights: of goal and task, asked for in every plan.
    """

    def __init__(self, model: WorldModel, worker: Worker | None, similarity: Similarity, weights: Callable[[], Weights]) -> None:
        self.model, self.worker, self.similarity = model, worker, similarity
        self.weights = weights
        self.num_particles: int = getattr(model, "num_particles", 1)
        if model.discrete:
            self.action_probs = self._action_probs

    def encode(self, obs: Tensor) -> Tensor:
        """[..., O] -> [..., Z], without a goal: see :func:`with_goal`."""
        return self.model.encode(obs)

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 2 Z], [..., A] -> z [..., 2 Z], reward [...], cont [...]."""
        latent, goal = z.chunk(2, -1)
        step = self.model.step(latent, action)
        return ModelStep(with_goal(step.z, goal), self._reward(step.reward, step.z, goal), step.cont)

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        """[..., 2 Z], [..., A] -> [..., 2 Z]."""
        latent, goal = z.chunk(2, -1)
        return with_goal(self.model.next(latent, action), goal)

    def rollout(self, z: Tensor, actions: Tensor) -> ModelStep:
        """Imagine whole sequences: [..., 2 Z], [H, ..., A] -> z [H+1, ..., 2 Z], reward [H, ...], cont [H, ...]."""
        latent, goal = z.chunk(2, -1)
        steps = self.model.rollout(latent, actions)
        return ModelStep(with_goal(steps.z, goal), self._reward(steps.reward, steps.z[1:], goal), steps.cont)

    def follow(self, z: Tensor, eps: Tensor) -> Tensor:
        """Sample of the policy that follows goals, the task's where there is no worker: [..., 2 Z], [..., A] -> [..., A]."""
        return self.model.propose(z.chunk(2, -1)[0], eps) if self.worker is None else self.worker.propose(z, eps)

    def propose(self, z: Tensor, eps: Tensor) -> Tensor:
        """Candidates of the policy that follows goals; where the task counts half of them are its own: [..., P, 2 Z] -> [..., P, A]."""
        half = z.shape[-2] // 2 if self.weights().task and self.worker is not None else 0
        if not half:
            return self.follow(z, eps)
        states, noise = (part.split((half, z.shape[-2] - half), -2) for part in (z, eps))
        return torch.cat((self.model.propose(states[0].chunk(2, -1)[0], noise[0]), self.follow(states[1], noise[1])), -2)

    def terminal_value(self, z: Tensor, eps: Tensor, critics: Tensor) -> Tensor:
        """Values of task and goal, weighted as rewards are: [..., 2 Z], [..., A], [2] -> [...]."""
        latent = z.chunk(2, -1)[0]
        value, weights = latent.new_zeros(latent.shape[:-1]), self.weights()
        if weights.task:
            value = value + weights.task * self.model.terminal_value(latent, eps, critics)
        if self.worker is not None:
            value = value + weights.goal * self.worker.value(z, eps, self.model.two_hot)
        return value

    def _reward(self, task: Tensor, latent: Tensor, goal: Tensor) -> Tensor:
        weights = self.weights()
        return weights.task * task + weights.goal * self.similarity(latent, goal)

    def _action_probs(self, z: Tensor) -> Tensor:
        """Probabilities of one-hot actions, of worker and task in equal parts where the task counts: [..., 2 Z] -> [..., A]."""
        task = torch.softmax(self.model.pi(z.chunk(2, -1)[0]), -1)
        if self.worker is None:
            return task
        return (task + self.worker.probs(z)) / 2 if self.weights().task else self.worker.probs(z)


def with_goal(z: Tensor, goal: Tensor) -> Tensor:
    """Latent and goal beside each other: [..., Z], [..., Z] (or fewer leading dimensions) -> [..., 2 Z]."""
    return torch.cat((z, goal.expand(z.shape)), -1)
