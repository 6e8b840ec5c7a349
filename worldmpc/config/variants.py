"""Which parts of TD-MPC2 and its relatives go together, and the discounts of auxiliary values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from worldmpc.config.base import ConfigError
from worldmpc.config.readers import LATENT

if TYPE_CHECKING:
    from worldmpc.config.run import RunConfig
    from worldmpc.config.sections import MultiGammaConfig

STATE_VALUES_SUFFICE = ("kl_to_planner", "bc")
"""Objectives of the policy that need no value of an action."""
_WITHOUT_PLANS = ("max_q", "max_q+bc", "awac")
MOST_GAMMAS = 6


def uses_plans(config: RunConfig) -> bool:
    """Return whether the policy learns from plans in the replay."""
    return config.policy.objective not in _WITHOUT_PLANS


def check_variant(config: RunConfig) -> None:
    """Check that objective, value, target and planner of TD-MPC2 fit together.

    Raises:
        ConfigError: they do not; the message says what would.
    """
    if config.planner.uncertainty_coef:
        _check_uncertainty(config)
    if config.agent not in LATENT:
        return
    objective, planner = config.policy.objective, config.planner
    if config.model.value == "v" and objective not in STATE_VALUES_SUFFICE:
        raise ConfigError(
            f"model.value: policy.objective={objective} needs values of actions, which model.value=v has not; use model.value=q, or "
            f"policy.objective={' or '.join(STATE_VALUES_SUFFICE)}"
        )
    if uses_plans(config) and planner.name == "mcts" and objective != "kl_to_planner":
        raise ConfigError(f"planner.name: mcts leaves visit counts, from which policy.objective=kl_to_planner can learn, not {objective}")
    _check_reanalyze(config)
    if config.model.num_dynamics > 1 and planner.name == "mcts":
        raise ConfigError("model.num_dynamics: mcts imagines with one dynamics network; use num_dynamics=1, or another planner")
    if config.value.target == "model" and config.multi_gamma.enabled and config.multi_gamma.bootstrap == "primary":
        raise ConfigError(
            "multi_gamma.bootstrap: primary takes the bootstrap of replayed steps, which value.target=model has not; use self"
        )
    auxiliary_gammas(config.multi_gamma)


def _check_uncertainty(config: RunConfig) -> None:
    """Check that there are several dynamics that can disagree, and a planner that asks them all."""
    several = "model.num_dynamics=2 or more" if config.agent in LATENT else "dynamics=ensemble with agent=pets or mbmpc"
    if (config.model.num_dynamics == 1) if config.agent in LATENT else (config.dynamics.name != "ensemble"):
        raise ConfigError(f"planner.uncertainty_coef: one dynamics model has no spread; use {several}, or uncertainty_coef=0")
    if config.planner.name == "mcts":
        raise ConfigError("planner.uncertainty_coef: mcts does not look at the spread; use uncertainty_coef=0, or another planner")


def _check_reanalyze(config: RunConfig) -> None:
    reanalyze = config.reanalyze
    if not reanalyze.interval:
        return
    if not uses_plans(config):
        raise ConfigError(
            f"reanalyze.interval: policy.objective={config.policy.objective} uses no stored plan that could be replaced; use interval=0, "
            "or policy.objective=kl_to_planner, max_q+planner_prior, max_q+weighted_prior or bc"
        )
    if reanalyze.batch_size > config.loss.batch_size:
        raise ConfigError(f"reanalyze.batch_size: expected at most loss.batch_size ({config.loss.batch_size}), got {reanalyze.batch_size}")
    if reanalyze.log_std_max <= reanalyze.log_std_min:
        raise ConfigError(f"reanalyze.log_std_max: expected more than log_std_min ({reanalyze.log_std_min}), got {reanalyze.log_std_max}")


def auxiliary_gammas(config: MultiGammaConfig, primary: float | None = None) -> tuple[float, ...]:
    """Return the discounts of the auxiliary heads, which are all but the first; none where the feature is off.

    Args:
        config: the section.
        primary: the task's discount, which the first one must be within 1e-6; None: not known yet.

    Raises:
        ConfigError: no discounts though enabled, too many, one outside (0, 1), an auxiliary one twice, or another first one.
    """
    if not config.enabled:
        return ()
    gammas = config.gammas
    if not gammas:
        raise ConfigError("multi_gamma.gammas: empty although enabled; use multi_gamma.gammas=[primary,0.97,0.995], or enabled=false")
    if len(gammas) > MOST_GAMMAS:
        raise ConfigError(f"multi_gamma.gammas: expected at most {MOST_GAMMAS} discounts, got {len(gammas)}")
    first, rest = gammas[0], gammas[1:]
    for gamma in gammas:
        if gamma != "primary" and not 0 < gamma < 1:
            raise ConfigError(f"multi_gamma.gammas: expected discounts in (0, 1), got {gamma:g}")
    if "primary" in rest and first != "primary":
        raise ConfigError(f"multi_gamma.gammas: primary, the task's own discount, must be the first one, got {list(gammas)}")
    if "primary" in rest or len({f"{gamma:g}" for gamma in rest}) < len(rest):
        raise ConfigError(f"multi_gamma.gammas: expected different auxiliary discounts, got {list(gammas)}")
    if primary is not None and first != "primary" and abs(first - primary) > 1e-6:
        raise ConfigError(
            f"multi_gamma.gammas: the first discount must be the task's, {primary:.10g}, got {first:.10g}; write primary in its place"
        )
    return tuple(float(gamma) for gamma in rest)


def auxiliary_warning(config: MultiGammaConfig) -> str | None:
    """Return what somebody must know whose settings of auxiliary values are without effect, else None."""
    if not config.enabled:
        changed = [f"multi_gamma.{item.name}" for item in dataclasses.fields(config) if getattr(config, item.name) != item.default]
        return f"nothing reads {', '.join(changed)} without multi_gamma.enabled=true" if changed else None
    if len(config.gammas) != 1:
        return None
    return "multi_gamma.gammas holds the task's own discount alone, so that this is the run without auxiliary values"
