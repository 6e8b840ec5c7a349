"""The TD-MPC2 world model: encoder, latent dynamics, reward, termination, policy prior and critics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.config import ConfigError, ModelConfig, resolve_model
from worldmpc.models import heads, kernels
from worldmpc.models.auxiliary import AuxiliaryValues
from worldmpc.models.nets import MLP, EnsembleMLP, SimNorm, init_weights
from worldmpc.models.two_hot import TwoHot
from worldmpc.noise import derive_seed, gumbel
from worldmpc.types import ModelStep, PolicySample, SequenceBatch


class WorldModel(nn.Module):
    """Networks of TD-MPC2 (Hansen et al. 2024, section 3); satisfies :class:`worldmpc.types.Model`.

    Args:
        config: sizes and heads; widths left open come from ``config.size``.
        obs_dim: observation dimensions.
        action_dim: action dimensions, or choices.
        terminates: build the termination head.
        discrete: actions are choices: the policy prior is categorical, and its actions are one-hot vectors.
        other_dim: action dimensions, or choices, of another player, whose action dynamics and reward read behind the own one; whoever
            imagines then says what it does.
        seed: seed of the initial weights.

    Raises:
        ConfigError: widths that do not fit together.
    """

    def __init__(
        self,
        config: ModelConfig,
        obs_dim: int,
        action_dim: int,
        *,
        terminates: bool = False,
        discrete: bool = False,
        other_dim: int = 0,
        seed: int = 1,
    ) -> None:
        super().__init__()
        config = resolve_model(config)
        assert config.enc_dim and config.mlp_dim and config.latent_dim and config.num_enc_layers and config.num_q
        if config.latent_dim % config.simnorm_dim:
            raise ConfigError(f"model.latent_dim: expected a multiple of model.simnorm_dim ({config.simnorm_dim}), got {config.latent_dim}")
        self.config, self.obs_dim, self.action_dim, self.discrete, self.seed = config, obs_dim, action_dim, discrete, seed
        self.other_dim = other_dim
        latent, hidden, joint = config.latent_dim, [config.mlp_dim] * 2, config.latent_dim + action_dim
        simnorm = SimNorm(config.simnorm_dim, config.simnorm_layout)
        self.two_hot = TwoHot(config.num_bins, config.vmin, config.vmax)
        self.encoder = MLP(obs_dim, [config.enc_dim] * max(config.num_enc_layers - 1, 1), latent, simnorm)
        networks = [MLP(joint + other_dim, hidden, latent, simnorm) for _ in range(config.num_dynamics)]
        self.dynamics: nn.Module = networks[0] if len(networks) == 1 else nn.ModuleList(networks)
        if len(networks) > 1:
            self.num_particles = len(networks)
        self.reward = MLP(joint + other_dim, hidden, config.num_bins)
        self.pi = MLP(latent, hidden, action_dim if discrete else 2 * action_dim)
        self.q = EnsembleMLP(config.num_q, joint, hidden, config.num_bins) if config.value == "q" else None
        self.v = EnsembleMLP(config.num_q, latent, hidden, config.num_bins) if config.value == "v" else None
        self.termination = MLP(latent, hidden, 1) if terminates else None
        generator = torch.Generator().manual_seed(derive_seed(seed, "init"))
        for network in (self.encoder, self.dynamics, self.reward, self.pi, self.q, self.v, self.termination):
            if network is not None:
                init_weights(network, generator)
        for last in (self.reward[-1], self.critics.layers[-1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        self.target_q = None if self.q is None else copy.deepcopy(self.q).requires_grad_(False)
        self.target_v = None if self.v is None else copy.deepcopy(self.v).requires_grad_(False)
        self.auxiliary: AuxiliaryValues | None = None
        """Values at further discounts, where the agent learns some."""
        if discrete:
            self.action_probs = self._action_probs
        self.opponents: nn.Module | None = None
        """Networks that imagine another player, where the agent learns some."""
        self.trajectory: nn.Module | None = None
        """A learned prior over action sequences, where the agent trains one."""

    @property
    def latent_dim(self) -> int:
        """Width of the latent."""
        assert self.config.latent_dim is not None
        return self.config.latent_dim

    @property
    def num_q(self) -> int:
        """Number of critics."""
        return self.critics.members

    @property
    def state_values(self) -> bool:
        """Whether critics read the latent alone, V(z), instead of latent and action, Q(z, a)."""
        return self.q is None

    @property
    def critics(self) -> EnsembleMLP:
        """The ensemble of critics, of whichever kind."""
        critics = self.q or self.v
        assert critics is not None
        return critics

    @property
    def slow_copies(self) -> dict[str, str]:
        """Names of the modules that follow others slowly -> names of those others."""
        copies = {"target_v": "v"} if self.state_values else {"target_q": "q"}
        slow = self.auxiliary is not None and self.auxiliary.slow is not None
        return {**copies, "auxiliary.slow": "auxiliary.heads"} if slow else copies

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden layers of the critics."""
        assert self.config.mlp_dim is not None
        return self.config.mlp_dim

    # Planning: the Model protocol.

    def encode(self, obs: Tensor) -> Tensor:
        """[..., O] -> [..., Z]."""
        return self.encoder(obs)

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        """Latent dynamics alone, of several the first: [..., Z], [..., A] -> [..., Z]."""
        return self._networks()[0](z, action)

    def imagine(self, z: Tensor, actions: Tensor) -> Tensor:
        """Latents alone of whole sequences: [..., Z], [T, ..., A] (without gradient) -> [T+1, ..., Z].

        Of several dynamics each imagines an equal part of the first dimension, [B, Z] for [T, B, A].
        """
        networks = self._networks()
        if len(networks) > 1:
            parts = zip(networks, z.chunk(len(networks)), actions.chunk(len(networks), 1), strict=True)
            return torch.cat([network.rollout(own, acts) for network, own, acts in parts], 1)
        if type(self).next is WorldModel.next and "next" not in self.__dict__ and _is_plain(networks[0], MLP):
            return networks[0].rollout(z, actions)
        return torch.stack(self._follow(self.next, z, actions))

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., Z], [..., A] -> z [..., Z], reward [...], cont [...]; of several dynamics with the first."""
        following = self.next(z, action)
        return ModelStep(following, self.two_hot.decode(self.reward(z, action)), self.cont(following))

    def rollout(self, z: Tensor, actions: Tensor) -> ModelStep:
        """Imagine whole sequences: [..., Z], [H, ..., A] -> z [H+1, ..., Z], reward [H, ...], cont [H, ...].

        Of several dynamics each imagines its own entry of the first dimension of ``z`` and the second one of ``actions``.
        """
        networks = self._networks()
        if len(networks) > 1:
            members = [torch.stack(self._follow(network, z[index], actions[:, index])) for index, network in enumerate(networks)]
            latents = torch.stack(members, 1)
        else:
            latents = torch.stack(self._follow(self.next, z, actions))
        reward = self.two_hot.decode(self.reward(latents[:-1], actions))
        return ModelStep(latents, reward, self.cont(latents[1:]))

    def _networks(self) -> Sequence[Any]:
        """Return the dynamics networks; whoever puts another module in the place of the one has one."""
        return list(self.dynamics) if isinstance(self.dynamics, nn.ModuleList) else [self.dynamics]

    @staticmethod
    def _follow(dynamics: Callable[[Tensor, Tensor], Tensor], z: Tensor, actions: Tensor) -> list[Tensor]:
        zs = [z]
        for action in actions:
            zs.append(dynamics(zs[-1], action))
        return zs

    def fast_returns(self, z: Tensor, actions: Tensor, discount: float, eps: Tensor, critics: Tensor) -> Tensor | None:
        """Do what :func:`worldmpc.planners.rollout_return` does in one call of the CPU library; None where that cannot do it."""
        nets = self._imagined_nets()
        return None if nets is None else kernels.returns(nets, z, actions, discount, eps, critics)

    def fast_proposals(self, z: Tensor, eps: Tensor, log_std: tuple[float, float] | None = None) -> Tensor | None:
        """Do what :func:`worldmpc.planners.propose` does in one call of the CPU library; None where that cannot do it.

        ``log_std``: bounds of the prior's log standard deviation; None: those of the configuration.
        """
        nets = self._imagined_nets()
        if nets is None:
            return None
        return kernels.proposals(nets if log_std is None else nets._replace(log_std=log_std), z, eps)

    def _imagined_nets(self) -> kernels.ImaginedNets | None:
        if self.discrete or torch.compiler.is_compiling() or not self._is_unchanged():
            return None  # whoever changes a part of the model gets the parts called one by one
        return kernels.ImaginedNets(
            dynamics=self._networks()[0].network(),
            reward=self.reward.network(),
            policy=self.pi.network(),
            critics=self.critics.network(),
            termination=None if self.termination is None else self.termination.network(),
            support=self.two_hot.bins,
            log_std=self._log_std,
            hard=self.config.continuation == "hard",
            state_values=self.state_values,
            clipped=self.config.policy == "clipped",
        )

    def _is_unchanged(self) -> bool:
        """Return whether the model and all its parts are of these very classes, with no method replaced and no hook."""
        if type(self) is not WorldModel or not _METHODS.isdisjoint(self.__dict__):
            return False
        return all(part is None or _is_plain(part, kind) for part, kind in zip(self._parts(), _KINDS, strict=True))

    def _parts(self) -> tuple[nn.Module | None, ...]:
        return self.dynamics, self.reward, self.pi, self.critics, self.termination, self.two_hot

    def acted(self, batch: SequenceBatch) -> Tensor:
        """What dynamics and reward read of replayed steps: own actions, with those of another player behind them, [T, B, A (+ A2)]."""
        return torch.cat((batch.action, batch.extras["other_action"]), -1) if self.other_dim else batch.action

    def cont(self, z: Tensor) -> Tensor:
        """Probability that the episode goes on after reaching a latent (0 or 1 with ``continuation=hard``): [..., Z] -> [...]."""
        if self.termination is None:
            return z.new_ones(()).expand(z.shape[:-1])
        terminated = torch.sigmoid(self.termination_logit(z))
        if self.config.continuation == "hard":
            terminated = (terminated > 0.5).to(z.dtype)
        return 1 - terminated

    def propose(self, z: Tensor, eps: Tensor, log_std: tuple[float, float] | None = None) -> Tensor:
        """Sample of the policy prior, its mode where ``eps`` is 0: [..., Z], [..., A] -> [..., A].

        ``log_std``: bounds of its log standard deviation; None: those of the configuration.
        """
        if self.discrete:
            return heads.one_hot_argmax(self.pi(z) + gumbel(eps))
        mean, spread = heads.split_gaussian(self.pi(z), *(log_std or self._log_std))
        if self.config.policy == "clipped":
            return (torch.tanh(mean) + eps * spread.exp()).clamp(-1, 1)
        return torch.tanh(mean + eps * spread.exp())

    @property
    def _log_std(self) -> tuple[float, float]:
        return self.config.log_std_min, self.config.log_std_max

    def terminal_value(self, z: Tensor, eps: Tensor, critics: Tensor) -> Tensor:
        """Mean of the given critics, of actions at a sampled one or expected over all choices: [..., Z], [..., A], [2] -> [...]."""
        if self.state_values:
            return self.v_values(z, critics).mean(0)
        if self.discrete:
            return self.expected(self.choice_values(z, critics).mean(0), z)
        return self.q_values(z, self.propose(z, eps), critics).mean(0)

    def expected(self, values: Tensor, z: Tensor) -> Tensor:
        """Expectation of every choice's value under the policy prior: [..., A], [..., Z] -> [...]."""
        return (self._action_probs(z) * values).sum(-1)

    def _action_probs(self, z: Tensor) -> Tensor:
        """Probabilities of one-hot actions under the policy prior: [..., Z] -> [..., A]."""
        return torch.softmax(self.pi(z), -1)

    # Learning.

    def policy(self, z: Tensor, eps: Tensor) -> PolicySample:
        """Policy prior with its densities: [..., Z], [..., A] -> fields [..., A] and [...]."""
        gaussian = heads.clipped_gaussian if self.config.policy == "clipped" else heads.squashed_gaussian
        return gaussian(self.pi(z), eps, *self._log_std)

    def policy_log_prob(self, z: Tensor, action: Tensor) -> Tensor:
        """Log-density of given Box actions under the policy prior: [..., Z], [..., A] -> [...]."""
        return heads.gaussian_log_prob(self.pi(z), action, *self._log_std, clipped=self.config.policy == "clipped")

    def v_logits(self, z: Tensor, critics: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Two-hot logits of all or some critics of states: [..., Z] -> [Q, ..., K]."""
        assert self.v is not None
        return self.v(z, heads=critics, keep=keep)

    def v_values(self, z: Tensor, critics: Tensor | None = None, slow: bool = False) -> Tensor:
        """Values by all or some critics of states, or the slow ones: [..., Z] -> [Q, ...]."""
        assert self.v is not None and self.target_v is not None
        return self.two_hot.decode((self.target_v if slow else self.v)(z, heads=critics))

    def q_logits(
        self, z: Tensor, action: Tensor, critics: Tensor | None = None, keep: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Two-hot logits of all or some critics, ``frozen`` without gradient for their parameters: [..., Z], [..., A] -> [Q, ..., K]."""
        assert self.q is not None
        return self.q(z, action, heads=critics, keep=keep, frozen=frozen)

    def q_values(
        self, z: Tensor, action: Tensor, critics: Tensor | None = None, keep: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Values of all or some critics, ``frozen`` without gradient for their parameters: [..., Z], [..., A] -> [Q, ...]."""
        return self.two_hot.decode(self.q_logits(z, action, critics, keep, frozen))

    def choice_values(self, z: Tensor, critics: Tensor | None = None, slow: bool = False) -> Tensor:
        """Values of every choice by all or some critics, or the slow ones: [..., Z] -> [Q, ..., A]."""
        choices = torch.eye(self.action_dim, device=z.device, dtype=z.dtype).expand(*z.shape[:-1], -1, -1)
        latents = z[..., None, :].expand(*choices.shape[:-1], -1)
        return (self.target_q_values if slow else self.q_values)(latents, choices, critics)

    def target_q_values(self, z: Tensor, action: Tensor, critics: Tensor | None = None) -> Tensor:
        """Values of all or some slow critics: [..., Z], [..., A] -> [Q, ...]."""
        assert self.target_q is not None
        return self.two_hot.decode(self.target_q(z, action, heads=critics))

    def termination_logit(self, z: Tensor) -> Tensor:
        """Logit of termination on reaching a latent: [..., Z] -> [...]."""
        assert self.termination is not None
        return self.termination(z).squeeze(-1)

    @torch.no_grad()
    def update_target(self, tau: Tensor) -> None:
        """Move the slow critics, and slow auxiliary values, towards those that learn by ``tau`` []."""
        slow: list[Tensor] = []
        fast: list[Tensor] = []
        for copied, original in self.slow_copies.items():
            slow += self.get_submodule(copied).parameters()
            fast += self.get_submodule(original).parameters()
        torch._foreach_lerp_(slow, fast, [tau] * len(slow))  # pyright: ignore[reportPrivateImportUsage]

    @property
    def last_layers(self) -> tuple[str, ...]:
        """Prefixes of the parameters of the last layers: the policy's, the critics' and the slow critics'."""
        critics, last = ("v", "target_v") if self.state_values else ("q", "target_q"), len(self.critics.layers) - 1
        return (f"pi.{len(self.pi) - 1}.", *(f"{name}.layers.{last}." for name in critics))

    @torch.no_grad()
    def reset_last_layers(self, update: int) -> None:
        """Make the last layers of policy and critics those of a new model, drawn for this update."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "reset", update))
        policy, *critics = self.last_layers
        fresh = copy.deepcopy(self.get_submodule(policy[:-1])).cpu()
        init_weights(fresh, generator)
        self.get_submodule(policy[:-1]).load_state_dict(fresh.state_dict())
        for name in critics:
            for parameter in self.get_submodule(name[:-1]).parameters():
                parameter.zero_()


_KINDS = (MLP, MLP, MLP, EnsembleMLP, MLP, TwoHot)
_METHODS = frozenset(name for name in vars(WorldModel) if not name.startswith("__"))


def _is_plain(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling a part does what its class says."""
    hooked = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return type(part) is kind and not hooked and vars(kind).keys().isdisjoint(part.__dict__.keys() - {"training"})
