"""Refinement of a plan by the gradient of its return through the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from worldmpc.planners.rules import WORST

BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's published constants."""


@torch.no_grad()  # the gradient below is functional, and none else is wanted
def ascend(score: Callable[[Tensor], Tensor], actions: Tensor, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Improve action sequences by projected gradient ascent with Adam's step sizes (Kingma and Ba 2015), and return the best seen.

    Adam makes the size of a step independent of the scale of rewards. The start is among what is compared, so the result is never
    worse than it. The gradient is taken for the actions alone, within ``torch.vmap`` and ``torch.compile`` as well.

    Args:
        score: differentiable returns of sequences, [H, E, A] -> [E], each environment's of its own alone.
        actions: [H, E, A] start, in [-1, 1].
        steps: gradient steps.
        lr: size of a step, in units of actions.

    Returns:
        Sequences [H, E, A] in [-1, 1] and their returns [E], which are ``WORST`` where none was finite.
    """

    def total(actions: Tensor) -> tuple[Tensor, Tensor]:
        values = score(actions)
        return values.sum(), values

    slope = torch.func.grad_and_value(total, has_aux=True)
    best, best_value = actions, torch.full_like(actions[0, :, 0], WORST)
    first, second = torch.zeros_like(actions), torch.zeros_like(actions)
    for step in range(1, steps + 1):
        gradient, (_, values) = slope(actions)
        best, best_value = better(actions, values, best, best_value)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        first, second = gradient.lerp(first, BETAS[0]), gradient.square().lerp(second, BETAS[1])
        scale = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
        actions = (actions + lr * (first / (1 - BETAS[0] ** step)) / scale).clamp(-1, 1)
    return better(actions, score(actions), best, best_value)


def better(actions: Tensor, values: Tensor, best: Tensor, best_value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the better of two sequences [H, E, A] and returns [E] for each environment; the second where the first's is not finite."""
    improved = values.isfinite() & (values > best_value)
    return actions.where(improved[None, :, None], best), values.where(improved, best_value)
