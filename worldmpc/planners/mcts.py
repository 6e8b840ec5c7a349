"""Monte Carlo tree search for Discrete actions, all environments in step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.models.heads import one_hot_argmax
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
    step: Tensor  # [M, 3, P, E] reward of the step into the node, weight of what follows (discount * cont), first value of that
    prior: Tensor  # [M, A, E]
    child: Tensor  # [M, A, E] slots
    depth: Tensor  # [M, E]
    bad: Tensor  # [M, E] bool, whether any of that was not finite
    closed: Tensor  # [M, E] bool, never has children: at the horizon, terminal, or reached by a step that was not finite
    counts: Tensor  # [M, 3, E] visits, those of them that met finite numbers alone, their mean return from the step into the node on


class MCTS:
    """Monte Carlo tree search with a policy prior and a value, as in AlphaZero and MuZero; for Discrete actions.

    From the root a simulation follows, in each node ``s``, the action ``a`` that maximises (PUCT; Silver et al. 2018, AlphaZero)::

        Q(s, a) + c_puct P(s, a) sqrt(N(s)) / (1 + N(s, a))

    until it meets one without a node. One model step makes that node, and its value is backed up along the path. ``N(s, a)`` counts
    visits, ``N(s)`` those of the node, the one that made it included. ``Q`` is the mean return, normalised to [0, 1] by the least
    and the largest of the tree (MuZero, Schrittwieser et al. 2020, eq. 5), as returns have any scale. Actions not yet visited have
    the mean ``Q`` of their siblings' visits: neutral, so that a good sibling is kept and a bad one left. ``P`` is
    ``model.action_probs``, and the value of a node ``model.terminal_value``.

    A model without the one (it has no ``action_probs``) or the other (its ``value`` is None) is searched as before AlphaZero (UCT,
    Kocsis and Szepesvari 2006): a missing ``P`` is uniform, and the value of a node is the return of random actions from there to the
    horizon, and of ``terminal_value`` behind it, the mean of ``planner.num_playouts`` such playouts side by side (Cazenave and Jouandeau
    2007, leaf parallelization). Returns of zero values at different depths could not be compared.

    Nodes at depth ``planner.horizon`` and terminal ones have no children; another visit counts their value again. A simulation that
    ends with a number that is not finite counts as the least ``Q`` of the tree. Of a model with particles, returns are averaged over them;
    noise that it brings along is used anew by each step into the tree. The tree is built anew in every plan: the search does not use
    the warm start.

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

    def model_evaluations(self, judged: bool, particles: int = 1) -> int:
        """Return the model steps that one plan of one environment imagines: per simulation 1, and those of playouts.

        A simulation that ends in a node without children steps as well, and drops the result.

        Args:
            judged: by a model that judges nodes itself, see :func:`judges`.
            particles: of the model; the steps of all count.
        """
        config = self.config
        playouts = 0 if judged else config.num_playouts * (config.horizon - 1)
        return config.num_simulations * particles * (1 + playouts)

    def init(self, num_envs: int, device: torch.device) -> PlanState:
        """Return the warm start of fresh episodes: uniform probabilities."""
        mean = torch.full((num_envs, self.config.horizon, self.action_dim), 1 / self.action_dim, device=device)
        return PlanState(mean, mean[:, None][:, :0])

    def noise_specs(self, num_envs: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one plan."""
        each, simulations = (num_envs, self.action_dim), self.config.num_simulations
        playouts = (self.config.horizon - 1, num_envs, self.config.num_playouts, self.action_dim)
        return {
            "terminal": NoiseSpec("normal", (simulations, *each)),
            "playout": NoiseSpec("uniform", (simulations, *playouts)),
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
            ``mean`` holds shares of visits: at the root, then along the most visited path, uniform behind its end. ``value`` is the
            mean return of the simulations, ``plan_bad`` the share of them that ended with bad numbers, ``plan_depth`` the mean depth
            of the nodes without children.
        """
        config = self.config
        tree = self._plant(model, z)
        if explore:
            concentrated = dirichlet(config.dirichlet_alpha, noise["root_normal"], noise["root_exponential"])
            tree.prior[0] = (1 - config.root_noise) * tree.prior[0] + config.root_noise * concentrated.T
        for index in range(config.num_simulations):
            path, action = self._select(tree, index + 1)
            random = {"eps": noise["terminal"][index], "playout": noise["playout"][index], "critics": noise["critics"]}
            leaf = self._expand(model, tree, index + 1, path[-1:], action, random)
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
        step = z.new_zeros(slots, 3, particles, envs, dtype=torch.float32)
        prior = step.new_zeros(slots, self.action_dim, envs) + 1 / self.action_dim
        if hasattr(model, "action_probs"):
            prior[0] = _prior(model, latents[0])
        child, counts = torch.zeros_like(prior, dtype=torch.long), step.new_zeros(slots, 3, envs)
        flag = z.new_zeros(slots, envs, dtype=torch.bool)
        return Tree(latents, step, prior, child, torch.zeros_like(counts[:, 0]), flag, flag.clone(), counts)

    def _one_hot(self, index: Tensor, like: Tensor) -> Tensor:
        """[E] -> [E, A]."""
        return (index[:, None] == torch.arange(self.action_dim, device=index.device)).to(like.dtype)

    def _select(self, tree: Tree, slots: int) -> tuple[Tensor, Tensor]:
        """Descend from the root: nodes [D, E], of which the last is where to act, and the action there [1, E].

        All nodes choose at once, which takes fewer operations than one choice after another along the path.
        """
        tree = tree._replace(prior=tree.prior[:slots], child=tree.child[:slots], counts=tree.counts[:slots])
        quality, visits = _of_children(tree, _returns(tree)[0]), _of_children(tree, tree.counts[:, 0])
        tried = visits.sum(1, keepdim=True)
        unvisited = (visits * quality).sum(1, keepdim=True) / tried.clamp(min=1)
        bonus = tree.prior * (self.config.c_puct * (tried + 1).sqrt()) / (visits + 1)
        action = (torch.where(tree.child > 0, quality, unvisited) + bonus).argmax(1)
        path = _follow(tree, action, min(slots - 1, self.config.horizon))
        return path, action.gather(0, path[-1:])

    def _expand(self, model: Model, tree: Tree, slot: int, parent: Tensor, action: Tensor, random: Noise) -> Tensor:
        """Step the model in all environments, write the new nodes to ``slot``, and return the leaves [1, E].

        The leaf is the new node, or the parent [1, E] itself where that is closed; then nothing leads to the slot.
        """
        _, particles, envs, dim = tree.z.shape
        z = tree.z.gather(0, parent[:, None, :, None].expand(-1, particles, -1, dim)).squeeze(0)
        step = _step(model, z, self._one_hot(action.squeeze(0), z))
        depth = tree.depth.gather(0, parent).squeeze(0) + 1
        value = self._value(model, step.z, depth, random).masked_fill(step.cont == 0, 0.0)
        check = (step.reward + step.cont).sum(0)
        if hasattr(model, "action_probs"):
            tree.prior[slot] = _prior(model, step.z)
            check = check + tree.prior[slot].sum(0)
        broken, bad = (~torch.stack((check, check + value.sum(0))).isfinite()).unbind()
        reward, weight = torch.stack((step.reward, self.discount * step.cont)).masked_fill(broken, 0.0)
        tree.step[slot] = torch.stack((reward, weight, value.masked_fill(bad, 0.0)))
        tree.z[slot], tree.depth[slot], tree.bad[slot] = step.z, depth, bad
        tree.closed[slot] = (depth >= self.config.horizon) | (weight == 0).all(0)  # terminal, or broken
        expanded = ~tree.closed.gather(0, parent)
        tree.child.view(-1, envs).scatter_add_(0, parent * self.action_dim + action, slot * expanded)  # to 0: there was no child
        return torch.where(expanded, slot, parent)

    def _value(self, model: Model, z: Tensor, depth: Tensor, random: Noise) -> Tensor:
        """Value of new nodes [P, E, Z] at a depth [E], by the model or by playouts to the horizon: [P, E]."""
        eps, critics, playout = random["eps"].expand(*z.shape[:2], -1), random["critics"], random["playout"]  # [H-1, E, K, A]
        if judges(model) or not len(playout):
            return model.terminal_value(z, eps, critics)
        z = z[:, :, None].expand(-1, -1, playout.shape[2], -1)  # [P, E, K, Z]
        steps = _imagine(model, z, one_hot_argmax(playout).to(z.dtype))
        left = (self.config.horizon - depth).clamp(min=0).long()[:, None]  # of the H - 1 steps, those to the horizon
        last = steps.z.gather(0, left[None, None, ..., None].expand(1, *z.shape)).squeeze(0)
        taken = (torch.arange(len(playout), device=z.device)[:, None, None] < left)[:, None]
        value = model.terminal_value(last, eps[:, :, None].expand(*z.shape[:3], -1), critics)
        return _discounted(steps.reward, self.discount * steps.cont, taken, value)[0].mean(2)


def judges(model: Any) -> bool:
    """Return whether the model has what search without playouts needs: a policy prior and a value."""
    return hasattr(model, "action_probs") and getattr(model, "value", True) is not None


def _step(model: Model, z: Tensor, action: Tensor) -> ModelStep:
    """Step the model, its particles apart: [P, E, Z], [E, A] -> z [P, E, Z], reward [P, E], cont [P, E]."""
    if len(z) == 1:
        return model.step(z, action[None])
    return ModelStep(*(part[-1] for part in _imagine(model, z, action[None])))


def _imagine(model: Model, z: Tensor, actions: Tensor) -> ModelStep:
    """Imagine sequences as in :func:`rollout_return`: [P, E, ..., Z], [D, E, ..., A] -> z [D+1, P, E, ..., Z], others [D, P, E, ...]."""
    if len(z) == 1:
        steps = rollout(model, z[0], actions)
        return ModelStep(*(part[:, None] for part in steps))
    return rollout(model, z, actions[:, None].expand(-1, len(z), *actions.shape[1:]))


def _discounted(reward: Tensor, weight: Tensor, counts: Tensor, value: Tensor) -> list[Tensor]:
    """Returns from every step on, of steps with [D, P, E, ...] each, where they count, and a value [P, E, ...] behind them."""
    reward, weight = reward.where(counts, 0.0), weight.where(counts, 1.0)
    returns = [value]
    for now, later in zip(reversed(reward.unbind()), reversed(weight.unbind()), strict=True):
        returns.append(torch.addcmul(now, later, returns[-1].masked_fill(later == 0, 0.0)))  # a model may say anything behind an end
    return returns[:0:-1]


def _backup(tree: Tree, path: Tensor) -> None:
    """Count a simulation in the nodes of its path [D, E], the root left out; where a node is repeated, once."""
    nodes, first = path[1:], path[1:] != path[:-1]
    reward, weight, value = tree.step.gather(0, nodes[:, None, None].expand(-1, *tree.step.shape[1:])).unbind(1)
    returns = torch.stack(_discounted(reward, weight, first[:, None], value[-1])).mean(1)
    finite = first & ~tree.bad.gather(0, nodes[-1:])
    index = nodes[:, None].expand(-1, 3, -1)
    _, known, mean = tree.counts.gather(0, index).unbind(1)
    # A running mean, unlike a sum, leaves equal returns equal.
    tree.counts.scatter_add_(0, index, torch.stack((first, finite, finite * (returns - mean) / (known + 1)), 1))


def _prior(model: Any, z: Tensor) -> Tensor:
    """[P, E, Z] -> probabilities of the actions, averaged over the particles [A, E]."""
    return model.action_probs(z).mean(0).T


def _returns(tree: Tree) -> tuple[Tensor, Tensor]:
    """Mean return from the step into each node on [M, E]: normalised to [0, 1] over the tree, and as it is.

    Simulations that ended with bad numbers count as the least mean of the others. Of slots without visits, the numbers mean nothing.
    """
    visits, finite, mean = tree.counts.unbind(1)
    low = mean.where(finite > 0, torch.inf).amin(0)
    high = mean.where(finite > 0, -torch.inf).amax(0)
    low = low.masked_fill(low == torch.inf, 0.0)
    value = mean + (low - mean) * (visits - finite) / visits.clamp(min=1)
    # Returns that differ by rounding alone are not spread over [0, 1].
    scale = torch.maximum(high - low, 1e-5 * low.abs()).clamp(min=1e-30)
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
