"""Steps environments with a policy and packs what happens into a rollout."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.config import ConfigError
from worldmpc.data.rollout import Experience
from worldmpc.envs.vector import VecEnv
from worldmpc.noise import NoiseSpec, NoiseStream
from worldmpc.training.episodes import EpisodeTally
from worldmpc.types import Transition

Policy = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Any]]
"""``policy(obs [B, *O], state, action=None) -> action [B, A], log_prob [B], entropy [B], value [B], anything``, such as
:class:`worldmpc.models.actor_critic.ActorCritic`. One with a parameter ``eps`` gets standard normal noise [B, A] to sample with; one
without samples by itself. Policies have no memory: ``state`` is None, the fifth result is not used."""


class RolloutCollector:
    """Fills a rollout with a policy's own steps; episodes go on from one rollout to the next.

    Args:
        vecenv: environments; reset before the first step unless that has been done.
        policy: acts.
        experience: where steps go.
        device: where the policy is.
        seed: of the noise that it samples with.

    Raises:
        ConfigError: the rollout is for another number of environments, or other observations or actions.
    """

    def __init__(
        self, vecenv: VecEnv, policy: Policy, experience: Experience, device: torch.device | str = "cpu", *, seed: int = 1
    ) -> None:
        spec, expected = vecenv.spec, (experience.num_envs, tuple(experience.obs.shape[2:]), experience.action.shape[2])
        if (vecenv.num_envs, spec.obs_shape, spec.action_dim) != expected:
            raise ConfigError(
                f"experience: made for (environments, observations, actions) {expected}, "
                f"{spec.name} has {(vecenv.num_envs, spec.obs_shape, spec.action_dim)}"
            )
        self.vecenv, self.policy, self.experience, self.device = vecenv, policy, experience, torch.device(device)
        self.agent_steps = 0
        """Decisions so far, all environments together."""
        self.stream = NoiseStream(seed, "collect", device=self.device)
        function = policy.forward if isinstance(policy, nn.Module) else policy
        self._samples_itself = "eps" not in inspect.signature(function).parameters
        self._tally = EpisodeTally(vecenv.num_envs)

    def collect(self, num_steps: int | None = None) -> tuple[dict[str, list[float]], int]:
        """Step until the rollout is full; one that is full already gives way to the next.

        Args:
            num_steps: stop after as many decisions, all environments together, where the rollout is not full before.

        Returns:
            ``episode_return``, ``episode_length`` (decisions) and, where the environments report it, ``episode_success`` of each
            episode that ended; and the number of decisions.

        Raises:
            EnvError: an environment failed.
        """
        if self.experience.ready_for_training:
            self.experience.clear()
        stats: dict[str, list[float]] = {"episode_return": [], "episode_length": []}
        begin = self.agent_steps
        while not self.experience.ready_for_training and (num_steps is None or self.agent_steps - begin < num_steps):
            self._step(stats)
        return stats, self.agent_steps - begin

    def state_dict(self) -> dict[str, Any]:
        """Return what collecting is resumed with, the environments' state included; the rollout is its owner's business."""
        return {
            "envs": self.vecenv.state_dict(),
            "stream": self.stream.state_dict(),
            "agent_steps": self.agent_steps,
            **self._tally.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; environments that cannot be resumed exactly begin fresh episodes, with a warning."""
        self.stream.load_state_dict(state["stream"])
        self.agent_steps = int(state["agent_steps"])
        self._tally.load_state_dict(state)
        if not self.vecenv.load_state_dict(state["envs"]):
            self.experience.cut()
            self._tally.reset()

    @torch.no_grad()
    def _step(self, stats: dict[str, list[float]]) -> None:
        try:
            obs = self.vecenv.obs
        except RuntimeError:  # nobody has reset them yet
            obs = self.vecenv.reset()
        noise = {} if self._samples_itself else self.stream.draw({"eps": NoiseSpec("normal", (len(obs), self.vecenv.spec.action_dim))})
        action, log_prob, _, value, _ = self.policy(obs.to(self.device), None, **noise)
        step = self.vecenv.step(action)
        extras = {"log_prob": log_prob, "value": value}
        self.experience.add(
            Transition(obs, action, step.reward, step.terminated, step.truncated, step.next_obs, step.valid, extras),
        )
        self.agent_steps += int(step.valid.sum())
        for episode in self._tally.note(step).values():
            stats["episode_return"].append(episode.ret)
            stats["episode_length"].append(float(episode.length))
            if not math.isnan(episode.success):
                stats.setdefault("episode_success", []).append(episode.success)
