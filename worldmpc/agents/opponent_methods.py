"""What TD-MPC2 can be told and asked about imagined opponents by whoever steps games by hand."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from worldmpc.agents.by_hand import row_of, rows_of
from worldmpc.agents.conveniences import Conveniences
from worldmpc.agents.imagining import ImaginesOpponents


class OpponentMethods(ImaginesOpponents, Conveniences):
    """Methods of an agent that may imagine opponents; all but the last raise RuntimeError where nobody is imagined."""

    def collect_opponent_demonstrations(self, obs: Any, obs_agent2: Any = None) -> None:
        """Ask every reference what it would do where the opponent is, and keep that with the own views, from which it is learned.

        To be called once per step of the game; or once per decision, with the views before each of its steps, of which the mean action
        counts. References remember the game until :meth:`on_episode_start` or :meth:`on_episode_end`.

        Args:
            obs: own views [E, O], or of one argument alone the opponents' (as ``obs_agent2``): the own views are then those last acted on
                with ``act_batch`` or ``act_with_stats``.
            obs_agent2: the opponents' views, [E, O2] or [E, R, O2]; E is the number of games that the agent was made for.

        Raises:
            RuntimeError: no references were loaded, or one argument alone before anybody has acted.
            ValueError: views of another size or number, or numbers that are not finite.
        """
        simulation, hand, games = self._simulated(), self._by_hand(), self._loaded_references().games
        own = hand.seen if obs_agent2 is None else rows_of(obs, self.spec.obs_shape, "collect_opponent_demonstrations: obs")
        if own is None:
            raise RuntimeError("collect_opponent_demonstrations: act on own views first, or give both: own views, then the opponents'")
        views = torch.as_tensor(obs if obs_agent2 is None else obs_agent2)
        shape = simulation.other.obs_shape
        steps = views.shape[1] if views.dim() == len(shape) + 2 else 1
        views = rows_of(views.reshape(-1, *views.shape[-len(shape) :]), shape, "collect_opponent_demonstrations: obs_agent2")
        if len(own) != games or len(views) != games * steps:
            raise ValueError(
                f"collect_opponent_demonstrations: expected views of {games} games, as create_agent(games={games}) was told, "
                f"got {len(own)} of its own and {len(views) // steps} of the opponents'"
            )
        self._learn_from_references(own, views.unflatten(0, (games, steps)))

    def store_opponent_action(self, obs: Any, opponent_action: Any, opponent_id: str | int) -> None:
        """Keep what a reference, by name or number, did: own view [O] or [n, O], its action [A2] or [n, A2].

        Raises:
            ValueError: there is no such reference, arrays of other sizes or lengths, or numbers that are not finite.
        """
        simulation, what = self._simulated(), "store_opponent_action"
        own = rows_of(obs, self.spec.obs_shape, f"{what}: obs")
        action = rows_of(opponent_action, (simulation.other.action_dim,), f"{what}: opponent_action")
        if len(own) != len(action):
            raise ValueError(f"{what}: expected as many views as actions, got {len(own)} and {len(action)}")
        simulation.store(self._name_of(opponent_id), own.to(self.device), action.to(self.device))

    def observe_opponent(self, obs: Any, opponent_action: Any, env_id: int = 0) -> None:
        """Weigh the belief about who plays by what the other player did where the agent has just acted: own view [O], its action [A2].

        For whoever acts by hand and stores nothing; ``store_transition`` does the same.

        Raises:
            RuntimeError: nothing was acted on in that environment.
            ValueError: arrays of other sizes, or numbers that are not finite.
        """
        self._simulated()
        if env_id not in self._by_hand().carries:
            raise RuntimeError(f"observe_opponent: act in env_id {env_id} first, with act_batch or act_with_stats")
        self._note(env_id, obs, opponent_action, "observe_opponent")

    def set_current_opponent(self, opponent_id: str | int | None) -> None:
        """Choose the opponent, by name or number, that imagination outside of plans follows; None: the last, which is whoever was met.

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
        """Imagine latents: [B, Z], [B, H, A] -> step 1 .. max_horizon -> [B, Z]; of a game against one opponent, by name or number.

        Raises:
            ValueError: there is no such opponent, or fewer actions than steps.
        """
        if max_horizon > action_sequence.shape[1]:
            raise ValueError(f"max_horizon: expected at most {action_sequence.shape[1]}, the length of action_sequence, got {max_horizon}")
        found, z = {}, z0
        for step in range(max_horizon):
            action = action_sequence[:, step]
            if self.simulation is not None:
                other = self.simulation.act(z, None if opponent_id is None else self._name_of(opponent_id))
                action = torch.cat((action, other), -1)
            z = found[step + 1] = self.model.next(z, action)
        return found

    def _note(self, env_id: int, obs: Any, other_action: Any, what: str) -> None:
        """Let the belief of a game under way take note of what the other player did."""
        hand = self._by_hand()
        if env_id not in hand.carries:
            return
        own = row_of(obs, self.spec.obs_shape, f"{what}: obs")[None]
        action = row_of(other_action, (self._simulated().other.action_dim,), f"{what}: opponent_action")[None]
        hand.carries[env_id] = self.watch_game(hand.carries[env_id], own, {"other_action": action})

    def _name_of(self, opponent: str | int) -> str:
        names: Any = self._simulated().names
        if isinstance(opponent, Integral) and not isinstance(opponent, bool) and 0 <= int(opponent) < len(names):
            return names[int(opponent)]
        if opponent in names:
            return str(opponent)
        raise ValueError(f"opponent_simulation: no opponent {opponent!r}; there are {', '.join(names)}, or their numbers from 0")
