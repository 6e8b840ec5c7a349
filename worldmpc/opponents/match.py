"""Games as an agent sees them: environments whose other player is somebody from a pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from worldmpc.config import ConfigError
from worldmpc.envs.vector import VecEnv
from worldmpc.functional import tree_fill, tree_put, tree_rows, tree_tensors
from worldmpc.noise import NoiseStream
from worldmpc.opponents.pool import Matchmaker
from worldmpc.types import Agent, EnvSpec, EnvStep


def player_spec(joint: EnvSpec) -> EnvSpec:
    """Return what one player sees of a game's environments.

    Raises:
        ConfigError: they are no game of two.
    """
    if joint.seats is None:
        raise ConfigError(f"{joint.name}: has one player; opponents are for games of two, as hockey/self-play")
    own, other = joint.seats
    return dataclasses.replace(joint, **own._asdict(), seats=None, other=other)


class Match:
    """Games stepped together, with the interface of a :class:`~worldmpc.envs.VecEnv`; the learner plays, against opponents from a pool.

    Opponents decide in batches, one for all games that they play. The steps' ``extras`` say what the other player saw and did, who it was
    (its number among the pool's players) and, at the end, who won; ``success`` is then 1, 0.5 for a draw, or 0.

    Args:
        envs: of both players (:class:`~worldmpc.envs.two_player.JointEnv`); this object owns them.
        pool: says who plays.
        seed: of the opponents' random numbers.
    """

    def __init__(self, envs: VecEnv, pool: Matchmaker, seed: int = 1) -> None:
        self.joint, self.pool = envs, pool
        self.spec, self.config, self.num_envs = player_spec(envs.spec), envs.config, envs.num_envs
        self._width, self._actions = self.spec.obs_shape[0], self.spec.action_dim
        self._stream = NoiseStream(seed, "opponents")
        self._seed = seed
        self._now: list[str] = [""] * self.num_envs
        self._next: list[str] = [""] * self.num_envs
        self._seats, self._next_seats = [1] * self.num_envs, [1] * self.num_envs
        self._carries: dict[str, Any] = {}
        self.finished: list[dict[str, Any]] = []
        """Games that ended with the last step: ``opponent``, ``winner`` (1 the player, -1 the opponent), ``seat`` of the player."""
        self.played: list[str] = []
        """Names of those who played in the last step, [E]."""
        self._under_way: tuple[Tensor, Tensor] | None = None
        envs.options = self._begin

    @property
    def begun(self) -> int:
        """How often all games have begun together."""
        return self.joint.begun

    @property
    def obs(self) -> Tensor:
        """Own views, [E, *O]."""
        return self.joint.obs[:, : self._width]

    @property
    def other_obs(self) -> Tensor:
        """Views of the opponents, [E, *O2]."""
        return self.joint.obs[:, self._width :]

    @property
    def opponents(self) -> list[str]:
        """Names of those who play now, [E]."""
        return list(self._now)

    def reset(self, seed: int | None = None) -> Tensor:
        """Begin new games everywhere and return the own views, [E, *O]; errors are those of :meth:`VecEnv.reset`."""
        self.joint.reset(seed)
        self._take_seats(torch.ones(self.num_envs, dtype=torch.bool))
        return self.obs

    def step(self, action: Tensor) -> EnvStep:
        """Take one decision in every game, as :meth:`VecEnv.step`."""
        self.step_async(action)
        return self.step_wait()

    def step_async(self, action: Tensor) -> None:
        """Let the opponents decide, and begin a step with actions [E, A]; see :meth:`VecEnv.step_async`."""
        own = action.detach().to("cpu", torch.float32)
        if own.shape != (self.num_envs, self._actions):
            raise ValueError(f"action: expected shape ({self.num_envs}, {self._actions}), got {tuple(own.shape)}")
        self.finished = []
        active = torch.ones(self.num_envs, dtype=torch.bool)
        self._under_way = own, self._send(own, active)

    def step_wait(self) -> EnvStep:
        """Finish the step under way, tell the pool of games that ended, and seat the next opponents there.

        Where one decision is several steps of the game, opponents decide in every one of them; ``other_action`` is then the mean of what
        they did, ``other_views`` [E, R, O2] what they saw before each, of which ``steps`` [E] were made before the game ended.
        Errors are those of :meth:`VecEnv.step_wait`.
        """
        if self._under_way is None:
            raise RuntimeError(f"{self.spec.name}: no step is under way; step_async begins one")
        (own, answer), self._under_way = self._under_way, None
        self.played, views = list(self._now), [self.other_obs]
        step = self._receive()
        active = ~(step.terminated | step.truncated)
        reward, count, taken = step.reward, torch.ones(self.num_envs), answer
        for _ in range(self.spec.action_repeat - 1):
            if not active.any():
                break
            views.append(torch.where(active[:, None], self.other_obs, views[-1]))
            answer = self._send(own, active)
            more = self._receive()
            reward, count = reward + more.reward, count + active
            taken = taken + answer * active[:, None]
            next_obs = torch.where(active[:, None], more.next_obs, step.next_obs)
            terminated, truncated = step.terminated | more.terminated, step.truncated | more.truncated
            success = torch.where(active, more.success, step.success)
            step = EnvStep(next_obs, reward, terminated, truncated, more.obs, step.valid, success)
            active = ~(terminated | truncated)
        over = step.terminated | step.truncated
        winner = torch.where(over, step.success.nan_to_num(0.0), torch.nan)
        numbers = {name: number for number, name in enumerate(self.pool.players)}
        extras = {
            "other_obs": views[0],
            "other_views": torch.stack(views + views[-1:] * (self.spec.action_repeat - len(views)), 1),
            "steps": count,
            "other_action": taken / count[:, None],
            "opponent": torch.tensor([float(numbers[name]) for name in self.played]),
            "winner": winner,
        }
        width = self._width
        next_obs = step.next_obs[:, :width]
        obs = next_obs if step.obs is step.next_obs else step.obs[:, :width]
        return step._replace(next_obs=next_obs, obs=obs, reward=reward, success=(1 + winner) / 2, extras=extras)

    def _send(self, own: Tensor, active: Tensor) -> Tensor:
        """Begin a step of the active games with the player's actions and the opponents' answers, which are returned, [E, A2]."""
        answer = self._answers(self.other_obs, own, active)
        self.joint.step_async(torch.cat((own, answer), 1), active)
        return answer

    def _receive(self) -> EnvStep:
        """Finish a step of the games, and where one ended tell the pool and seat the next opponent."""
        step = self.joint.step_wait()
        over = step.terminated | step.truncated
        for env in over.nonzero().flatten().tolist():
            winner = float(step.success[env].nan_to_num(0.0))
            self.pool.report(env, self._now[env], winner)
            self.finished.append({"opponent": self._now[env], "winner": int(winner), "seat": self._seats[env]})
        if over.any():
            self._take_seats(over)
        return step

    def follow(self, agent: Agent, decisions: int) -> None:
        """Let the pool look at the learner."""
        self.pool.follow(agent, decisions)

    def render(self) -> tuple[np.ndarray, ...]:
        """Return one frame per game, as :meth:`VecEnv.render`."""
        return self.joint.render()

    def close(self) -> None:
        """Free the environments."""
        self.joint.close()

    def __enter__(self) -> Match:
        """Return itself, to be closed at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to come back to this very decision."""
        return {
            "joint": self.joint.state_dict(),
            "pool": self.pool.state_dict(),
            "stream": self._stream.state_dict(),
            "now": list(self._now),
            "seats": list(self._seats),
            "finished": [dict(game) for game in self.finished],
            "carries": {name: tree_tensors(carry) for name, carry in self._carries.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], agent: Agent | None = None) -> bool:
        """Come back to a saved decision, as :meth:`VecEnv.load_state_dict`; ``agent`` is what snapshots in the pool were taken of."""
        self.pool.load_state_dict(state["pool"], agent)
        self._stream.load_state_dict(state["stream"])
        self._now, self._carries = list(state["now"]), {}
        self._seats, self.finished = list(state["seats"]), [dict(game) for game in state["finished"]]
        scratch = torch.Generator()
        for name, tensors in state["carries"].items():
            self._carries[name] = tree_fill(self.pool.players[name].init_carry(self.num_envs, scratch), tensors)
        exact = self.joint.load_state_dict(state["joint"])
        if not exact:  # all games have begun anew
            self._take_seats(torch.ones(self.num_envs, dtype=torch.bool))
        return exact

    def _begin(self, env: int) -> dict[str, Any] | None:
        """Choose the next game of an environment, just before it begins."""
        game = self.pool.next_game(env)
        self._next[env], self._next_seats[env] = game.opponent, (game.options or {}).get("seat", 1)
        return game.options

    def _take_seats(self, fresh: Tensor) -> None:
        """Seat the opponents of games [E] that have just begun, who remember nothing of them."""
        rows: dict[str, list[int]] = {}
        for env in fresh.nonzero().flatten().tolist():
            self._now[env], self._seats[env] = self._next[env], self._next_seats[env]
            rows.setdefault(self._now[env], []).append(env)
        for name, envs in rows.items():
            blank = self.pool.players[name].init_carry(self.num_envs, self._stream.generator)
            kept = self._carries.get(name)
            where = torch.tensor(envs)
            self._carries[name] = blank if kept is None else tree_put(kept, where, tree_rows(blank, where))
        self._carries = {name: carry for name, carry in self._carries.items() if name in self._now}

    def _answers(self, other_obs: Tensor, own: Tensor, active: Tensor) -> Tensor:
        """Let every opponent decide for those of its games that are active [E], and then see the player's action.

        Its views [E, *O2], the player's actions [E, A] -> [E, A2], 0 elsewhere.
        """
        assert self.spec.other is not None
        answers = torch.zeros(self.num_envs, self.spec.other.action_dim)
        envs = active.nonzero().flatten().tolist()
        for name in dict.fromkeys(self._now[env] for env in envs):
            where = torch.tensor([env for env in envs if self._now[env] == name])
            carry = self._carries[name]
            player, view = self.pool.players[name], other_obs[where]
            action, then = player.act(tree_rows(carry, where), view, self._stream.generator)
            answers[where] = action.to(answers)
            then = player.watch(then, view, own[where])
            self._carries[name] = tree_put(carry, where, then)
        return answers


Envs: TypeAlias = VecEnv | Match
"""What an agent acts in."""
