"""DQN (Mnih et al. 2015, "Human-level control through deep reinforcement learning") with double, dueling and n-step variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc import off_policy
from worldmpc.agents.common import Streams, discount_of, require_actions, transition_source, vector_dim
from worldmpc.config import RunConfig
from worldmpc.data.source import ReplaySource
from worldmpc.learners.descent import Descent
from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.value_based import QNetwork, initialise, polyak, target_of
from worldmpc.noise import NoiseSpec
from worldmpc.types import ActOutput, EnvSpec, Metrics, Mode, TransitionBatch


class DQN:
    """Learns the values of all actions from replayed transitions and takes the best one, or now and then a random one.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to act and learn.
        total_updates: length of the learning-rate schedule.

    Raises:
        ConfigError: Box actions, or observations that are no vectors.
    """

    modes: tuple[Mode, ...] = ("explore", "eval")

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        require_actions(spec, "dqn", discrete=True)
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        self.q = QNetwork(vector_dim(spec), spec.action_dim, config.dqn.hidden, config.dqn.dueling)
        initialise([self.q], config.seed)
        self.target_q = target_of(self.q)
        self.model = nn.ModuleDict({"q": self.q, "target_q": self.target_q}).to(self.device)
        self.descent = Descent(self.model, ("q",), config, total_updates)
        self.streams = Streams(config.seed, self.device)
        self.explored = 0
        self._one = torch.ones((), device=self.device)

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.descent.updates

    @property
    def epsilon(self) -> float:
        """Probability of a random action, after the decisions that it has explored with so far."""
        dqn, total = self.config.dqn, math.ceil(self.config.steps / self.spec.action_repeat)
        return off_policy.exploration_epsilon(self.explored, dqn.epsilon_fraction * total, dqn.epsilon_start, dqn.epsilon_end)

    def make_source(self, num_envs: int, generator: torch.Generator) -> ReplaySource:
        """Return a replay of transitions of ``dqn.n_step`` steps."""
        n_step = self.config.dqn.n_step
        return transition_source(self.config, self.spec, self.device, num_envs, generator, n_step, self.discount)

    def init_carry(self, num_envs: int) -> tuple[()]:
        """Return nothing, as it remembers nothing."""
        return ()

    @torch.no_grad()
    def act(self, carry: tuple[()], obs: Tensor, mode: Mode) -> ActOutput:
        """Choose actions: [E, O] -> one-hot [E, A]; ``mode`` is explore (epsilon-greedy) or eval (greedy)."""
        values = self.q(obs.to(self.device))
        if mode != "explore":
            return ActOutput(one_hot_argmax(values), carry, {}, {})
        epsilon, num_envs = self.epsilon, len(values)
        noise = self.streams["explore"].draw(
            {"coin": NoiseSpec("uniform", (num_envs, 1)), "choice": NoiseSpec("uniform", (num_envs, self.spec.action_dim))}
        )
        self.explored += num_envs
        choice = torch.where(noise["coin"] < epsilon, noise["choice"], values)
        return ActOutput(one_hot_argmax(choice), carry, {}, {"epsilon": torch.tensor(epsilon)})

    def update(self, batch: TransitionBatch) -> Metrics:
        """Do one update on a batch; every ``dqn.target_every`` of them the target network becomes the online one.

        A loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied.
        """
        skip = self.descent.begin()
        target = self.target(batch)
        q = off_policy.chosen(self.q(batch.obs), batch.action)
        loss = off_policy.huber_loss(q, target)
        grad_norm, skip = self.descent.step("q", loss, skip)
        metrics = {"total_loss": loss.detach(), "q_loss": loss.detach(), "q_mean": q.detach().mean(), "grad_norm": grad_norm}
        metrics["skipped_updates"] = self.descent.end(skip)
        if self.updates % self.config.dqn.target_every == 0:
            polyak(self.target_q, self.q, self._one)
        return metrics

    @torch.no_grad()
    def target(self, batch: TransitionBatch) -> Tensor:
        """Return what the values of a batch's actions should be, [B]."""
        q = self.target_q(batch.next_obs)
        return off_policy.td_target(batch, off_policy.greedy_value(q, self.q(batch.next_obs) if self.config.dqn.double else q))

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew, so that evaluations neither depend on nor disturb anything else."""
        self.streams.restart_eval(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimiser, counters and random streams."""
        return {
            "model": dict(self.model.state_dict()),
            **self.descent.state_dict(),
            "streams": self.streams.state_dict(),
            "explored": self.explored,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.descent.load_state_dict(state)
        self.streams.load_state_dict(state["streams"])
        self.explored = int(state["explored"])
