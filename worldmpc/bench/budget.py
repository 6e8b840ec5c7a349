"""Sizes with which every planner imagines the same number of model steps, and a count of what it really imagines."""

from __future__ import annotations

import difflib
import functools
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.models.trajectory import UNGUIDED_STEPS
from worldmpc.noise import NoiseStream
from worldmpc.planners import make_planner
from worldmpc.planners.mcts import judges
from worldmpc.types import Model, Planner

PLANNERS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("random_shooting", "cem", "icem", "mppi", "policy_guided", "diffusion", "mcts")},
    "cem+gradient": {"name": "cem", "gradient_steps": 5},
    "diffusion+prior": {"name": "diffusion", "prior": "learned"},
    "diffusion+guidance": {"name": "diffusion", "prior": "learned", "guidance": 1.0},
}
"""What can be compared, and the values of ``planner`` that make it."""

DECIDED = (
    ("name", "mpc", "prior", "guidance", "gradient_steps")
    + ("horizon", "iterations", "extra_iterations", "num_samples", "num_elites", "num_pi_trajs", "num_simulations", "num_playouts")
)  # fmt: skip
"""Keys of ``planner`` that :func:`budgeted` decides."""

MIN_CANDIDATES, MIN_SIMULATIONS = 16, 10
"""Fewest sequences of an iteration, and simulations of a tree search."""
TOLERANCE = 0.05
"""Largest relative difference from the budget."""
PROPOSED = 24 / 512
"""Share of candidates that a policy prior proposes, as TD-MPC2 published it."""


class Traits(NamedTuple):
    """What of a model decides how much a plan imagines."""

    proposes: bool = False
    """It has a policy prior."""
    judges: bool = False
    """It has action probabilities and a value, so that tree search needs no playouts."""
    particles: int = 1
    """Imagined copies of every candidate."""


PLAIN = Traits()


def traits_of(model: Any) -> Traits:
    """Return what a model offers planners."""
    proposes = getattr(model, "policy", True) is not None
    return Traits(proposes, judges(model), getattr(model, "num_particles", 1))


def model_evaluations(config: PlannerConfig, traits: Traits = PLAIN) -> int:
    """Return the model steps that one plan of one environment imagines; those of a gradient count once, without its backward pass."""
    planner: Any = make_planner(config, 1, 1.0, 2, discrete=config.name == "mcts")
    if config.name == "mcts":
        return planner.model_evaluations(traits.judges, traits.particles)
    if config.name == "diffusion":
        guided = max(planner.iterations - UNGUIDED_STEPS, 0) if config.guidance else 0
        sequences, proposals = (planner.iterations + guided) * config.num_samples, 0 if planner.learned else config.num_pi_trajs
    else:
        sequences = sum(planner.sizes) + (config.gradient_steps + 1 if config.gradient_steps else 0)
        proposals = planner.num_pi
    return sequences * config.horizon * traits.particles + proposals * (config.horizon - 1)


def budgeted(name: str, budget: int, horizon: int, traits: Traits = PLAIN, iterations: int = 6) -> dict[str, Any]:
    """Return the values of ``planner`` with which a plan imagines ``budget`` model steps per environment, give or take 5 %.

    Args:
        name: one of :data:`PLANNERS`.
        budget: model steps.
        horizon: decisions.
        traits: of the model; where it proposes, 24 of 512 candidates are proposals, as published.
        iterations: of planners that refine; fewer where they would have less than :data:`MIN_CANDIDATES` candidates each.

    Raises:
        ConfigError: an unknown planner, or too few evaluations for it.
    """
    check_name(name)
    fixed = {
        "mpc": True,
        "horizon": horizon,
        "extra_iterations": 0,
        "num_playouts": 1,
        "gradient_steps": 0,
        "prior": "none",
        "guidance": 0.0,
        **PLANNERS[name],
    }
    tree, once = name == "mcts", name in ("mcts", "random_shooting", "policy_guided")

    def sized(size: int, rounds: int) -> dict[str, Any]:
        if tree:
            return fixed | {"num_simulations": size}
        proposals = size if name == "policy_guided" else max(round(PROPOSED * size), 1) if traits.proposes else 0
        elites = max(size // 8, 4)  # as published, and no fewer than a spread can be told from
        return fixed | {"iterations": rounds, "num_samples": size, "num_elites": elites, "num_pi_trajs": proposals}

    def cost(size: int, rounds: int) -> int:
        return model_evaluations(PlannerConfig(**sized(size, rounds)), traits)

    least = MIN_SIMULATIONS if tree else MIN_CANDIDATES
    for rounds in range(1 if once else iterations, 0, -1):
        if cost(least, rounds) > (1 + TOLERANCE) * budget:
            continue
        above = bisect_left(range(budget + 1), budget, lo=least, key=functools.partial(cost, rounds=rounds))
        error, size = min((abs(cost(size, rounds) - budget), size) for size in (max(above - 1, least), above))
        if error <= TOLERANCE * budget:
            return sized(size, rounds)
    raise ConfigError(
        f"evaluations: {budget} are too few for {name} at horizon {horizon}; use at least {cost(least, 1)}, or a shorter horizon"
    )


def check_name(name: str) -> None:
    """Check that a planner can be compared.

    Raises:
        ConfigError: it is unknown.
    """
    if name not in PLANNERS:
        near = difflib.get_close_matches(name, PLANNERS, n=1)
        raise ConfigError(
            f"planners: unknown planner '{name}'; {f'did you mean {near[0]}?' if near else 'use some of ' + ', '.join(PLANNERS)}"
        )


class Counting:
    """A model that counts the steps it is asked to imagine; it offers what the model offers, and nothing else."""

    ROWS: Mapping[str, Callable[..., int]] = {
        "step": lambda z, action: action.shape[:-1].numel(),
        "next": lambda z, action: action.shape[:-1].numel(),
        "rollout": lambda z, actions: actions.shape[:-1].numel(),
        "fast_returns": lambda z, actions, *_: actions.shape[:-1].numel(),
        "fast_proposals": lambda z, eps: eps[1:].shape[:-1].numel(),  # the last action needs no step
    }

    def __init__(self, model: Any) -> None:
        self.model, self.steps = model, 0

    def __getattr__(self, name: str) -> Any:
        found, rows = getattr(self.model, name), self.ROWS.get(name)
        if rows is None:
            return found

        def counted(*arguments: Any) -> Any:
            result = found(*arguments)
            if result is not None:  # else it could not, and other methods are asked
                self.steps += rows(*arguments)
            return result

        return counted


@torch.no_grad()
def count(planner: Planner, model: Model, obs: Tensor, seed: int = 1) -> float:
    """Plan once from observations [E, O], and return the model steps that were imagined per environment."""
    counting: Any = Counting(model)
    z = counting.encode(obs)
    noise = NoiseStream(seed, "count", device=z.device).draw(planner.noise_specs(len(z)))
    planner.plan(counting, z, planner.init(len(z), z.device), noise, False)
    return counting.steps / len(z)
