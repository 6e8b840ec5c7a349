"""Which task comes next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import Task, VecEnv, make_envs
from worldmpc.noise import derive_seed

Strategy = Literal["fixed", "round_robin", "weighted", "progress"]
FAST, SLOW = 0.3, 0.05
"""Rates of the running means whose difference is a task's progress."""
FLOOR = 0.2
"""Share of choices among all tasks alike, so that none is given up."""


@dataclass(frozen=True)
class CurriculumTask:
    """One task: an environment and how it is made."""

    name: str
    env: Task
    """Name of a task, or a function that makes its environment."""
    config: EnvConfig = field(default_factory=EnvConfig)

    def env_cfg(self) -> EnvConfig:
        """Return how its environments are made."""
        return self.config

    def make_envs(self, seed: int, num_envs: int | None = None) -> VecEnv:
        """Make its environments, or another number of them.

        Raises:
            ConfigError: see :func:`worldmpc.envs.make_envs`.
        """
        config = self.config
        if num_envs is not None:
            config = dataclasses.replace(config, num_envs=num_envs, workers="sync", num_workers=None)
        return make_envs(self.env, config, seed=seed)


class Curriculum:
    """Chooses the next task.

    Args:
        tasks: to choose from, with observations and actions of the same dimensions; names of tasks are short for these.
        strategy: ``fixed``: the first one; ``round_robin``: one after the other; ``weighted``: at random by ``weights``;
            ``progress``: at random by how fast the scores of a task change, up or down (Kanitscheider et al. 2021, "Multi-task
            curriculum learning in a complex, visual, hard-exploration domain"), and among all alike now and then.
        weights: of ``weighted``, in the order of tasks; None: all alike.
        seed: of its choices.
        config: how the environments of tasks that are given as names are made.

    Raises:
        ConfigError: no task, two of the same name, an unknown strategy, or weights that do not fit.
    """

    def __init__(
        self,
        tasks: Sequence[CurriculumTask | str] | CurriculumTask | str,
        strategy: Strategy = "fixed",
        *,
        weights: Sequence[float] | None = None,
        seed: int = 1,
        config: EnvConfig | None = None,
    ) -> None:
        given = [tasks] if isinstance(tasks, str | CurriculumTask) else list(tasks)
        config = config or EnvConfig()
        self.tasks = [CurriculumTask(task, task, config) if isinstance(task, str) else task for task in given]
        self.names = [task.name for task in self.tasks]
        choices: dict[str, Callable[[], int]] = {
            "fixed": lambda: 0,
            "round_robin": lambda: self.chosen % len(self.tasks),
            "weighted": lambda: self._draw(self.weights),
            "progress": lambda: self._draw(self.probabilities()),
        }
        if strategy not in choices:
            raise ConfigError(f"curriculum.strategy: expected one of {', '.join(choices)}, got {strategy!r}")
        if not self.tasks or len(set(self.names)) < len(self.names):
            raise ConfigError(f"curriculum.tasks: expected tasks with different names, got {self.names}")
        weights = [1.0] * len(self.tasks) if not weights else list(weights)
        if len(weights) != len(self.tasks) or not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
            raise ConfigError(f"curriculum.weights: expected {len(self.tasks)} finite numbers of 0 or more, not all 0, got {weights}")
        self.weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        self.chosen = 0
        """How often a task was chosen."""
        self._choose = choices[strategy]
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "curriculum"))
        self._means = torch.full((len(self.tasks), 2), torch.nan, dtype=torch.float64)  # fast and slow
        self._bounds = torch.tensor([[torch.inf, -torch.inf]] * len(self.tasks), dtype=torch.float64)  # lowest and highest score

    def get_task(self) -> CurriculumTask:
        """Choose the next task."""
        task = self.tasks[self._choose()]
        self.chosen += 1
        return task

    def report(self, name: str, score: float) -> None:
        """Take note of a score that was reached on a task.

        Raises:
            ConfigError: no such task.
        """
        if name not in self.names:
            raise ConfigError(f"curriculum: no task '{name}'; it has {', '.join(self.names)}")
        index = self.names.index(name)
        if bool(self._means[index].isnan().any()):
            self._means[index] = score
        self._means[index] += torch.tensor([FAST, SLOW], dtype=torch.float64) * (score - self._means[index])
        low, high = self._bounds[index].tolist()
        self._bounds[index] = torch.tensor([min(low, score), max(high, score)], dtype=torch.float64)

    def probabilities(self) -> torch.Tensor:
        """Return the probabilities of ``progress`` [tasks]: tasks without a score first, then by their change relative to their range."""
        unknown = self._means[:, 0].isnan()
        if bool(unknown.any()):
            return unknown.double() / unknown.sum()
        span = (self._bounds[:, 1] - self._bounds[:, 0]).clamp(min=1e-12)
        progress = (self._means[:, 0] - self._means[:, 1]).abs() / span
        even = torch.full_like(progress, 1 / len(progress))
        return even if float(progress.sum()) == 0 else FLOOR * even + (1 - FLOOR) * progress / progress.sum()

    def state_dict(self) -> dict[str, Any]:
        """Return what its choices depend on."""
        return {
            "names": self.names,
            "chosen": self.chosen,
            "means": self._means.clone(),
            "bounds": self._bounds.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it was saved with other tasks.
        """
        if list(state["names"]) != self.names:
            raise ConfigError(f"curriculum.tasks: the saved curriculum has {', '.join(state['names'])}, this one {', '.join(self.names)}")
        self.chosen = int(state["chosen"])
        self._means.copy_(state["means"])
        self._bounds.copy_(state["bounds"])
        self._generator.set_state(state["generator"])

    def _draw(self, probabilities: torch.Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
