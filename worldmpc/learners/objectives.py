"""What TD-MPC2 and its relatives minimise: terms of the world model, and the objective of the policy prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from worldmpc import losses
from worldmpc.config import RunConfig
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec
from worldmpc.types import LossTerm, Metrics, Noise, SequenceBatch

STANDARD_EXAMPLES = 4
"""Most examples of a snapshot without ``multi_gamma.debug_logging``."""


class Objectives:
    """The losses of a world model and its policy prior, as a configuration chooses them.

    Every update reads them here, so that whoever puts another term, weight or objective in its place changes what is learned.

    Args:
        config: the run's configuration.
        model: the world model; its auxiliary values, if any, are learned as well.
        discount: per decision.

    Raises:
        ConfigError: an objective that the kind of actions does not have.
    """

    def __init__(self, config: RunConfig, model: WorldModel, discount: float) -> None:
        self.config, self.model, self.discount = config, model, discount
        loss = config.loss
        self.terms: dict[str, LossTerm] = {"consistency": losses.consistency, "reward": losses.reward, "value": losses.value}
        """Terms of the world model's loss by name; each needs a weight."""
        self.weights = {"consistency": loss.consistency_coef, "reward": loss.reward_coef, "value": loss.value_coef}
        self.groups = {"encoder.": config.optim.enc_lr_scale, "dynamics.": 1.0, "reward.": 1.0, "v." if model.state_values else "q.": 1.0}
        """Prefixes of the parameters that the terms train -> their learning rates relative to ``optim.lr``; the learner reads them when it
        is made."""
        if model.termination is not None:
            self.terms["termination"], self.weights["termination"] = losses.termination, loss.termination_coef
            self.groups["termination."] = 1.0
        if model.auxiliary is not None:
            self.terms["aux_value"], self.weights["aux_value"] = losses.auxiliary_value, config.multi_gamma.loss_weight
            self.groups["auxiliary.heads."] = 1.0
        self.policy: losses.PolicyObjective = losses.make_objective(config.policy, model.discrete, model.config.policy == "clipped")
        """Objective of the policy prior."""
        self.more_noise: Callable[[int, int], Mapping[str, NoiseSpec]] = lambda length, batch_size: {}
        """What terms of one's own declare: steps and windows of a batch -> name -> random tensor."""
        self._coefficients = losses.coefficients(config.policy, loss, config.planner, model.action_dim)

    def noise_specs(self, length: int, batch_size: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one update on a batch of ``length`` steps: random numbers, then dropout factors, then what was added."""
        model, dropout, rows = self.model, self.config.model.dropout, batch_size * self.config.model.num_dynamics
        specs = losses.target_noise(self.config.value, model, length, rows)
        if dropout:
            specs["q_keep"] = NoiseSpec("keep", (model.num_q, length, rows, model.hidden_dim), dropout)
        specs |= losses.policy_noise(self.config.policy, model, length, rows, dropout)
        return dict(sorted(specs.items(), key=lambda spec: spec[1].kind == "keep")) | dict(self.more_noise(length, batch_size))

    def roll(self, batch: SequenceBatch, noise: Noise) -> tuple[losses.Rollout, SequenceBatch]:
        """Return what the terms share, and the batch as they see it: once for each dynamics network."""
        batch = losses.for_each_dynamics(batch, self.config.model.num_dynamics)
        return losses.roll(self.model, batch, self.discount, self.config.loss.rho, noise, self.config.value), batch

    def snapshot(self, batch: SequenceBatch, noise: Noise) -> dict[str, Tensor]:
        """Return what the auxiliary values say about a few windows, see :func:`worldmpc.losses.auxiliary_snapshot`."""
        config = self.config.multi_gamma
        rollout, batch = self.roll(batch, noise)
        examples = config.log_num_examples if config.debug_logging else min(config.log_num_examples, STANDARD_EXAMPLES)
        return losses.auxiliary_snapshot(self.model, rollout, batch, examples, config.debug_logging)

    def model_loss(self, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Tensor, Metrics]:
        """Return the world model's loss [], the imagined latents [T+1, B, Z] without gradient, and metrics."""
        rollout, batch = self.roll(batch, noise)
        loss, metrics = losses.weighted_sum(self.terms, self.weights, self.model, rollout, batch, noise)
        return loss, rollout.zs.detach(), metrics

    def policy_loss(self, zs: Tensor, batch: SequenceBatch, scale: Tensor, noise: Noise) -> tuple[Tensor, Metrics]:
        """Return the policy's loss [] and metrics, for latents [T+1, B, Z], their batch and the running scale []."""
        batch = losses.for_each_dynamics(batch, self.config.model.num_dynamics)
        return self.policy(self.model, zs, batch, scale, self._coefficients, noise)
