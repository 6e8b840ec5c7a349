"""PPO (Schulman et al. 2017, "Proximal Policy Optimization Algorithms"), for Box and Discrete actions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.agents.common import Streams, vector_dim
from worldmpc.config import RunConfig
from worldmpc.data.rollout import Experience
from worldmpc.data.stream import StreamSource, minibatches
from worldmpc.learners.ppo import PPOOptimizer
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.noise import NoiseSpec
from worldmpc.on_policy import CustomLoss
from worldmpc.optim import learning_rate_scale
from worldmpc.types import ActOutput, EnvSpec, Metrics, Mode, RolloutBatch


class PPO:
    """Learns from rollouts of its own policy, which are used for a few passes and then forgotten.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to act and learn.
        total_updates: length of the learning-rate schedule and of ``ppo.anneal_clip``; see :meth:`count_updates`.

    Raises:
        ConfigError: observations that are no vectors.
    """

    modes: tuple[Mode, ...] = ("explore", "eval")

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        self.config, self.spec, self.device, self.total_updates = config, spec, torch.device(device), total_updates
        self.discount = config.ppo.gamma if config.env.discount is None else config.env.discount
        ppo = dataclasses.replace(config.ppo, gamma=self.discount)
        self.model = ActorCritic(vector_dim(spec), spec.action_dim, ppo.hidden, spec.discrete, ppo.log_std_init, config.seed)
        self.model.to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.optim.lr, eps=1e-5, fused=True)
        self.learner = PPOOptimizer(self.model, self.optimizer, self.device, ppo, max_loss=config.train.max_loss)
        self.custom_losses: list[CustomLoss] = []
        """Added to the objective; put functions in."""
        self.streams = Streams(config.seed, self.device)

    @staticmethod
    def count_updates(config: RunConfig, decisions: int) -> int:
        """Return how many updates a number of decisions is worth: whole rollouts, each with ``ppo.update_epochs`` passes."""
        rollout = config.ppo.rollout_steps * config.env.num_envs
        return decisions // rollout * config.ppo.update_epochs * minibatches(rollout, config.ppo.minibatch_size)

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.learner.updates

    def make_source(self, num_envs: int, generator: torch.Generator) -> StreamSource:
        """Return the rollouts that it learns from."""
        ppo = self.config.ppo
        shape, dtype = self.spec.obs_shape, self.spec.obs_dtype
        experience = Experience(ppo.rollout_steps, num_envs, shape, self.spec.action_dim, obs_dtype=dtype, device=self.device)
        return StreamSource(experience, self.learner.prepare, ppo.update_epochs, ppo.minibatch_size, generator)

    def init_carry(self, num_envs: int) -> tuple[()]:
        """Return nothing: it has no memory."""
        return ()

    @torch.no_grad()
    def act(self, carry: tuple[()], obs: Tensor, mode: Mode) -> ActOutput:
        """Sample actions to explore, take the most likely ones to evaluate: [E, O] -> [E, A]."""
        obs, eps = obs.to(self.device), None
        if mode == "explore":
            eps = self.streams["explore"].draw({"eps": NoiseSpec("normal", (len(obs), self.spec.action_dim))})["eps"]
        action, log_prob, _, value, _ = self.model(obs, eps=eps)
        return ActOutput(action, carry, {"log_prob": log_prob, "value": value}, {})

    def update(self, batch: RolloutBatch) -> Metrics:
        """Do one update on a minibatch; a loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied.

        Raises:
            LossError: a custom loss is no finite scalar; nothing was changed.
        """
        scale = learning_rate_scale(self.config.optim, self.updates, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * scale
        progress = min(self.updates / max(self.total_updates, 1), 1.0)
        return self.learner.step(batch, self.custom_losses, progress=progress)

    def reset_eval_noise(self, *index: int) -> None:
        """Do nothing: evaluation takes the most likely action and needs no noise."""

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimiser, early stop, counter and random streams."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict()["state"],
            "learner": self.learner.state_dict(),
            "updates": self.updates,
            "streams": self.streams.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        # A copy, as torch would share its memory; learning rate and the like come from the configuration, which may have changed.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": copy.deepcopy(state["optimizer"])})
        self.learner.load_state_dict(state["learner"])
        self.streams.load_state_dict(state["streams"])
