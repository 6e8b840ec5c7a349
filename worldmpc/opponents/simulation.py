"""Whom we imagine: reference opponents as networks cloned from what they do, a belief about who plays, and plans against them.

The pool of opponents that games are played with (:mod:`.pool`) is another concept, and nothing here knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from worldmpc.config import OpponentSimulationConfig, RunConfig
from worldmpc.functional import tree_fill, tree_put, tree_rows, tree_tensors
from worldmpc.learners.descent import Descent
from worldmpc.models.cloning import Clone
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec, NoiseStream, derive_seed
from worldmpc.opponents.players import Player
from worldmpc.types import Metrics, ModelStep, Noise, Seat, SequenceBatch

ANYONE = "anyone"
"""Name of the network that is cloned from everybody that was met."""
LEAST_EVIDENCE = -12.0
"""Nats below the most likely opponent at which an observed action stops counting: no single one excludes anybody."""


class CloningBuffer:
    """The newest steps of one reference: own views [capacity, O] and what it does there [capacity, A2]."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self._rows = torch.zeros(0, obs_dim + action_dim, device=device)
        self._split, self.total = obs_dim, 0

    def __len__(self) -> int:
        """Return how many steps are kept."""
        return min(self.total, self.capacity)

    def add(self, obs: Tensor, action: Tensor) -> None:
        """Keep steps: [n, O], [n, A2]."""
        rows = torch.cat((obs, action), -1).to(self.device, torch.float32)[-self.capacity :]
        needed = min(self.total + len(rows), self.capacity)
        if needed > len(self._rows):  # memory grows with what is kept
            size = min(max(2 * len(self._rows), needed, 1024), self.capacity)
            self._rows = torch.cat((self._rows, self._rows.new_zeros(size - len(self._rows), self._rows.shape[1])))
        where = (self.total + torch.arange(len(rows), device=self.device)) % self.capacity
        self._rows[where] = rows
        self.total += len(rows)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return steps drawn by uniform numbers in [0, 1): [n] -> [n, O], [n, A2]."""
        rows = self._rows[(uniform * len(self)).long().clamp(max=len(self) - 1)]
        return rows[:, : self._split], rows[:, self._split :]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, and how much ever was."""
        return {"rows": self._rows[: len(self)].clone(), "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; of a larger buffer the newest part."""
        rows, total = state["rows"].to(self.device), int(state["total"])
        if len(rows) == self.capacity or len(rows) == total <= self.capacity:
            self._rows, self.total = rows.clone(), total
            return
        first = total % len(rows) if total > len(rows) else 0  # where the oldest row of a full ring is
        self._rows, self.total = self._rows[:0], 0
        ordered = torch.cat((rows[first:], rows[:first]))
        self.add(ordered[:, : self._split], ordered[:, self._split :])


class Demonstrations:
    """Reference opponents that are asked, step by step, what they would do where the present opponent is.

    Args:
        players: the references by name.
        games: games that are watched at once.
        seed: of their random numbers.
        also: other names of references, by which the present opponent may be called -> theirs.
    """

    def __init__(self, players: Mapping[str, Player], games: int, seed: int, also: Mapping[str, str] | None = None) -> None:
        self.players, self.games, self.also = dict(players), games, dict(also or {})
        self.stream = NoiseStream(seed, "demonstrations")
        self.carries = {name: player.init_carry(games, self.stream.generator) for name, player in self.players.items()}

    def act(self, other_views: Tensor, steps: Tensor | None = None) -> dict[str, Tensor]:
        """Return what each reference does in the mean over the steps of one decision.

        Args:
            other_views: what the other player saw before each step, [E, R, O2].
            steps: how many of them were made, [E]; all without it.

        Returns:
            name -> [E, A2].
        """
        count = torch.full((len(other_views),), other_views.shape[1]) if steps is None else steps
        actions = {}
        for name, player in self.players.items():
            taken = []
            for number in range(other_views.shape[1]):
                action, self.carries[name] = player.act(self.carries[name], other_views[:, number], self.stream.generator)
                taken.append(action * (number < count)[:, None])
            actions[name] = torch.stack(taken).sum(0) / count[:, None]
        return actions

    def begin(self, fresh: Tensor) -> None:
        """Forget games that are over, [E]."""
        where = fresh.nonzero().flatten()
        for name, player in self.players.items():
            blank = player.init_carry(self.games, self.stream.generator)
            self.carries[name] = tree_put(self.carries[name], where, tree_rows(blank, where))

    def state_dict(self) -> dict[str, Any]:
        """Return what references remember, and their random numbers."""
        return {
            "stream": self.stream.state_dict(),
            "players": {name: player.state_dict() for name, player in self.players.items()},
            "carries": {name: tree_tensors(carry) for name, carry in self.carries.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.stream.load_state_dict(state["stream"])
        for name, player in self.players.items():
            player.load_state_dict(state["players"][name])
            self.carries[name] = tree_fill(self.carries[name], state["carries"][name])


class OpponentSimulation:
    """Cloning networks on latents of the player's own view, with a buffer for each reference, and a belief about who plays.

    Hypotheses ``K`` are the references in their order and, where ``pooled``, :data:`ANYONE`.

    Args:
        config: the run's configuration.
        model: encodes own views; the networks become its ``opponents``.
        other: what the other player sees and does.
        device: where networks and buffers are.
        total_updates: length of the learning-rate schedule.
    """

    def __init__(self, config: RunConfig, model: WorldModel, other: Seat, device: torch.device, total_updates: int) -> None:
        own = config.opponent_simulation
        self.config, self.model, self.other, self.device = own, model, other, device
        self.references: tuple[str, ...] = own.opponent_agents
        self.names = (*self.references, *((ANYONE,) if own.pooled else ()))
        self.ids = dict(zip(self.names, self.names, strict=True))
        """Name -> what the hypothesis is known by in checkpoints; whoever knows the content behind a path puts its digest here."""
        clones = [
            Clone(model.latent_dim, other.action_dim, own.hidden, discrete=other.discrete, seed=derive_seed(config.seed, "opponent", name))
            for name in self.names
        ]
        self.clones: Sequence[Clone] = clones
        model.opponents = nn.ModuleList(clones).to(device)
        parts = {str(number): own.lr_scale for number in range(len(clones))}
        self.descent = Descent(model.opponents, parts, config, total_updates)
        self.buffers = {name: CloningBuffer(own.buffer, model.obs_dim, other.action_dim, device) for name in self.references}
        self.stream = NoiseStream(config.seed, "cloning", device=device)
        self.demonstrations: Demonstrations | None = None
        """The references themselves, while somebody learns from them; acting needs none."""
        self.forced: int | None = None
        """The hypothesis that imagination outside of plans follows; None: the last, which is :data:`ANYONE` where there is such a one."""

    def prior(self, games: int) -> Tensor:
        """Return the belief of fresh games, log-weights [games, K]: anybody alike."""
        return torch.zeros(games, len(self.names), device=self.device)

    def begin_game(self, game: int) -> None:
        """Let references forget one of the games that they watch; of others nobody remembers anything."""
        if self.demonstrations is not None and game < self.demonstrations.games:
            self.demonstrations.begin(torch.arange(self.demonstrations.games) == game)

    @torch.no_grad()
    def update_belief(self, belief: Tensor, obs: Tensor, action: Tensor) -> Tensor:
        """Weigh what the other player was seen to do: log-weights [E, K], own views [E, O], its actions [E, A2] -> [E, K].

        Former evidence counts less by ``belief_decay`` per step; the log-likelihoods of hypotheses are Bayes' rule otherwise.
        """
        z, action = self.model.encode(obs.to(self.device)), action.to(self.device)
        evidence = torch.stack([clone.log_prob(z, action) for clone in self.clones], -1)
        evidence = (evidence - evidence.amax(-1, keepdim=True)).clamp(min=LEAST_EVIDENCE)
        return torch.log_softmax(self.config.belief_decay * belief + evidence, -1)

    def store(self, name: str, obs: Tensor, action: Tensor) -> None:
        """Keep what a reference does: own views [n, O], its actions [n, A2].

        Raises:
            ValueError: it is no reference.
        """
        if name not in self.buffers:
            raise ValueError(f"opponent_simulation: {name!r} is no reference; there are {', '.join(self.buffers) or 'none'}")
        self.buffers[name].add(obs, action)

    def noise_specs(self, horizon: int, games: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one plan, the same for all its candidates: uniform numbers for every imagined action."""
        particles = len(self.names) * self.config.samples
        return {"opponents": NoiseSpec("uniform", (horizon, particles, games, 1, self.other.action_dim))}

    def against(self, belief: Tensor, noise: Noise) -> Against:
        """Return the world model with these opponents in it, for one plan: log-weights [E, K], tensors of :meth:`noise_specs`.

        Those that are hardly believed in, in all games, are left out (``least_belief``).
        """
        weight, uniform, hypotheses = torch.softmax(belief, -1), noise["opponents"], len(self.clones)
        kept = (weight >= min(self.config.least_belief, 0.5 / hypotheses)).any(0).nonzero().flatten()
        clones = [self.clones[place] for place in kept.tolist()]
        weight = weight[:, kept] / weight[:, kept].sum(-1, keepdim=True)
        uniform = uniform.unflatten(1, (-1, hypotheses))[:, :, kept].flatten(1, 2)
        return Against(self.model, clones, weight, uniform, self.config)

    def act(self, z: Tensor, name: str | None = None) -> Tensor:
        """Expected action of one hypothesis, of the forced one, or of the last: [..., Z] -> [..., A2]."""
        index = self.names.index(name) if name is not None else self.forced if self.forced is not None else len(self.names) - 1
        return self.clones[index].mean(z)

    def update(self, batch: SequenceBatch) -> Metrics:
        """Do one update of all networks on current latents: of references from their buffers, of :data:`ANYONE` from replayed windows.

        Minimises the mean negative log-likelihood of each; a network whose buffer is empty stays as it is.
        """
        skip, metrics, count = self.descent.begin(), {}, self.config.batch_size
        noise = self.stream.draw({name: NoiseSpec("uniform", (count,)) for name in self.references})
        for number, (name, clone) in enumerate(zip(self.names, self.clones, strict=True)):
            if name != ANYONE and not len(self.buffers[name]):
                continue
            if name == ANYONE:
                obs, action, weight = batch.obs[0], batch.extras["other_action"][0], batch.mask[0]
            else:
                (obs, action), weight = self.buffers[name].draw(noise[name]), torch.ones(count, device=self.device)
            with torch.no_grad():
                z = self.model.encode(obs)
            loss = -(clone.log_prob(z, action) * weight).sum() / weight.sum().clamp(min=1)
            _, skipped = self.descent.step(str(number), loss, torch.zeros_like(skip))
            skip, metrics[f"opponents/{name}_nll"] = torch.maximum(skip, skipped), loss.detach()
        return metrics | {"opponents/skipped": self.descent.end(skip)}

    def state_dict(self) -> dict[str, Any]:
        """Return names, optimiser, buffers and random stream; networks are part of the model."""
        return {
            "names": list(self.names),
            "ids": [self.ids[name] for name in self.names],
            "descent": self.descent.state_dict(),
            "buffers": {name: buffer.state_dict() for name, buffer in self.buffers.items()},
            "stream": self.stream.state_dict(),
            "demonstrations": None if self.demonstrations is None else self.demonstrations.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it has other hypotheses, or in another order.
        """
        if list(state["names"]) != list(self.names):
            raise ValueError(f"imagined opponents were {', '.join(state['names'])}, are {', '.join(self.names)}")
        self.descent.load_state_dict(state["descent"])
        for name, buffer in self.buffers.items():
            buffer.load_state_dict(state["buffers"][name])
        self.stream.load_state_dict(state["stream"])
        if self.demonstrations is None:  # whoever only acts has not looked behind paths
            self.ids = dict(zip(self.names, state["ids"], strict=True))
        if self.demonstrations is not None and state["demonstrations"] is not None:
            self.demonstrations.load_state_dict(state["demonstrations"])


class Against:
    """A world model in which the other player does what cloned networks say; satisfies :class:`worldmpc.types.Model`.

    Particle ``p`` follows hypothesis ``p % K`` for the whole of an imagined trajectory, so that every candidate meets the same opponents.

    Args:
        model: reads own actions with the other player's behind them.
        clones: K hypotheses.
        belief: their weights, [E, K].
        uniform: numbers for every imagined action, [H, P, E, 1, A2], P a multiple of K.
        config: how returns become one.
    """

    def __init__(
        self, model: WorldModel, clones: Sequence[Clone], belief: Tensor, uniform: Tensor, config: OpponentSimulationConfig
    ) -> None:
        self.model, self.clones, self.belief, self.uniform, self.config = model, clones, belief, uniform, config
        self.num_particles = uniform.shape[1]  # of one planners leave the dimension out
        self.encode, self.propose, self.terminal_value = model.encode, model.propose, model.terminal_value
        if model.discrete:
            self.action_probs = model.action_probs

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """Imagine one step: [P, E, ..., Z], [P, E, ..., A] -> z, reward, cont [P, E, ...]; without P where there is one."""
        steps = self.rollout(z, action[None])
        return ModelStep(steps.z[1], steps.reward[0], steps.cont[0])

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        """Next latent with the expected action of the most believed hypothesis: [E, ..., Z], [E, ..., A] -> [E, ..., Z]."""
        most = torch.nn.functional.one_hot(self.belief.argmax(-1), len(self.clones)).to(z.dtype)  # [E, K]
        means = torch.stack([clone.mean(z) for clone in self.clones], -1)  # [E, ..., A2, K]
        other = (means * most.view(len(most), *[1] * (means.dim() - 2), -1)).sum(-1)
        return self.model.next(z, torch.cat((action, other), -1))

    def rollout(self, z: Tensor, actions: Tensor) -> ModelStep:
        """Imagine whole sequences: [P, E, ..., Z], [H, P, E, ..., A] -> z [H+1, ...], reward [H, ...], cont [H, ...]."""
        alone = self.num_particles == 1
        if alone:
            z, actions = z[None], actions[:, None]
        zs, joint = [z], []
        for number, action in enumerate(actions):
            uniform = self.uniform[min(number, len(self.uniform) - 1)]
            uniform = uniform.view(*uniform.shape[:2], *[1] * (z.dim() - 3), uniform.shape[-1])
            joint.append(torch.cat((action, self._others(zs[-1], uniform)), -1))
            zs.append(self.model.next(zs[-1], joint[-1]))
        latents, taken = torch.stack(zs), torch.stack(joint)
        reward = self.model.two_hot.decode(self.model.reward(latents[:-1], taken))
        steps = ModelStep(latents, reward, self.model.cont(latents[1:]))
        return ModelStep(*(part[:, 0] for part in steps)) if alone else steps

    def aggregate(self, values: Tensor) -> Tensor:
        """Make one return of those against each hypothesis, as configured: [P, E, ...] -> [E, ...]."""
        hypotheses = len(self.clones)
        values = values.unflatten(0, (-1, hypotheses)).mean(0)  # samples of one hypothesis are alike
        weight = self.belief.t().reshape(hypotheses, -1, *[1] * (values.dim() - 2)).expand_as(values)
        return combine(values, weight, self.config.aggregate, self.config.cvar_share)

    def _others(self, z: Tensor, uniform: Tensor) -> Tensor:
        """What the other player does in every particle: [P, E, ..., Z], [P, E, 1, ..., A2] -> [P, E, ..., A2]."""
        hypotheses = len(self.clones)
        parts = [clone.sample(z[index::hypotheses], uniform[index::hypotheses]) for index, clone in enumerate(self.clones)]
        return torch.stack(parts, 1).flatten(0, 1)


def combine(values: Tensor, weight: Tensor, how: Literal["mean", "cvar", "worst"], share: float) -> Tensor:
    """Return the mean of returns over opponents, the mean of the worst ``share`` (CVaR), or the worst: [K, ...] and weights -> [...].

    Weights sum to 1 over K. ``worst`` leaves out whom nobody believes in, with a weight below 1 / (20 K).
    """
    if how == "mean":
        return (values * weight).sum(0)
    if how == "worst":
        return values.masked_fill(weight < 0.05 / len(values), torch.inf).amin(0)
    ordered, index = values.sort(0)
    ordered_weight = weight.gather(0, index)
    before = ordered_weight.cumsum(0) - ordered_weight
    part = torch.minimum(ordered_weight, (share - before).clamp(min=0))
    return (ordered * part).sum(0) / part.sum(0).clamp(min=1e-9)
