"""What TD-MPC2 does about opponents that it imagines: plan against them, watch them, learn who they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from worldmpc.agents.planning import plan_output
from worldmpc.config import ConfigError, RunConfig
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseStream
from worldmpc.opponents.simulation import Demonstrations, OpponentSimulation
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
            self._learn_from_references(obs, extras["other_views"], extras["steps"], (names, extras["other_action"]))
            if simulation.demonstrations is not None and bool(fresh.any()):
                simulation.demonstrations.begin(fresh)
        return carry._replace(belief=simulation.update_belief(carry.belief, obs, extras["other_action"]))

    def _learn_from_references(
        self, own: Tensor, others: Tensor, steps: Tensor | None = None, known: tuple[Sequence[str], Tensor] | None = None
    ) -> None:
        """Ask every reference what it would do, and keep that with the own views, from which it is learned.

        Args:
            own: own views, [E, O].
            others: the other player's before each of R steps of a decision, [E, R, O2].
            steps: how many of them were made, [E]; all without it.
            known: who really plays [E] and what they did [E, A2], which then counts instead.
        """
        simulation = self._simulated()
        if not simulation.references:
            return
        references = self._loaded_references()
        for name, action in references.act(others.cpu(), steps).items():
            if known is not None:
                really = torch.tensor([references.also.get(playing, playing) == name for playing in known[0]])
                action = torch.where(really[:, None], known[1], action)
            simulation.store(name, own.to(self.device), action.to(self.device))

    def _act_in_game(self, carry: GameCarry, obs: Tensor, noise: Noise, stream: NoiseStream, mode: Mode) -> ActOutput:
        """Plan against the opponents that are believed to play."""
        simulation = self._simulated()
        noise = noise | stream.draw(simulation.noise_specs(self.config.planner.horizon, len(obs)))
        plan = self.plan(obs, carry.plan, noise, mode == "explore", model=simulation.against(carry.belief, noise))
        output, certainty = plan_output(plan), torch.softmax(carry.belief, -1).amax(-1).mean()
        return output._replace(carry=carry._replace(plan=plan.state), metrics={**output.metrics, "opponents/certainty": certainty})

    def _loaded_references(self) -> Demonstrations:
        references = self._simulated().demonstrations
        if references is None:
            raise RuntimeError("opponent_simulation: the references were not loaded; make the agent for training, with create_agent")
        return references

    def _simulated(self) -> OpponentSimulation:
        if self.simulation is None:
            raise RuntimeError("opponent_simulation: nobody is imagined; make the agent with opponent_simulation.enabled=true")
        return self.simulation
