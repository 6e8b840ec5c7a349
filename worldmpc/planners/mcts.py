"""Monte Carlo tree search for Discrete actions, all environments in step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.noise import NoiseSpec
from worldmpc.planners import rollout
from worldmpc.types import Model, ModelStep, Noise, PlanResult, PlanState

GAMMA_TRIALS = 8
"""Rejection trials per gamma variable: each accepts more than 95 % of the time, so all of them fail in fewer than 1 in 10^10."""


def dirichlet(alpha: float, normal: Tensor, exponential: Tensor) -> Tensor:
    """Symmetric Dirichlet samples: normal [K, ..., A], exponential [K+1, ..., A] -> [..., A], which sum to one.

    Gamma(alpha) variables, divided by their sum. Gamma(alpha + 1) by ``K`` rejection trials of which the first accepted one
    counts (Marsaglia and Tsang 2000, section 2), times ``U ** (1 / alpha)`` for Gamma(alpha) (their section 6). All in
    logarithms, as the power underflows where alpha is small; minus the logarithm of a uniform variable is exponential.
    """
    d = alpha + 1 - 1 / 3
    v = (1 + normal / (9 * d) ** 0.5).pow(3)
    log_v = v.clamp(min=torch.finfo(v.dtype).tiny).log()
    accepted = (v > 0) & (-exponential[:-1] < normal.square() / 2 + d - d * v + d * log_v)
    first = accepted.to(torch.uint8).argmax(0, keepdim=True)
    return torch.softmax(log_v.gather(0, first)[0] - exponential[-1] / alpha, -1)  # the factor d cancels


class Tree(NamedTuple):
    """One search tree per environment. ``M``: slots for nodes, ``P``: particles of the model.

    Slot 0 is the root, slot ``i`` the node that simulation ``i`` made; nothing leads to a slot that was not used. The root has no
    counts of its own, and is no child: 0 among children means that there is none, and its counts are those of none.
    """

    z: Tensor  # [M, P, E, Z]
    step: Tensor  # [M, 2, P, E] of the step into the node: reward, and the weight of what follows, discount * cont
    value: Tensor  # [M, P, E] by the model's terminal_value
    prior: Tensor  # [M, A, E]
    child: Tensor  # [M, A, E] slots
    depth: Tensor  # [M, E]
    bad: Tensor  # [M, E] bool, met a number that is not finite
    closed: Tensor  # [M, E] bool, never has children: at the horizon, terminal, or bad
    counts: Tensor  # [M, 3, E] visits, those of them that met finite numbers alone, sum of their returns from the step into the node on


class MCTS:
    """Monte Carlo tree search with a policy prior and a value, as in AlphaZero and MuZero; for Discrete actions.

    From the root a simulation follows, in each node ``s``, the action ``a`` that maximises (PUCT; Silver et al. 2018, AlphaZero)::

        Q(s, a) + c_puct P(s, a) sqrt(N(s)) / (1 + N(s, a))

    until it meets one without a node. One model step makes that node, and its value is backed up along the path. ``N(s, a)`` counts
    visits, ``N(s)`` those of the node, the one that made it included. ``Q`` is the mean return, normalised to [0, 1] by the least
    and the largest of the tree (MuZero, Schrittwieser et al. 2020, eq. 5), as returns have any scale. Actions not yet visited have
    the mean ``Q`` of their siblings' visits: neutral, so that a good sibling is kept and a bad one left. ``P`` is
    ``model.action_probs`` where the model offers it, else uniform.

    Nodes at depth ``planner.horizon`` and terminal ones have no children; another visit counts their value again. A simulation that
    meets a number that is not finite counts as the least ``Q`` of the tree. Of a model with particles, returns are averaged over them;
    noise that a model brings along for the steps of a plan is that of the first step in each.

    The model is stepped ``num_simulations`` times per plan and environment (``model_evaluations``), in batches of all environments.
    The tree is built anew in every plan: the search does not use the warm start.

    Args:
        config: sizes and constants.
        action_dim: number of actions.
        discount: per decision.
        num_q: critics to draw the two of all values of a plan from.
        discrete: whether actions are one-hot.

    Raises:
        ConfigError: actions are not discrete.
    """

    def __init__(self, config: PlannerConfig, action_dim: int, discount: float, num_q: int, discrete: bool = True) -> None:
        if not discrete:
            raise ConfigError("planner.name: mcts needs a discrete action space; use planner=mppi, cem, icem or another planner")
        self.config, self.action_dim, self.discount, self.num_q = config, action_dim, discount, num_q
        self.model_evaluations = config.num_simulations
        """Model steps per plan and environment."""

    def init(self, num_envs: int, device: torch.device) -> PlanState:
        """Return the warm start of fresh episodes: uniform probabilities."""
        mean = torch.full((num_envs, self.config.horizon, self.action_dim), 1 / self.action_dim, device=device)
        return PlanState(mean, mean[:, None][:, :0])

    def noise_specs(self, num_envs: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one plan."""
        each = (num_envs, self.action_dim)
        return {
            "terminal": NoiseSpec("normal", (self.config.num_simulations, *each)),
            "critics": NoiseSpec("subset", (2,), self.num_q),
            "root_normal": NoiseSpec("normal", (GAMMA_TRIALS, *each)),
            "root_exponential": NoiseSpec("exponential", (GAMMA_TRIALS + 1, *each)),
            "action": NoiseSpec("exponential", each),
        }

    @torch.no_grad()
    def plan(self, model: Model, z: Tensor, state: PlanState, noise: Noise, explore: bool) -> PlanResult:
        """Search from every environment's state and choose the action to execute.

        In evaluation that is the most visited action, of several the one of highest value. Exploration mixes Dirichlet noise into
        the root's prior, and samples the action in proportion to the visits.

        Args:
            model: what to imagine with.
            z: [E, Z] current latents.
            state: the other planners' warm start, which the search does not use.
            noise: tensors of :meth:`noise_specs`.
            explore: search with noise at the root, and sample the action.

        Returns:
            ``mean`` holds shares of visits: at the root, then along the most visited path, uniform behind its end; ``value`` is the
            mean return of the simulations.
        """
        config = self.config
        tree = self._plant(model, z)
        if explore:
            random = dirichlet(config.dirichlet_alpha, noise["root_normal"], noise["root_exponential"])
            tree.prior[0] = (1 - config.root_noise) * tree.prior[0] + config.root_noise * random.T
        for index in range(config.num_simulations):
            path, action = self._select(Tree(*(part[: index + 1] for part in tree)))
            leaf = self._expand(model, tree, index + 1, path[-1:], action, noise["terminal"][index], noise["critics"])
            _backup(tree, torch.cat((path, leaf)))

        quality, value = _returns(tree)
        visits, finite = _of_children(tree, tree.counts[:, 0]), _of_children(tree, tree.counts[:, 1])
        tried = visits.sum(1, keepdim=True)
        share = torch.where(tried > 0, visits / tried.clamp(min=1), 1 / self.action_dim)  # [M, A, E]
        favourite = (visits + _of_children(tree, quality).clamp(0, 1) / 2).argmax(1)  # [M, E]; visits are whole numbers
        path = _follow(tree, favourite, config.horizon - 1)  # it stays at its end, where the share is uniform
        mean = share.gather(0, path[:, None].expand(-1, self.action_dim, -1)).permute(2, 0, 1).contiguous()
        std = (mean * (1 - mean)).sqrt()
        elite = self._one_hot(favourite[0], z)
        sampled = self._one_hot((mean[:, 0] / noise["action"]).argmax(1), z)  # Gumbel-max over log(mean), written without the log
        leaves = ((tree.counts[:, 0] > 0) & (tried.squeeze(1) == 0)).float()
        return PlanResult(
            action=sampled if explore else elite,
            elite=elite,
            mean=mean,
            std=std,
            value=(share[0] * _of_children(tree, value)[0]).sum(0),
            state=PlanState(torch.cat((mean[:, 1:], torch.full_like(mean[:, :1], 1 / self.action_dim)), 1), state.elites),
            metrics={
                "plan_std": std[:, 0].mean(),
                "plan_bad": 1 - finite[0].sum(0).mean() / config.num_simulations,
                "plan_depth": ((leaves * tree.depth).sum(0) / leaves.sum(0)).mean(),
            },
        )

    def _plant(self, model: Model, z: Tensor) -> Tree:
        """[E, Z] -> trees of a root each. All of it is made from ``z``, so that plans under torch.vmap can write to it."""
        (envs, dim), slots, particles = z.shape, self.config.num_simulations + 1, getattr(model, "num_particles", 1)
        latents = z.new_zeros(slots, particles, envs, dim)
        latents[0] = z
        step = z.new_zeros(slots, 2, particles, envs, dtype=torch.float32)
        prior = step.new_zeros(slots, self.action_dim, envs) + 1 / self.action_dim
        if hasattr(model, "action_probs"):
            prior[0] = _prior(model, latents[0])
        child, counts = torch.zeros_like(prior, dtype=torch.long), step.new_zeros(slots, 3, envs)
        flag = z.new_zeros(slots, envs, dtype=torch.bool)
        return Tree(latents, step, torch.zeros_like(step[:, 0]), prior, child, torch.zeros_like(counts[:, 0]), flag, flag.clone(), counts)

    def _one_hot(self, index: Tensor, like: Tensor) -> Tensor:
        """[E] -> [E, A]."""
        return (index[:, None] == torch.arange(self.action_dim, device=index.device)).to(like.dtype)

    def _select(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """Descend from the root: nodes [D, E], of which the last is where to act, and the action there [1, E].

        All nodes choose at once, which takes fewer operations than one choice after another along the path.
        """
        quality, visits = _of_children(tree, _returns(tree)[0]), _of_children(tree, tree.counts[:, 0])
        tried = visits.sum(1, keepdim=True)
        unvisited = (visits * quality).sum(1, keepdim=True) / tried.clamp(min=1)
        bonus = tree.prior * (self.config.c_puct * (tried + 1).sqrt()) / (visits + 1)
        action = (torch.where(tree.child > 0, quality, unvisited) + bonus).argmax(1)
        path = _follow(tree, action, min(len(action) - 1, self.config.horizon))
        return path, action.gather(0, path[-1:])

    def _expand(self, model: Model, tree: Tree, slot: int, parent: Tensor, action: Tensor, eps: Tensor, critics: Tensor) -> Tensor:
        """Step the model in all environments, write the new nodes to ``slot``, and return the leaves [1, E].

        The leaf is the new node, or the parent [1, E] itself where that is closed; then nothing leads to the slot.
        """
        _, particles, envs, dim = tree.z.shape
        z = tree.z.gather(0, parent[:, None, :, None].expand(-1, particles, -1, dim)).squeeze(0)
        taken = self._one_hot(action.squeeze(0), z).expand(particles, -1, -1)
        # Particles are told apart by rollouts alone, as in rollout_return.
        step = model.step(z, taken) if particles == 1 else _last(rollout(model, z, taken[None]))
        value = model.terminal_value(step.z, eps.expand(particles, -1, -1), critics)
        numbers = torch.stack((step.reward, self.discount * step.cont, value))  # [3, P, E]
        check = numbers.sum((0, 1))
        if hasattr(model, "action_probs"):
            tree.prior[slot] = _prior(model, step.z)
            check = check + tree.prior[slot].sum(0)
        bad = ~check.isfinite()
        numbers = numbers.masked_fill(bad, 0.0)
        depth = tree.depth.gather(0, parent).squeeze(0) + 1
        tree.z[slot], tree.step[slot], tree.value[slot], tree.depth[slot], tree.bad[slot] = step.z, numbers[:2], numbers[2], depth, bad
        # A weight of 0 is that of a terminal step, or of a bad one.
        tree.closed[slot] = (depth >= self.config.horizon) | (numbers[1] == 0).all(0)
        expanded = ~tree.closed.gather(0, parent)
        tree.child.view(-1, envs).scatter_(0, parent * self.action_dim + action, slot * expanded)
        return torch.where(expanded, slot, parent)


def _backup(tree: Tree, path: Tensor) -> None:
    """Count a simulation in the nodes of its path [D, E], the root left out; where a node is repeated, once."""
    nodes, first = path[1:], path[1:] != path[:-1]
    step = tree.step.gather(0, nodes[:, None, None].expand(-1, *tree.step.shape[1:]))
    step = torch.where(first[:, None, None], step, step.new_tensor((0.0, 1.0))[:, None, None])  # [D-1, 2, P, E]
    later = tree.value.gather(0, nodes[-1:, None].expand(-1, *tree.value.shape[1:])).squeeze(0)
    returns = []
    for reward, weight in reversed(step.unbind()):
        later = torch.addcmul(reward, weight, later)
        returns.append(later)
    finite = first & ~tree.bad.gather(0, nodes[-1:])
    total = torch.stack(returns[::-1]).mean(1) * finite
    tree.counts.scatter_add_(0, nodes[:, None].expand(-1, 3, -1), torch.stack((first, finite, total), 1))


def _last(steps: ModelStep) -> ModelStep:
    return ModelStep(steps.z[-1], steps.reward[-1], steps.cont[-1])


def _prior(model: Any, z: Tensor) -> Tensor:
    """[P, E, Z] -> probabilities of the actions, averaged over the particles [A, E]."""
    return model.action_probs(z).mean(0).T


def _returns(tree: Tree) -> tuple[Tensor, Tensor]:
    """Mean return from the step into each node on [M, E]: normalised to [0, 1] over the tree, and as it is.

    Simulations that met bad numbers count as the least mean of the others. Of slots without visits, the numbers mean nothing.
    """
    visits, finite, total = tree.counts.unbind(1)
    mean = total / finite  # NaN where nothing is known
    low = mean.nan_to_num(torch.inf, torch.inf).amin(0).nan_to_num(posinf=0.0)
    high = mean.nan_to_num(-torch.inf).amax(0)
    value = (total + (visits - finite) * low) / visits.clamp(min=1)
    # Returns that differ by rounding alone are not spread over [0, 1].
    scale = torch.maximum(high - low, 1e-6 * low.abs()).clamp(min=1e-30)
    return (value - low) / scale, value


def _of_children(tree: Tree, number: Tensor) -> Tensor:
    """Pick for each node the numbers [M, E] of its children: [M, A, E]."""
    return number.gather(0, tree.child.flatten(0, 1)).view(tree.child.shape)


def _follow(tree: Tree, action: Tensor, steps: int) -> Tensor:
    """Go from the root to the children that ``action`` [M, E] leads to, and stay where there is none: nodes [steps + 1, E]."""
    child = tree.child.gather(1, action[:, None]).squeeze(1)
    child = torch.where(child > 0, child, torch.arange(len(child), device=child.device)[:, None])
    path = [torch.zeros_like(child[:1])]
    for _ in range(steps):
        path.append(child.gather(0, path[-1]))
    return torch.cat(path)
