"""Director's networks beside the world model: goal autoencoder, manager, worker."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from worldmpc.config import GoalVAEConfig, ManagerConfig, WorkerConfig
from worldmpc.models import heads
from worldmpc.models.goal_autoencoder import GoalAutoencoder, mixed, steer
from worldmpc.models.nets import MLP, EnsembleMLP, init_weights
from worldmpc.models.similarity import make_similarity
from worldmpc.models.two_hot import TwoHot
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import derive_seed, gumbel
from worldmpc.types import PolicySample

EXTRINSIC, EXPLORATION = 0, 1
"""Places of the manager's two critics."""
FIRST_ENT_COEF = 0.01
"""Adapted weight of the entropy of goals at the beginning."""


class Manager(nn.Module):
    """Chooses the codes of goals, and values latents by task and by exploration apart.

    Args:
        config: weight of the entropy, or the share that it is kept at.
        goals: whose codes it chooses.
        hidden_dim: of the hidden layers.
        num_bins: of the two-hot values, K.
    """

    ent_coef: Tensor

    def __init__(self, config: ManagerConfig, goals: GoalAutoencoder, hidden_dim: int, num_bins: int) -> None:
        super().__init__()
        codes, classes, latent_dim = goals.codes, goals.classes, goals.latent_dim
        self.config, self.codes, self.classes, self.unimix, self.most_entropy = config, codes, classes, goals.config.unimix, goals.most_kl
        hidden = [hidden_dim] * 2
        self.actor = MLP(latent_dim, hidden, codes * classes)
        self.critics = EnsembleMLP(2, latent_dim, hidden, num_bins)
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.register_buffer("ent_coef", torch.empty(()))
        self.reset_running()

    def reset_running(self) -> None:
        """Begin with the weight of the entropy anew."""
        self.ent_coef.fill_(FIRST_ENT_COEF)
        self.fix_weight()

    def fix_weight(self) -> None:
        """Take the weight of the entropy from the configuration, where that fixes it."""
        if self.config.ent_coef is not None:
            self.ent_coef.fill_(self.config.ent_coef)

    @torch.no_grad()
    def adapt(self, entropy: Tensor, skip: Tensor) -> None:
        """Move the weight of the entropy [] towards where that is ``ent_target``, unless it is fixed, or ``skip`` [] is 1."""
        if self.config.ent_coef is None:
            steer(self.ent_coef, self.most_entropy - entropy, (1 - self.config.ent_target) * self.most_entropy, skip)

    def log_probs(self, z: Tensor) -> Tensor:
        """Log-probabilities of the codes to choose: [..., Z] -> [..., L, C]."""
        return mixed(self.actor(z).unflatten(-1, (self.codes, self.classes)), self.unimix)

    def choose(self, z: Tensor, eps: Tensor | None) -> Tensor:
        """Codes, sampled with normal noise [..., L, C], or without any the most likely ones: [..., Z] -> one-hot [..., L, C]."""
        log_probs = self.log_probs(z)
        return heads.one_hot_argmax(log_probs if eps is None else log_probs + gumbel(eps))


class Worker(nn.Module):
    """Acts towards goals: a policy prior and values of goal rewards; inputs are latent and goal beside each other, [..., 2 Z].

    Args:
        config: number of critics, and the least range of the task's values.
        model: the world model, whose kinds of actions and bins are these.
    """

    task_range: Tensor
    """Running range of the task's values, []."""

    def __init__(self, config: WorkerConfig, model: WorldModel) -> None:
        super().__init__()
        self.config, self.discrete, self.action_dim = config, model.discrete, model.action_dim
        self.log_std = model.config.log_std_min, model.config.log_std_max
        width, hidden = 2 * model.latent_dim, [model.hidden_dim] * 2
        self.pi = MLP(width, hidden, model.action_dim if model.discrete else 2 * model.action_dim)
        self.q = EnsembleMLP(config.num_q, width + model.action_dim, hidden, model.two_hot.num_bins)
        self.slow_q = copy.deepcopy(self.q).requires_grad_(False)
        self.register_buffer("task_range", torch.empty(()))
        self.reset_running()

    def reset_running(self) -> None:
        """Begin with the range of the task's values anew."""
        self.task_range.fill_(self.config.task_range)

    def policy(self, zg: Tensor, eps: Tensor) -> PolicySample:
        """Policy with its densities, of Box actions: [..., 2 Z], [..., A] -> fields [..., A] and [...]."""
        return heads.squashed_gaussian(self.pi(zg), eps, *self.log_std)

    def propose(self, zg: Tensor, eps: Tensor) -> Tensor:
        """Sample of the policy, its mode where ``eps`` is 0: [..., 2 Z], [..., A] -> [..., A]."""
        if self.discrete:
            return heads.one_hot_argmax(self.pi(zg) + gumbel(eps))
        mean, log_std = heads.split_gaussian(self.pi(zg), *self.log_std)
        return torch.tanh(mean + eps * log_std.exp())

    def probs(self, zg: Tensor) -> Tensor:
        """Probabilities of one-hot actions: [..., 2 Z] -> [..., A]."""
        return torch.softmax(self.pi(zg), -1)

    def q_logits(self, zg: Tensor, action: Tensor, slow: bool = False, frozen: bool = False) -> Tensor:
        """Two-hot logits of all critics: [..., 2 Z], [..., A] -> [Q, ..., K]."""
        return (self.slow_q if slow else self.q)(zg, action, frozen=frozen)

    def choice_logits(self, zg: Tensor, slow: bool = False) -> Tensor:
        """Two-hot logits of all critics for every choice: [..., 2 Z] -> [Q, ..., A, K]."""
        choices = torch.eye(self.action_dim, device=zg.device, dtype=zg.dtype).expand(*zg.shape[:-1], -1, -1)
        return self.q_logits(zg[..., None, :].expand(*choices.shape[:-1], -1), choices, slow)

    def value(self, zg: Tensor, eps: Tensor | None, two_hot: TwoHot, slow: bool = False) -> Tensor:
        """Mean of the critics, or least of the slow ones, at a sampled action or expected over choices: [..., 2 Z], [..., A] -> [...]."""
        if self.discrete:
            return (self.probs(zg) * _reduced(two_hot.decode(self.choice_logits(zg, slow)), slow)).sum(-1)
        assert eps is not None
        return _reduced(two_hot.decode(self.q_logits(zg, self.propose(zg, eps), slow)), slow)


def _reduced(values: Tensor, least: bool) -> Tensor:
    return values.amin(0) if least else values.mean(0)


class Hierarchy(nn.Module):
    """All of Director's own networks. They are drawn from a generator of their own: the world model is what it is without them.

    Args:
        goals: configuration of the goal autoencoder.
        manager: of the manager.
        worker: of the worker.
        model: the world model in whose latent space they work.
        seed: of the initial weights.
    """

    def __init__(self, goals: GoalVAEConfig, manager: ManagerConfig, worker: WorkerConfig, model: WorldModel, seed: int) -> None:
        super().__init__()
        latent, width, bins = model.latent_dim, model.hidden_dim, model.two_hot.num_bins
        with torch.device("meta"):  # where making layers draws nothing
            autoencoder = GoalAutoencoder(goals, model.config, latent, goals.hidden_dim or width)
            boss = Manager(manager, autoencoder, manager.hidden_dim or width, bins)
            hand = Worker(worker, model) if worker.mode == "goal_conditioned" else None
        self.goals, self.manager, self.worker = autoencoder, boss, hand
        self.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(derive_seed(seed, "hierarchy"))
        init_weights(self, generator)
        self.goals.reset_running()
        self.manager.reset_running()
        if self.worker is not None:
            self.worker.reset_running()
        self.similarity = make_similarity(worker.similarity, model.config.simnorm_dim, model.config.simnorm_layout == "strided")
        with torch.no_grad():
            values = [(self.manager.critics, self.manager.slow_critics)]
            values += [] if self.worker is None else [(self.worker.q, self.worker.slow_q)]
            for critics, slow in values:
                nn.init.zeros_(critics.layers[-1].weight)  # type: ignore[arg-type]
                slow.load_state_dict(critics.state_dict())
