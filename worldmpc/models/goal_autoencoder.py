"""Director's goals: latents as a few discrete codes, and codes as latents (Hafner et al. 2022, section 2.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from worldmpc.config import GoalVAEConfig, ModelConfig
from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.nets import MLP, SimNorm
from worldmpc.models.similarity import in_groups
from worldmpc.noise import gumbel

BETA_RANGE, BETA_STEP, BETA_SLACK = (1e-5, 1.0), 1.1, 0.1
"""Adapted weight of the divergence: where it lies, by what factor it moves, and how far off the target it does not."""
SMALLEST = 1e-8
"""Least probability whose logarithm is taken."""


class GoalAutoencoder(nn.Module):
    """Encodes a latent as ``L`` independent choices among ``C`` classes, and decodes such codes to latents.

    The decoder ends in the world model's own SimNorm, so that every goal lies where latents lie.

    Args:
        config: number of codes, how they are sampled, their prior.
        model: of the world model; its latent is what goals are.
        latent_dim: width of the latent, Z.
        hidden_dim: of the hidden layers.
    """

    beta: Tensor

    def __init__(self, config: GoalVAEConfig, model: ModelConfig, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.config, self.codes, self.classes, self.latent_dim = config, config.n_latents, config.n_classes, latent_dim
        self.group_dim, self.strided = model.simnorm_dim, model.simnorm_layout == "strided"
        width, hidden = self.codes * self.classes, [hidden_dim] * 2
        self.encoder = MLP(latent_dim, hidden, width)
        self.decoder = MLP(width, hidden, latent_dim, SimNorm(model.simnorm_dim, model.simnorm_layout))
        self.register_buffer("beta", torch.empty(()))
        self.reset_beta()

    def reset_beta(self) -> None:
        """Begin with the weight of the divergence anew."""
        self.beta.fill_(BETA_RANGE[1] if self.config.beta is None else self.config.beta)

    @property
    def most_kl(self) -> float:
        """Divergence of sure codes from uniform ones, in nats."""
        return self.codes * math.log(self.classes)

    def temperature(self, updates: int) -> float:
        """Return the temperature of the Gumbel-softmax after as many updates: a straight line, then constant."""
        config = self.config
        return config.tau_start + (config.tau_end - config.tau_start) * min(updates / config.anneal_steps, 1.0)

    def log_probs(self, z: Tensor) -> Tensor:
        """Log-probabilities of the codes of a latent: [..., Z] -> [..., L, C]."""
        return mixed(self.encoder(z).unflatten(-1, (self.codes, self.classes)), self.config.unimix)

    def sample(self, log_probs: Tensor, eps: Tensor, temperature: Tensor) -> Tensor:
        """Sample codes with a gradient: [..., L, C], normal noise of that shape, [] -> [..., L, C].

        ``straight_through``: one-hot, with the gradient of the probabilities. ``gumbel``: softmax((log p + Gumbel) / temperature).
        """
        if self.config.kind == "gumbel":
            return torch.softmax((log_probs + gumbel(eps)) / temperature, -1)
        probs = log_probs.exp()
        return one_hot_argmax(log_probs + gumbel(eps)) + probs - probs.detach()

    def decode(self, codes: Tensor) -> Tensor:
        """Goals of codes: [..., L, C] -> [..., Z]."""
        return self.decoder(codes.flatten(-2))

    def reconstruct(self, z: Tensor) -> Tensor:
        """Latents through their most likely codes: [..., Z] -> [..., Z]."""
        return self.decode(one_hot_argmax(self.log_probs(z)))

    def cross_entropy(self, z: Tensor, goal: Tensor) -> Tensor:
        """Cross-entropy of a goal's groups under a latent's, mean over groups, in nats: [..., Z], [..., Z] -> [...]."""
        return -(self._groups(z) * self._groups(goal).clamp(min=SMALLEST).log()).sum(-1).mean(-1)

    def entropy(self, z: Tensor) -> Tensor:
        """Entropy of a latent's groups, mean over groups, in nats: [..., Z] -> [...]."""
        return self.cross_entropy(z, z)

    def novelty(self, z: Tensor) -> Tensor:
        """What is lost of a latent on the way through its codes, KL(latent || reconstruction), mean over groups: [..., Z] -> [...]."""
        return self.cross_entropy(z, self.reconstruct(z)) - self.entropy(z)

    def kl(self, log_probs: Tensor) -> Tensor:
        """Divergence of codes from uniform ones, in nats: [..., L, C] -> [...]."""
        return self.most_kl + (log_probs.exp() * log_probs).sum((-1, -2))

    @torch.no_grad()
    def adapt(self, kl: Tensor, skip: Tensor) -> None:
        """Move the weight of the divergence [] towards where that is ``kl_target``, unless it is fixed, or ``skip`` [] is 1."""
        if self.config.beta is not None:
            return
        target = self.config.kl_target * self.most_kl
        factor = torch.where(kl > (1 + BETA_SLACK) * target, BETA_STEP, torch.where(kl < (1 - BETA_SLACK) * target, 1 / BETA_STEP, 1.0))
        self.beta.copy_(torch.where(skip > 0, self.beta, (self.beta * factor).clamp(*BETA_RANGE)))

    def _groups(self, z: Tensor) -> Tensor:
        return in_groups(z, self.group_dim, self.strided)


def mixed(logits: Tensor, uniform: float) -> Tensor:
    """Log-probabilities of a softmax with a share of the uniform distribution: [..., C] -> [..., C]."""
    if not uniform:
        return logits.log_softmax(-1)
    return ((1 - uniform) * logits.softmax(-1) + uniform / logits.shape[-1]).log()
