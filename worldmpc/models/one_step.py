"""Learned one-step dynamics in observation space: a single network, or a probabilistic ensemble (PETS, Chua et al. 2018)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmpc.config import ConfigError, DynamicsConfig
from worldmpc.models.normalizer import Normalizer
from worldmpc.noise import NoiseSpec, derive_seed
from worldmpc.types import ModelStep, Noise

MARGIN = 3.0
"""How far imagined states may leave the range of the data, in widths of that range, on each side."""
LOG_VAR_INIT = (-10.0, 0.5)
"""First bounds of the log-variance, in normalised units (PETS' published code)."""


class Prediction(NamedTuple):
    """What each member expects, in normalised units; targets are the change of the observation, then the reward."""

    mean: Tensor  # [M, ..., O+1]
    log_var: Tensor | None  # [M, ..., O+1]; None: deterministic
    logit: Tensor | None  # [M, ...] of termination; None: never terminates


class MemberMLP(nn.Module):
    """``M`` networks of equal shape, each on its own rows, Linear and SiLU (swish, as in PETS); one batched product per layer."""

    def __init__(self, members: int, dims: Sequence[int], generator: torch.Generator) -> None:
        """Initialise as PETS: weights from a normal of std 1 / (2 sqrt(inputs)), cut at two of them; biases 0."""
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in itertools.pairwise(dims):
            std, weight = 0.5 / math.sqrt(before), torch.empty(members, before, after)
            self.weights.append(nn.Parameter(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, after)))

    def forward(self, x: Tensor) -> Tensor:
        """[M, ..., in] -> [M, ..., out]."""
        lead = x.shape[1:-1]
        x = x.reshape(len(x), -1, x.shape[-1])
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = F.silu(x) if index < last else x
        return x.reshape(len(x), *lead, x.shape[-1])


class OneStepDynamics(nn.Module):
    """Predicts the change of the observation, the reward and termination from observation and action; fitted by :mod:`.fitting`.

    ``dynamics.name=mlp`` is one deterministic network. ``ensemble`` has ``members`` Gaussian ones with log-variances between learned
    bounds (PETS, appendix A.1). Observations, their changes and rewards are normalised by the data of the last fit. Termination has
    networks of its own: in shared ones the likelihood's gradients, which grow as variances fall, leave it half learned.

    There are two ways to imagine. :meth:`step`, :meth:`next` average the members' expectations. :meth:`rollout` is trajectory sampling
    TS-infinity (PETS, section 5): its inputs have ``num_particles`` as their first dimension, and particle ``p`` follows member
    ``p % members`` for the whole sequence. Its states are samples where noise is given (:meth:`bind`), else each member's
    expectations. Rewards are expectations in both, which leaves the average over particles the same and less noisy.

    Imagined states stay within the data's range, widened by ``MARGIN`` times its width on each side, so that long sequences through
    an unstable model remain finite. Observations are not clamped, and before the first fit there are no bounds.

    Args:
        config: which kind, sizes, members and particles.
        obs_dim: O, which is Z as well.
        action_dim: A.
        terminates: learn when episodes end; otherwise they never do.
        seed: of the initial parameters.

    Raises:
        ConfigError: dynamics that are not learned, or particles that are no multiple of members.
    """

    low: Tensor
    high: Tensor
    min_log_var: Tensor
    max_log_var: Tensor
    predicts_reward = True

    def __init__(self, config: DynamicsConfig, obs_dim: int, action_dim: int, *, terminates: bool, seed: int) -> None:
        super().__init__()
        if config.name not in ("mlp", "ensemble"):
            raise ConfigError(f"dynamics.name: {config.name} is not learned; use mlp or ensemble")
        self.gaussian = config.name == "ensemble"
        self.members, self.num_particles = (config.members, config.particles) if self.gaussian else (1, 1)
        if self.members < 1 or self.num_particles < 1 or self.num_particles % self.members:
            raise ConfigError(f"dynamics.particles: expected a multiple of dynamics.members ({self.members}), got {self.num_particles}")
        self.obs_dim, self.action_dim, self.num_targets = obs_dim, action_dim, obs_dim + 1
        dims = (obs_dim + action_dim, *config.hidden)
        generator = torch.Generator().manual_seed(derive_seed(seed, "dynamics"))
        self.net = MemberMLP(self.members, (*dims, self.num_targets * (2 if self.gaussian else 1)), generator)
        self.termination = MemberMLP(self.members, (*dims, 1), generator) if terminates else None
        low, high = LOG_VAR_INIT if self.gaussian else (None, None)
        self.register_parameter("min_log_var", None if low is None else nn.Parameter(torch.full((self.num_targets,), low)))
        self.register_parameter("max_log_var", None if high is None else nn.Parameter(torch.full((self.num_targets,), high)))
        self.observations, self.targets = Normalizer(obs_dim), Normalizer(self.num_targets)
        self.register_buffer("low", torch.full((obs_dim,), -math.inf))
        self.register_buffer("high", torch.full((obs_dim,), math.inf))

    @torch.no_grad()
    def normalize(self, obs: Tensor, reward: Tensor, next_obs: Tensor) -> None:
        """Take normalisation and bounds from data: [N, O], [N], [N, O]."""
        self.observations.fit(obs)
        self.targets.fit(torch.cat((next_obs - obs, reward[:, None]), -1))
        seen = torch.cat((obs, next_obs))
        low, high = seen.amin(0), seen.amax(0)
        # What never changed is predicted not to change, and needs no bound.
        room = torch.where(high > low, MARGIN * (high - low), math.inf)
        self.low.copy_(low - room)
        self.high.copy_(high + room)

    def inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return what the networks see: [..., O], [..., A] -> [..., O+A]."""
        return torch.cat((self.observations(obs), action), -1)

    def forward(self, inputs: Tensor) -> Prediction:
        """Evaluate each member on its own rows of :meth:`inputs`: [M, ..., O+A] -> normalised targets."""
        mean, log_var = self._targets(inputs)
        return Prediction(mean, log_var, None if self.termination is None else self.termination(inputs)[..., 0])

    def encode(self, obs: Tensor) -> Tensor:
        """Return the observation itself: [..., O] -> [..., Z]."""
        return obs

    def observe(self, z: Tensor) -> Tensor:
        """Return the observation that a state is: [..., Z] -> [..., O]."""
        return z

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """Average the members' expectations: [..., Z], [..., A] -> z [..., Z], reward [...], cont [...].

        Raises:
            ConfigError: shapes that do not fit.
        """
        prediction = self(self._shared_inputs(z, action))
        change = self.targets.restore(prediction.mean.mean(0))
        return ModelStep(self._bounded(z + change[..., :-1]), change[..., -1], self._cont(prediction).mean(0))

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        """Return the next state of :meth:`step` alone: [..., Z], [..., A] -> [..., Z]."""
        mean, _ = self._targets(self._shared_inputs(z, action))
        return self._bounded(z + self.targets.restore(mean.mean(0))[..., :-1])

    def rollout(self, z: Tensor, actions: Tensor, eps: Tensor | None = None) -> ModelStep:
        """Imagine sequences, particle ``p`` with member ``p % M`` (PETS, TS-infinity).

        Args:
            z: [P, ..., Z] start, ``P`` any multiple of the members; [..., Z] where ``num_particles`` is 1.
            actions: [H, P, ..., A], or [H, ..., A].
            eps: standard normal noise [H, P, E, 1, Z] or of more steps, for z of [P, E, ..., Z]; None: expectations.

        Returns:
            z [H+1, P, ..., Z], reward [H, P, ...], cont [H, P, ...].

        Raises:
            ConfigError: shapes that do not fit.
        """
        alone = self.num_particles == 1
        if alone:
            z, actions = z[None], actions[:, None]
        self._check(z, actions[0])
        if len(z) % self.members:
            raise ConfigError(
                f"rollout: {len(z)} particles are no multiple of {self.members} members; give z [P, ..., Z] with P a multiple"
            )
        noise = [None] * len(actions) if eps is None else [self._by_member(own) for own in self._fit_noise(eps, z, len(actions))]
        zs, rewards, conts = [self._by_member(z)], [], []
        for action, own in zip(actions, noise, strict=True):
            prediction = self(self.inputs(zs[-1], self._by_member(action)))
            change = self.targets.restore(prediction.mean)
            following = zs[-1] + change[..., :-1]
            if own is not None and prediction.log_var is not None:
                std = (0.5 * prediction.log_var[..., :-1]).exp() * self.targets.scale[:-1]
                following = following + std * own
            zs.append(self._bounded(following))
            rewards.append(change[..., -1])
            conts.append(self._cont(prediction))
        # [H, M, P/M, ...] -> [H, P, ...]
        stacked = [torch.stack(parts).transpose(1, 2).flatten(1, 2) for parts in (zs, rewards, conts)]
        return ModelStep(*(part[:, 0] for part in stacked)) if alone else ModelStep(*stacked)

    def uncertainty(self, z: Tensor, action: Tensor) -> Tensor:
        """Return the members' disagreement: [..., Z], [..., A] -> [...].

        Root mean square, over changes of the observation and reward, of the standard deviation of the members' expectations, in
        standard deviations of the data; 0 for a single network.

        Raises:
            ConfigError: shapes that do not fit.
        """
        mean, _ = self._targets(self._shared_inputs(z, action))
        return mean.var(0, correction=0).mean(-1).sqrt()

    def noise_specs(self, horizon: int, num_envs: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one plan, the same for all its candidates (common random numbers, so that they differ by merit alone)."""
        shape = (horizon, self.num_particles, num_envs, 1, self.obs_dim)
        return {"dynamics": NoiseSpec("normal", shape)} if self.gaussian else {}

    def bind(self, noise: Noise) -> BoundDynamics:
        """Return a view whose :meth:`rollout` samples with the tensors of :meth:`noise_specs`.

        Raises:
            ConfigError: noise is missing.
        """
        if self.gaussian and "dynamics" not in noise:
            raise ConfigError("bind: no noise called dynamics; draw what noise_specs declares")
        return BoundDynamics(self, noise["dynamics"] if self.gaussian else None)

    def _shared_inputs(self, z: Tensor, action: Tensor) -> Tensor:
        """Return the same rows for all members: [..., Z], [..., A] -> [M, ..., O+A]."""
        self._check(z, action)
        inputs = self.inputs(z, action)
        return inputs.expand(self.members, *inputs.shape)

    def _targets(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return means and bounded log-variances [M, ..., O+1]; targets that did not vary have mean 0."""
        out = self.net(inputs)
        mean = out[..., : self.num_targets] * self.targets.varies
        if not self.gaussian:
            return mean, None
        log_var = self.max_log_var - F.softplus(self.max_log_var - out[..., self.num_targets :])
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def _cont(self, prediction: Prediction) -> Tensor:
        logit = prediction.logit
        return torch.ones_like(prediction.mean[..., 0]) if logit is None else torch.sigmoid(-logit)

    def _bounded(self, z: Tensor) -> Tensor:
        return z.clamp(self.low, self.high)

    def _by_member(self, x: Tensor) -> Tensor:
        """[P, ...] -> [M, P/M, ...], as member p % M owns particle p."""
        return x.unflatten(0, (-1, self.members)).transpose(0, 1)

    def _fit_noise(self, eps: Tensor, z: Tensor, horizon: int) -> Tensor:
        """Give noise [H, P, E, 1, Z] as many dimensions as z [P, E, ..., Z] has."""
        expected = (*z.shape[:2], 1, self.obs_dim)
        if z.dim() < 3 or eps.shape[1:] != expected or len(eps) < horizon:
            shapes = f"z {list(z.shape)} and {horizon} actions do not fit noise {list(eps.shape)}"
            raise ConfigError(f"rollout: {shapes}; give z [P, E, ..., Z] and noise [H, P, E, 1, Z]")
        return eps[:horizon].view(horizon, *z.shape[:2], *[1] * (z.dim() - 3), self.obs_dim)

    def _check(self, z: Tensor, action: Tensor) -> None:
        if z.shape[-1:] != (self.obs_dim,) or action.shape != (*z.shape[:-1], self.action_dim):
            expected = f"[..., {self.obs_dim}] and [..., {self.action_dim}] of equal leading dimensions"
            raise ConfigError(f"dynamics: states {list(z.shape)} and actions {list(action.shape)} do not fit; give {expected}")


class BoundDynamics:
    """:class:`OneStepDynamics` with the noise of one plan; parameters are shared, nothing is copied."""

    predicts_reward = True

    def __init__(self, dynamics: OneStepDynamics, eps: Tensor | None) -> None:
        self.dynamics, self.eps, self.num_particles = dynamics, eps, dynamics.num_particles
        self.encode, self.observe = dynamics.encode, dynamics.observe
        self.step, self.next, self.uncertainty = dynamics.step, dynamics.next, dynamics.uncertainty

    def rollout(self, z: Tensor, actions: Tensor) -> ModelStep:
        """Imagine samples: [P, E, ..., Z], [H, P, E, ..., A], as :meth:`OneStepDynamics.rollout` does."""
        return self.dynamics.rollout(z, actions, self.eps)
