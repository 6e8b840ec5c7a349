"""TD3 (Fujimoto et al. 2018, "Addressing Function Approximation Error in Actor-Critic Methods")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc import off_policy
from worldmpc.agents.common import Streams, discount_of, require_actions, transition_source, vector_dim
from worldmpc.config import RunConfig
from worldmpc.data.source import ReplaySource
from worldmpc.learners.descent import Descent
from worldmpc.models.value_based import DeterministicActor, StackedMLP, initialise, polyak, target_of
from worldmpc.noise import NoiseSpec
from worldmpc.types import ActOutput, EnvSpec, Metrics, Mode, Noise, TransitionBatch


class TD3:
    """Learns twin critics and a deterministic policy, the latter less often, from replayed transitions.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to act and learn.
        total_updates: length of the learning-rate schedule.

    Raises:
        ConfigError: Discrete actions, or observations that are no vectors.
    """

    modes: tuple[Mode, ...] = ("explore", "eval")

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        require_actions(spec, "td3", discrete=False)
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        obs_dim, dim, td3 = vector_dim(spec), spec.action_dim, config.td3
        self.critic, self.actor = StackedMLP(2, obs_dim + dim, td3.hidden, 1), DeterministicActor(obs_dim, dim, td3.hidden)
        initialise([self.critic, self.actor], config.seed)
        self.target_critic, self.target_actor = target_of(self.critic), target_of(self.actor)
        networks = {"critic": self.critic, "target_critic": self.target_critic, "actor": self.actor, "target_actor": self.target_actor}
        self.model = nn.ModuleDict(networks).to(self.device)
        self.descent = Descent(self.model, ("critic", "actor"), config, total_updates)
        self.streams = Streams(config.seed, self.device)

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.descent.updates

    def make_source(self, num_envs: int, generator: torch.Generator) -> ReplaySource:
        """Return a replay of transitions."""
        return transition_source(self.config, self.spec, self.device, num_envs, generator, 1, self.discount)

    def init_carry(self, num_envs: int) -> tuple[()]:
        """Return nothing, as it remembers nothing."""
        return ()

    @torch.no_grad()
    def act(self, carry: tuple[()], obs: Tensor, mode: Mode) -> ActOutput:
        """Choose actions: [E, O] -> [E, A] in [-1, 1]; ``mode`` is explore (with noise) or eval."""
        action = self.actor(obs.to(self.device))
        if mode == "explore":
            eps = self.streams["explore"].draw({"eps": NoiseSpec("normal", (len(obs), self.spec.action_dim))})["eps"]
            action = (action + self.config.td3.exploration_noise * eps).clamp(-1.0, 1.0)
        return ActOutput(action, carry, {}, {})

    def update(self, batch: TransitionBatch) -> Metrics:
        """Do one update: critics, and every ``td3.policy_delay`` updates policy and target networks."""
        return self.update_with_noise(batch, self.streams["update"].draw(self.noise_specs(len(batch.reward))))

    def noise_specs(self, batch_size: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one update."""
        return {"next": NoiseSpec("normal", (batch_size, self.spec.action_dim))}

    def update_with_noise(self, batch: TransitionBatch, noise: Noise) -> Metrics:
        """Do one update with given noise; a loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied."""
        skip = self.descent.begin()
        q = self.critic(batch.obs, batch.action)[..., 0]
        q_loss = off_policy.critic_loss(q, self.target(batch, noise))
        grad_norm, skip = self.descent.step("critic", q_loss, skip)
        metrics = {"total_loss": q_loss.detach(), "q_loss": q_loss.detach(), "q_mean": q.detach().mean(), "grad_norm": grad_norm}
        if (self.updates + 1) % self.config.td3.policy_delay == 0:
            pi_loss = -self.critic(batch.obs, self.actor(batch.obs), members=1).mean()
            metrics["pi_loss"] = pi_loss.detach()
            metrics["pi_grad_norm"], skip = self.descent.step("actor", pi_loss, skip)
            tau = self.config.td3.tau * (1 - skip)
            polyak(self.target_critic, self.critic, tau)
            polyak(self.target_actor, self.actor, tau)
        return metrics | {"skipped_updates": self.descent.end(skip)}

    @torch.no_grad()
    def target(self, batch: TransitionBatch, noise: Noise) -> Tensor:
        """Return what the values of a batch's actions should be, [B]."""
        td3 = self.config.td3
        action = off_policy.smoothed_action(self.target_actor(batch.next_obs), noise["next"], td3.target_noise, td3.noise_clip)
        return off_policy.td_target(batch, self.target_critic(batch.next_obs, action)[..., 0].amin(0))

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew, so that evaluations neither depend on nor disturb anything else."""
        self.streams.restart_eval(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimisers, counter and random streams."""
        return {"model": dict(self.model.state_dict()), **self.descent.state_dict(), "streams": self.streams.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.descent.load_state_dict(state)
        self.streams.load_state_dict(state["streams"])
