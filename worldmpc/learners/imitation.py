"""A policy that learns from what a planner did, and a value of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from worldmpc import off_policy
from worldmpc.config import RunConfig
from worldmpc.functional import tree_map
from worldmpc.learners.descent import Descent
from worldmpc.losses import behaviour_loss, behaviour_targets
from worldmpc.models.behaviour import BehaviourPolicy, BehaviourValue
from worldmpc.models.normalizer import Normalizer
from worldmpc.models.value_based import initialise, polyak, target_of
from worldmpc.noise import NoiseSpec, NoiseStream
from worldmpc.types import EnvSpec, Metrics, TransitionBatch


class Imitation:
    """Behavioural cloning of plans, or advantage-weighted regression, with a value learned by one-step TD.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        normalizer: of observations, whose owner fits it.
        discount: per decision.
        device: where to learn.
        total_updates: length of the learning-rate schedule.
    """

    def __init__(
        self, config: RunConfig, spec: EnvSpec, normalizer: Normalizer, discount: float, device: torch.device, total_updates: int
    ) -> None:
        hidden, obs_dim = config.mbmpc.hidden, spec.obs_shape[0]
        self.config = config
        self.policy = BehaviourPolicy(normalizer, obs_dim, spec.action_dim, hidden, spec.discrete)
        self.value = BehaviourValue(normalizer, obs_dim, hidden, discount)
        initialise([self.policy.net, self.value.net], config.seed)
        self.target_value = target_of(self.value)
        self.target_value.normalizer = normalizer
        self.model = nn.ModuleDict({"policy": self.policy, "value": self.value, "target_value": self.target_value}).to(device)
        self.descent = Descent(self.model, ("policy", "value"), config, total_updates)

    def update(self, batch: TransitionBatch, stream: NoiseStream) -> Metrics:
        """Descend both losses ``mbmpc.gradient_steps`` times on rows of transitions [B, ...]; the metrics are those of the last time."""
        for value in (self.value, self.target_value):
            value.bound(batch.reward)
        shape = (self.config.mbmpc.gradient_steps, min(self.config.loss.batch_size, len(batch.obs)))
        rows = (stream.draw({"rows": NoiseSpec("uniform", shape)})["rows"] * len(batch.obs)).long()
        metrics: Metrics = {}
        for index in rows:
            metrics = self.step(tree_map(lambda field, index=index: field[index], batch))
        return metrics

    def step(self, batch: TransitionBatch) -> Metrics:
        """Descend both losses once on transitions [B, ...]."""
        own, skip = self.config.mbmpc, self.descent.begin()
        with torch.no_grad():
            target = off_policy.td_target(batch, self.target_value(batch.next_obs))
        value = self.value.unbounded(batch.obs)
        value_loss = ((value - target) / self.value.scale).square().mean()
        _, skip = self.descent.step("value", value_loss, skip)
        action, weight = behaviour_targets(batch, target - value.detach(), own.policy_loss, own.awr_temperature)
        policy_loss = behaviour_loss(self.policy.distribution(batch.obs).log_prob(action), weight)
        _, skip = self.descent.step("policy", policy_loss, skip)
        polyak(self.target_value.net, self.value.net, own.tau * (1 - skip))
        return {
            "value_loss": value_loss.detach(),
            "policy_loss": policy_loss.detach(),
            "value_mean": value.detach().mean(),
            "skipped_updates": self.descent.end(skip),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return optimisers and counter; the parameters belong to the agent's model."""
        return self.descent.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.descent.load_state_dict(state)
