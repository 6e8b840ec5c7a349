"""Scores of a policy on a suite of environments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.config import ConfigError, RunConfig
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.noise import derive_seed
from worldmpc.training.curriculum import CurriculumTask
from worldmpc.training.evaluator import EvalResult, evaluate
from worldmpc.training.policy_store import PolicyRecord, PolicyStore
from worldmpc.types import ActOutput, EnvSpec, Mode

MAX_ENVS = 16
"""Most environments that an evaluation steps side by side, where episodes have an end."""


class PolicyEvaluator:
    """Plays whole episodes of every environment of a suite with the actions that ``policy(obs, None)`` returns.

    Those are the most likely ones of an :class:`ActorCritic`. A policy that samples by itself does so here as well, with random
    numbers that depend on seed and evaluation alone.

    Args:
        suite: category -> tasks, or names of tasks; ``{"easy": ["gym/CartPole-v1"], "hard": ["gym/Acrobot-v1"]}``.
        policy_store: loads policies that are given by name.
        device: where policies are.
        episodes: of each environment.
        seed: of the episodes; neither depends on training nor changes it.

    Raises:
        ConfigError: no mapping of lists of tasks, an empty one, or two tasks of the same name in a category.
    """

    def __init__(
        self,
        suite: Mapping[str, Sequence[CurriculumTask | str]],
        policy_store: PolicyStore | None = None,
        device: torch.device | str = "cpu",
        *,
        episodes: int = 10,
        seed: int = 1,
    ) -> None:
        if not isinstance(suite, Mapping):
            raise ConfigError(f"suite: expected categories with lists of tasks, as in {{'easy': ['gym/CartPole-v1']}}, got {suite!r}")
        self.suite = {category: _tasks(category, tasks) for category, tasks in suite.items()}
        if not self.suite or episodes < 1:
            raise ConfigError(f"suite: expected at least one category and one episode, got {len(self.suite)} and {episodes}")
        self.policy_store, self.device, self.episodes, self.seed = policy_store, torch.device(device), episodes, seed

    def evaluate(self, policy: nn.Module | PolicyRecord | str | Path, index: int = 0) -> dict[str, float]:
        """Return mean returns: ``<category>/<task>``, and ``<category>/score``, their mean over the category's tasks.

        Args:
            policy: the policy, its record, or where the store has it.
            index: another number gives other episodes.

        Raises:
            EnvError: an environment failed.
            ConfigError: a policy by name without a store, or see :meth:`play`.
        """
        module = self._policy(policy)
        scores: dict[str, float] = {}
        for category, tasks in self.suite.items():
            means = [self.play(module, task, index).mean_return for task in tasks]
            scores |= {f"{category}/{task.name}": mean for task, mean in zip(tasks, means, strict=True)}
            scores[f"{category}/score"] = sum(means) / len(means)
        return scores

    def play(self, policy: nn.Module, task: CurriculumTask, index: int = 0) -> EvalResult:
        """Play the episodes of one task.

        Raises:
            EnvError: the environment failed.
            ConfigError: an :class:`ActorCritic` that was made for other observations or actions.
        """
        count, seed = min(self.episodes, MAX_ENVS), derive_seed(self.seed, "eval")
        envs = task.make_envs(seed, count)
        if envs.spec.episode_length is None and count < self.episodes:  # an episode may have no end: one per environment
            envs.close()
            envs = task.make_envs(seed, self.episodes)
        with envs, _random_numbers(derive_seed(self.seed, "eval", "policy", index), self.device):
            _check_fit(policy, envs.spec)
            actor: Any = _Actor(policy, envs.spec, self.device, self.seed)
            return evaluate(actor, envs, self.episodes, index=index)

    def _policy(self, policy: nn.Module | PolicyRecord | str | Path) -> nn.Module:
        if isinstance(policy, nn.Module):
            return policy
        if isinstance(policy, PolicyRecord):
            return policy.policy
        if self.policy_store is None:
            raise ConfigError(f"policy: give the evaluator a policy store to load {policy} from")
        return self.policy_store.policy(policy).policy


def _tasks(category: str, tasks: Sequence[CurriculumTask | str]) -> list[CurriculumTask]:
    if not isinstance(tasks, Sequence) or isinstance(tasks, str):
        raise ConfigError(f"suite.{category}: expected a list of tasks, got {tasks!r}; put it in brackets")
    made = [CurriculumTask(task, task) if isinstance(task, str) else task for task in tasks]
    names = [task.name for task in made]
    if not names or len(set(names)) < len(names) or "score" in names:
        raise ConfigError(f"suite.{category}: expected tasks with different names, none of them 'score', got {names}")
    return made


def _check_fit(policy: nn.Module, spec: EnvSpec) -> None:
    if not isinstance(policy, ActorCritic) or policy.architecture is None:
        return  # only the networks that are described can be compared
    made = policy.architecture
    expected = tuple(made["image"] or (made["obs_dim"],)), made["action_dim"], made["discrete"]
    found = spec.obs_shape, spec.action_dim, spec.discrete
    if found != expected:
        kinds = "(observations, actions, discrete)"
        raise ConfigError(f"suite: {spec.name} has {kinds} {found}, the policy was made for {expected}; leave this task out")


@contextlib.contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Give torch's own generators, which nothing here uses, a seed for a while: for policies that sample by themselves."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class _Actor:
    """A policy as an agent that cannot learn."""

    modes: tuple[Mode, ...] = ("eval",)

    def __init__(self, policy: nn.Module, spec: EnvSpec, device: torch.device, seed: int) -> None:
        self.model, self.spec, self.device, self.config = policy, spec, device, RunConfig(seed=seed)

    def init_carry(self, num_envs: int) -> tuple[()]:
        return ()

    @torch.no_grad()
    def act(self, carry: Any, obs: Tensor, mode: Mode) -> ActOutput:
        return ActOutput(self.model(obs.to(self.device), None)[0], carry, {}, {})

    def reset_eval_noise(self, *index: int) -> None:
        pass
