"""What an agent with goals wants, kept while it plays: for looking at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worldmpc.agents.director import Director
from worldmpc.report.goals import GoalStep
from worldmpc.report.video import side_by_side
from worldmpc.types import ActOutput, EnvStep


class GoalDiary:
    """Notes of the first environment's episode of an agent that follows goals.

    Args:
        agent: whose latents and goals these are.
    """

    def __init__(self, agent: Director) -> None:
        self._agent = agent
        self.steps: list[GoalStep] = []
        self._latents: list[Tensor] = []  # [Z] acted on
        self._goals: list[Tensor] = []  # [Z]

    @torch.no_grad()
    def note(self, obs: Tensor, output: ActOutput, step: EnvStep) -> None:
        """Take a decision: what it was taken on [E, O], the answer, and what followed."""
        agent, carry = self._agent, output.carry
        z, reached = (agent.flat.model.encode(part[:1].to(agent.device))[0] for part in (obs, step.next_obs))
        similarity = agent.hierarchy.similarity(reached, carry.goal[0]).item()
        begins = int(carry.left[0]) == agent.setter.interval - 1
        self.steps.append(GoalStep(len(self.steps), begins, similarity, float(step.reward[0])))
        self._latents.append(z)
        self._goals.append(carry.goal[0])

    def beside(self, frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return every frame of the episode beside that whose latent is most similar to the goal at the time, with captions.

        [height, width, 3] uint8 each -> [height + :data:`~worldmpc.report.video.CAPTION`, 2 width, 3]; the right caption says how similar.
        """
        latents, found = torch.stack(self._latents), []
        for frame, goal in zip(frames, self._goals, strict=True):
            similarities = self._agent.hierarchy.similarity(latents, goal.expand_as(latents))
            index = int(similarities.argmax())
            found.append(side_by_side({"now": frame, f"goal, near frame {index}: {float(similarities[index]):.2f}": frames[index]}))
        return found
