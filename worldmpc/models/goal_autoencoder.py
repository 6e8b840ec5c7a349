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

WEIGHT_RANGE, WEIGHT_STEP, SLACK = (1e-5, 1.0), 1.1, 0.1
"""Adapted weight of a divergence: where it lies, by what factor it moves, and how far off the target it does not."""
SMALLEST = 1e-8
"""Least probability whose logarithm is taken, and least loss that others are compared with."""
LOSS_RATE = 0.01
"""Rate at which the usual loss follows that of the replay."""


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
    usual_loss: Tensor

    def __init__(self, config: GoalVAEConfig, model: ModelConfig, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.config, self.codes, self.classes, self.latent_dim = config, config.n_latents, config.n_classes, latent_dim
        self.group_dim, self.strided = model.simnorm_dim, model.simnorm_layout == "strided"
        width, hidden = self.codes * self.classes, [hidden_dim] * 2
        self.encoder = MLP(latent_dim, hidden, width)
        self.decoder = MLP(width, hidden, latent_dim, SimNorm(model.simnorm_dim, model.simnorm_layout))
        for name in ("beta", "usual_loss"):
            self.register_buffer(name, torch.empty(()))
        self.reset_running()

    def reset_running(self) -> None:
        """Begin anew with the weight of the divergence, and with what is usually lost of a latent."""
        self.beta.fill_(WEIGHT_RANGE[1])
        self.usual_loss.fill_(1.0)
        self.fix_weight()

    def fix_weight(self) -> None:
        """Take the weight of the divergence from the configuration, where that fixes it."""
        if self.config.beta is not None:
            self.beta.fill_(self.config.beta)

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

    def lost(self, z: Tensor) -> Tensor:
        """What a latent loses through its codes, KL(latent || reconstruction), mean over groups, in nats: [..., Z] -> [...]."""
        return self.cross_entropy(z, self.reconstruct(z)) - self.entropy(z)

    def novelty(self, z: Tensor) -> Tensor:
        """How much more is lost of a latent than of the replay's, so that its scale is none of the latents': [..., Z] -> [...]."""
        return self.lost(z) / self.usual_loss.clamp(min=SMALLEST)

    def kl(self, log_probs: Tensor) -> Tensor:
        """Divergence of codes from uniform ones, in nats: [..., L, C] -> [...]."""
        return self.most_kl + (log_probs.exp() * log_probs).sum((-1, -2))

    @torch.no_grad()
    def adapt(self, kl: Tensor, loss: Tensor, skip: Tensor) -> None:
        """Move the running values after a batch, unless ``skip`` [] is 1.

        Args:
            kl: [] divergence of its codes from uniform ones; its weight moves towards where that is ``kl_target``, unless it is fixed.
            loss: [] what was lost of its latents.
            skip: [].
        """
        self.usual_loss.copy_(torch.where(skip > 0, self.usual_loss, torch.lerp(self.usual_loss, loss, LOSS_RATE)))
        if self.config.beta is None:
            steer(self.beta, kl, self.config.kl_target * self.most_kl, skip)

    def _groups(self, z: Tensor) -> Tensor:
        return in_groups(z, self.group_dim, self.strided)


def steer(weight: Tensor, divergence: Tensor, target: float, skip: Tensor) -> None:
    """Move the weight [] of a divergence [] towards where that is its target, unless ``skip`` [] is 1, in place."""
    high, low = divergence > (1 + SLACK) * target, divergence < (1 - SLACK) * target
    factor = torch.where(high, WEIGHT_STEP, torch.where(low, 1 / WEIGHT_STEP, 1.0))
    weight.copy_(torch.where(skip > 0, weight, (weight * factor).clamp(*WEIGHT_RANGE)))


def mixed(logits: Tensor, uniform: float) -> Tensor:
    """Log-probabilities of a softmax with a share of the uniform distribution: [..., C] -> [..., C]."""
    if not uniform:
        return logits.log_softmax(-1)
    return ((1 - uniform) * logits.softmax(-1) + uniform / logits.shape[-1]).log()


def classes_in_use(log_probs: Tensor, weight: Tensor) -> Tensor:
    """Perplexity of the most likely classes over latents, mean over codes: [N, L, C], [N] weights that sum to 1 -> []."""
    usage = (one_hot_argmax(log_probs) * weight[:, None, None]).sum(0)
    return (-(usage * usage.clamp(min=1e-12).log()).sum(-1)).exp().mean()
