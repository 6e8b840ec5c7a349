"""SAC (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications"); Discrete actions after Christodoulou 2019."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc import off_policy
from worldmpc.agents.common import Streams, discount_of, transition_source, vector_dim
from worldmpc.config import RunConfig
from worldmpc.data.source import ReplaySource
from worldmpc.learners.descent import Descent
from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.value_based import GaussianActor, StackedMLP, Temperature, initialise, mlp, polyak, target_of
from worldmpc.noise import NoiseSpec, gumbel
from worldmpc.types import ActOutput, EnvSpec, Metrics, Mode, Noise, TransitionBatch


class SAC:
    """Learns twin critics and a stochastic policy whose entropy has a price, from replayed transitions.

    Box actions come from a squashed Gaussian; of Discrete ones the critics give all values at once and expectations are exact.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to act and learn.
        total_updates: length of the learning-rate schedule.

    Raises:
        ConfigError: observations that are no vectors.
    """

    modes: tuple[Mode, ...] = ("explore", "eval")

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        obs_dim, dim, sac = vector_dim(spec), spec.action_dim, config.sac
        self.critic = StackedMLP(2, obs_dim, sac.hidden, dim) if spec.discrete else StackedMLP(2, obs_dim + dim, sac.hidden, 1)
        self.actor = mlp(obs_dim, sac.hidden, dim) if spec.discrete else GaussianActor(obs_dim, dim, sac.hidden)
        initialise([self.critic, self.actor], config.seed)
        self.target_critic = target_of(self.critic)
        self.temperature = Temperature(sac.alpha_init if sac.alpha is None else sac.alpha, learned=sac.alpha is None)
        networks = {"critic": self.critic, "target_critic": self.target_critic, "actor": self.actor, "temperature": self.temperature}
        self.model = nn.ModuleDict(networks).to(self.device)
        default = off_policy.default_target_entropy(dim, spec.discrete)
        self.target_entropy = default if sac.target_entropy is None else sac.target_entropy
        parts = ("critic", "actor", "temperature") if self.temperature.learned else ("critic", "actor")
        self.descent = Descent(self.model, parts, config, total_updates)
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
        """Choose actions: [E, O] -> [E, A] in [-1, 1] or one-hot; ``mode`` is explore (sampled) or eval (mean, or most probable)."""
        obs, shape = obs.to(self.device), (len(obs), self.spec.action_dim)
        eps = self.streams["explore"].draw({"eps": NoiseSpec("normal", shape)})["eps"] if mode == "explore" else obs.new_zeros(shape)
        action = one_hot_argmax(self.actor(obs) + gumbel(eps)) if self.spec.discrete else self.actor(obs, eps).action
        return ActOutput(action, carry, {}, {})

    def update(self, batch: TransitionBatch) -> Metrics:
        """Do one update: critics, policy, temperature, target critics."""
        return self.update_with_noise(batch, self.streams["update"].draw(self.noise_specs(len(batch.reward))))

    def noise_specs(self, batch_size: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one update; expectations over Discrete actions need none."""
        shape = (batch_size, self.spec.action_dim)
        return {} if self.spec.discrete else {"next": NoiseSpec("normal", shape), "now": NoiseSpec("normal", shape)}

    def update_with_noise(self, batch: TransitionBatch, noise: Noise) -> Metrics:
        """Do one update with given noise; a loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied."""
        skip, alpha = self.descent.begin(), self.temperature().detach()
        q = self.critic(batch.obs) if self.spec.discrete else self.critic(batch.obs, batch.action)[..., 0]
        q = off_policy.chosen(q, batch.action) if self.spec.discrete else q
        q_loss = off_policy.critic_loss(q, self.target(batch, alpha, noise))
        grad_norm, skip = self.descent.step("critic", q_loss, skip)

        value, entropy = self.evaluate(self.critic, batch.obs, noise.get("now"))
        pi_loss = -off_policy.soft_value(value, entropy, alpha).mean()
        pi_grad_norm, skip = self.descent.step("actor", pi_loss, skip)
        metrics = {"total_loss": q_loss, "q_loss": q_loss, "pi_loss": pi_loss, "q_mean": q.detach().mean(), "pi_entropy": entropy.mean()}
        if self.temperature.learned:
            metrics["alpha_loss"] = off_policy.temperature_loss(self.temperature(), entropy, self.target_entropy)
            _, skip = self.descent.step("temperature", metrics["alpha_loss"], skip)
        polyak(self.target_critic, self.critic, self.config.sac.tau * (1 - skip))
        metrics = {name: value.detach() for name, value in metrics.items()}
        metrics |= {"alpha": alpha, "grad_norm": grad_norm, "pi_grad_norm": pi_grad_norm}
        return metrics | {"skipped_updates": self.descent.end(skip)}

    @torch.no_grad()
    def target(self, batch: TransitionBatch, alpha: Tensor, noise: Noise) -> Tensor:
        """Return what the values of a batch's actions should be, [B]."""
        value, entropy = self.evaluate(self.target_critic, batch.next_obs, noise.get("next"))
        return off_policy.td_target(batch, off_policy.soft_value(value, entropy, alpha))

    def evaluate(self, critic: StackedMLP, obs: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the value of the policy [B], the smaller of the critics', and its entropy [B]: exact, or estimated from one sample."""
        if self.spec.discrete:
            logits = self.actor(obs)
            with torch.no_grad():
                q = critic(obs)
            return off_policy.expected_value(q, logits), off_policy.categorical_entropy(logits)
        sample = self.actor(obs, eps)
        return critic(obs, sample.action)[..., 0].amin(0), sample.entropy

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
