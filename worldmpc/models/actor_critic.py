"""Policy and value of PPO, and the distributions of its actions: stateless functions of the network's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from worldmpc.models.heads import one_hot_argmax
from worldmpc.noise import derive_seed, gumbel


class Gaussian(NamedTuple):
    """Independent normal actions. They are not bounded: the environments clip what they execute, ``log_prob`` is of what was sampled."""

    mean: Tensor  # [..., A]
    log_std: Tensor  # [A]

    @property
    def mode(self) -> Tensor:
        """Most likely action: [..., A]."""
        return self.mean

    def sample(self, eps: Tensor) -> Tensor:
        """Turn standard normal noise into actions: [..., A] -> [..., A]."""
        return self.mean + self.log_std.exp() * eps

    def log_prob(self, action: Tensor) -> Tensor:
        """[..., A] -> [...]."""
        eps = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * eps.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats: [...]."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).expand(self.mean.shape[:-1])


class Categorical(NamedTuple):
    """A choice among ``A``, as one-hot vectors."""

    log_probs: Tensor  # [..., A]

    @property
    def mode(self) -> Tensor:
        """Most likely choice: [..., A]."""
        return one_hot_argmax(self.log_probs)

    def sample(self, eps: Tensor) -> Tensor:
        """Turn standard normal noise into choices: [..., A] -> [..., A]."""
        return one_hot_argmax(self.log_probs + gumbel(eps))

    def log_prob(self, action: Tensor) -> Tensor:
        """[..., A] -> [...]."""
        return (self.log_probs * action).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats: [...]."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


Distribution = Gaussian | Categorical


class ActorCritic(nn.Module):
    """Separate tanh networks for policy and value, orthogonal initial weights (Schulman et al. 2017; Andrychowicz et al. 2021).

    The first policy is nearly the same everywhere, as its last layer begins with gain 0.01.

    Args:
        obs_dim: observation dimensions, or the features that ``encoder`` returns.
        action_dim: action dimensions, or the number of choices.
        hidden: widths of the hidden layers.
        discrete: actions are choices, as one-hot vectors.
        log_std_init: first log standard deviation of Box actions, the same for all observations.
        seed: of the initial weights.
        encoder: what both networks read observations through, such as :class:`ImageEncoder`; None: nothing.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (64, 64),
        discrete: bool = False,
        log_std_init: float = 0.0,
        seed: int = 1,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] | None = {
            "obs_dim": obs_dim,
            "action_dim": action_dim,
            "hidden": list(hidden),
            "discrete": discrete,
            "image": list(encoder.shape) if isinstance(encoder, ImageEncoder) else None,
        }
        """Plain values that :meth:`build` makes the same networks of; None with an encoder of another kind."""
        if not (encoder is None or isinstance(encoder, ImageEncoder)):
            self.architecture = None
        self.encoder = nn.Identity() if encoder is None else encoder
        self.policy_net = _mlp(obs_dim, hidden, action_dim)
        self.value_net = _mlp(obs_dim, hidden, 1)
        self.log_std = None if discrete else nn.Parameter(torch.full((action_dim,), float(log_std_init)))
        generator = torch.Generator().manual_seed(derive_seed(seed, "init", "actor_critic"))
        for part, gain in ((self.encoder, math.sqrt(2)), (self.policy_net, 0.01), (self.value_net, 1.0)):
            _orthogonal(part, gain, generator)

    @classmethod
    def build(cls, architecture: Mapping[str, Any], log_std_init: float = 0.0, seed: int = 1) -> ActorCritic:
        """Make the networks that ``architecture`` describes, with initial weights."""
        sizes = dict(architecture)
        image = sizes.pop("image")
        encoder = None if image is None else ImageEncoder(image, sizes["obs_dim"])
        return cls(**sizes, log_std_init=log_std_init, seed=seed, encoder=encoder)

    def forward(
        self, obs: Tensor, state: None = None, action: Tensor | None = None, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Act, or judge actions.

        Args:
            obs: [..., *O].
            state: nothing; a place for policies with memory.
            action: [..., A] to judge; None: ``eps`` decides.
            eps: [..., A] standard normal noise to sample an action with; None: the most likely one.

        Returns:
            Action [..., A], its log-probability [...], the policy's entropy [...], the value [...], and None.
        """
        features = self.encoder(obs)
        distribution = self._distribution(features)
        if action is None:
            action = distribution.mode if eps is None else distribution.sample(eps)
        return action, distribution.log_prob(action), distribution.entropy(), self.value_net(features).squeeze(-1), None

    def distribution(self, obs: Tensor) -> Distribution:
        """Return the policy's distribution over actions: [..., *O] -> one per observation."""
        return self._distribution(self.encoder(obs))

    def value(self, obs: Tensor) -> Tensor:
        """[..., *O] -> [...]."""
        return self.value_net(self.encoder(obs)).squeeze(-1)

    def _distribution(self, features: Tensor) -> Distribution:
        raw = self.policy_net(features)
        return Categorical(F.log_softmax(raw, -1)) if self.log_std is None else Gaussian(raw, self.log_std)


class ImageEncoder(nn.Module):
    """Two convolutions of stride 2 and a linear layer; channels first, pixels from 0 to 255."""

    def __init__(self, shape: Sequence[int], features: int = 128) -> None:
        """Make it for images [C, height, width] of this ``shape``."""
        super().__init__()
        self.shape = tuple(shape)
        channels, height, width = shape
        self.convs = nn.ModuleList([skip_init(nn.Conv2d, before, after, 3, 2, 1) for before, after in ((channels, 32), (32, 64))])
        for _ in self.convs:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.linear = skip_init(nn.Linear, 64 * height * width, features)
        self.features = features

    def forward(self, obs: Tensor) -> Tensor:
        """[..., C, height, width] -> [..., features]."""
        x = obs.reshape(-1, *obs.shape[-3:]) / 255.0
        for conv in self.convs:
            x = torch.relu(conv(x))
        return torch.relu(self.linear(x.flatten(1))).view(*obs.shape[:-3], self.features)


def _mlp(in_dim: int, hidden: Sequence[int], out_dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise((in_dim, *hidden)):
        layers += [skip_init(nn.Linear, before, after), nn.Tanh()]
    return nn.Sequential(*layers, skip_init(nn.Linear, (in_dim, *hidden)[-1], out_dim))


@torch.no_grad()
def _orthogonal(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Draw orthogonal weights: gain sqrt(2), of the last layer ``gain``; biases 0."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else math.sqrt(2), generator=generator)
        assert layer.bias is not None
        layer.bias.zero_()
