"""What TD-MPC2 does about opponents that it imagines: plan against them, watch them, learn who they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worldmpc.agents.planning import plan_output
from worldmpc.config import ConfigError, RunConfig
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseStream
from worldmpc.opponents.simulation import OpponentSimulation
from worldmpc.types import ActOutput, Carry, EnvSpec, GameCarry, Mode, Noise, Planner, PlanResult, PlanState


def imagined_dim(config: RunConfig, spec: EnvSpec) -> int:
    """Return the action dimensions of the other player that the world model reads: 0 where nobody is imagined."""
    return spec.other.action_dim if config.opponent_simulation.enabled and spec.other is not None else 0


def make_simulation(
    config: RunConfig, spec: EnvSpec, model: WorldModel, device: torch.device, total_updates: int
) -> OpponentSimulation | None:
    """Return the opponents to imagine, None where none are to be.

    Raises:
        ConfigError: nobody else plays.
    """
    if not config.opponent_simulation.enabled:
        return None
    if spec.other is None:
        raise ConfigError(f"opponent_simulation: nobody else plays in {spec.name}; leave it out, or play a game of two, as task=hockey")
    return OpponentSimulation(config, model, spec.other, device, total_updates)


class ImaginesOpponents:
    """Methods of an agent with a world model, a planner and perhaps a ``simulation``."""

    config: RunConfig
    model: WorldModel
    planner: Planner
    device: torch.device
    simulation: OpponentSimulation | None
    plan: Callable[..., PlanResult]
    _seen: Tensor | None = None

    def _carry_of(self, plan: PlanState) -> Carry | GameCarry:
        return Carry(plan) if self.simulation is None else GameCarry(plan, self.simulation.prior(len(plan.mean)))

    def watch_game(
        self,
        carry: GameCarry,
        obs: Tensor,
        extras: Mapping[str, Tensor],
        *,
        names: Sequence[str] | None = None,
        fresh: Tensor | None = None,
    ) -> GameCarry:
        """Take note of a step of every game and return the carry with what it says about who plays.

        Args:
            carry: of the decision that led to it.
            obs: own views that were acted on, [E, O].
            extras: ``other_action`` [E, A2], what the other player did; to learn from it ``other_views`` [E, R, O2], what it saw before
                each step of the decision, and ``steps`` [E], how many were made.
            names: of the opponents [E], where this is training: references then show what they would have done.
            fresh: where a game ended with this step [E]; training only.
        """
        simulation = self.simulation
        if simulation is None:
            return carry
        if names is not None and fresh is not None:
            self.collect_opponent_demonstrations(obs, extras["other_views"], steps=extras["steps"], known=(names, extras["other_action"]))
            if simulation.demonstrations is not None and bool(fresh.any()):
                simulation.demonstrations.begin(fresh)
        return carry._replace(belief=simulation.update_belief(carry.belief, obs, extras["other_action"]))

    def collect_opponent_demonstrations(
        self,
        obs: Tensor,
        obs_agent2: Tensor | None = None,
        *,
        steps: Tensor | None = None,
        known: tuple[Sequence[str], Tensor] | None = None,
    ) -> None:
        """Ask every reference what it would do where the opponent is, and keep that with the own views, from which it is learned.

        Args:
            obs: own views [E, O], or of one argument alone the opponents' [E, O2]: the own views are then those last acted on.
            obs_agent2: the opponents' views [E, O2]; or [E, R, O2], before each of R steps of one decision: the mean action counts.
            steps: how many of the R steps were made, [E]; all without it.
            known: who really plays [E] and what they did [E, A2], which then counts instead.

        Raises:
            RuntimeError: no references were loaded, or one argument alone before anybody has acted.
        """
        simulation = self._simulated()
        own, others = (self._seen, obs) if obs_agent2 is None else (obs, obs_agent2)
        if own is None:
            raise RuntimeError("collect_opponent_demonstrations: act on own views first, or give both: own views, then the opponents'")
        if simulation.demonstrations is None:
            if simulation.references:
                raise RuntimeError("opponent_simulation: the references were not loaded; make the agent for training, with create_agent")
            return
        views = torch.atleast_2d(others).cpu()
        for name, action in simulation.demonstrations.act(views if views.dim() == 3 else views[:, None], steps).items():
            if known is not None:
                really = torch.tensor([playing == name for playing in known[0]])
                action = torch.where(really[:, None], known[1], action)
            simulation.store(name, torch.atleast_2d(own).to(self.device), action.to(self.device))

    def store_opponent_action(self, obs: Tensor, opponent_action: Tensor, opponent_id: str | int) -> None:
        """Keep what a reference, by name or number, did: own view [O] or [n, O], its action [A2] or [n, A2].

        Raises:
            ValueError: there is no such reference.
        """
        simulation = self._simulated()
        obs, action = (torch.atleast_2d(torch.as_tensor(part, dtype=torch.float32)).to(self.device) for part in (obs, opponent_action))
        simulation.store(self._name_of(opponent_id), obs, action)

    def set_current_opponent(self, opponent_id: str | int | None) -> None:
        """Choose the opponent, by name or number, that imagination outside of plans follows; None: whoever was met.

        Plans weigh all by belief.

        Raises:
            ValueError: there is no such opponent.
        """
        simulation = self._simulated()
        simulation.forced = None if opponent_id is None else simulation.names.index(self._name_of(opponent_id))

    @torch.no_grad()
    def rollout_dynamics_multi_step(
        self, z0: Tensor, action_sequence: Tensor, max_horizon: int, opponent_id: str | int | None = None
    ) -> dict[int, Tensor]:
        """Imagine latents: [B, Z], [B, H, A] -> step 1 .. max_horizon -> [B, Z]; of a game against one opponent, by name or number."""
        found, z = {}, z0
        for step in range(max_horizon):
            action = action_sequence[:, step]
            if self.simulation is not None:
                other = self.simulation.act(z, None if opponent_id is None else self._name_of(opponent_id))
                action = torch.cat((action, other), -1)
            z = found[step + 1] = self.model.next(z, action)
        return found

    def _act_in_game(self, carry: GameCarry, obs: Tensor, noise: Noise, stream: NoiseStream, mode: Mode) -> ActOutput:
        """Plan against the opponents that are believed to play."""
        simulation = self._simulated()
        noise = noise | stream.draw(simulation.noise_specs(self.config.planner.horizon, len(obs)))
        plan = self.plan(obs, carry.plan, noise, mode == "explore", model=simulation.against(carry.belief, noise))
        output, certainty = plan_output(plan), torch.softmax(carry.belief, -1).amax(-1).mean()
        self._seen = obs
        return output._replace(carry=carry._replace(plan=plan.state), metrics={**output.metrics, "opponents/certainty": certainty})

    def _simulated(self) -> OpponentSimulation:
        if self.simulation is None:
            raise RuntimeError("opponent_simulation: nobody is imagined; make the agent with opponent_simulation.enabled=true")
        return self.simulation

    def _name_of(self, opponent: str | int) -> str:
        names: Any = self._simulated().names
        if isinstance(opponent, int) and 0 <= opponent < len(names):
            return names[opponent]
        if opponent in names:
            return str(opponent)
        raise ValueError(f"opponent_simulation: no opponent {opponent!r}; there are {', '.join(names)}, or their numbers from 0")
