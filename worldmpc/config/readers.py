"""Which agent reads which keys: one that somebody sets for an agent that never reads it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from worldmpc.config.base import ConfigError, lookup

if TYPE_CHECKING:
    from worldmpc.config.run import RunConfig

LATENT = ("tdmpc2", "tdmpc_square", "bmpc", "boom", "director")
"""TD-MPC2 and its relatives: one agent with other parts."""
PLANNING = (*LATENT, "mpc", "mbmpc", "pets")
"""Agents that plan."""
_FITTING = ("mbmpc", "pets")
_PER_DECISION = (*LATENT, "dqn", "sac", "td3")
_REPLAYING = (*_PER_DECISION, *_FITTING)
_LEARNING = (*_REPLAYING, "ppo")

READERS: dict[str, tuple[str, ...]] = {
    "model": LATENT,
    "planner": PLANNING,
    "dynamics": _FITTING,
    "dynamics.name": ("mpc", *_FITTING),
    "mbmpc": _FITTING,
    "dqn": ("dqn",),
    "ppo": ("ppo",),
    "sac": ("sac",),
    "td3": ("td3",),
    "loss": LATENT,
    "loss.batch_size": _REPLAYING,
    "policy": LATENT,
    "value": LATENT,
    "reanalyze": LATENT,
    "multi_gamma": LATENT,
    "opponent_simulation": LATENT,
    **dict.fromkeys(("trainer", "goal_vae", "manager", "worker"), ("director",)),
    "optim": _LEARNING,
    "optim.enc_lr_scale": LATENT,
    "optim.grad_clip_norm": _REPLAYING,
    "replay": _REPLAYING,
    "train.utd": _PER_DECISION,
    "train.reset_every": LATENT,
    "train.seed_decisions": _REPLAYING,
    "train.max_loss": _LEARNING,
}
"""Section or key -> the agents that read it; a key's own entry comes before its section's, and what is in neither is for all."""


CHOSEN: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "value.n_step": ("value.target", ("n_step",)),
    "value.lam": ("value.target", ("td_lambda",)),
    "value.td_horizon": ("value.target", ("model",)),
    "policy.prior_coef": ("policy.objective", ("max_q+planner_prior", "max_q+weighted_prior", "max_q+bc")),
    "policy.scale_threshold": ("policy.objective", ("max_q+planner_prior", "max_q+weighted_prior")),
    "policy.awac_temperature": ("policy.objective", ("awac",)),
    **dict.fromkeys(("goal_vae.tau_start", "goal_vae.tau_end", "goal_vae.anneal_steps"), ("goal_vae.kind", ("gumbel",))),
    "goal_vae.kl_target": ("goal_vae.beta", (None,)),
    "manager.ent_target": ("manager.ent_coef", (None,)),
    **dict.fromkeys(("worker.goals", "worker.gamma", "worker.num_q", "worker.task_range"), ("worker.mode", ("goal_conditioned",))),
    "opponent_simulation.cvar_share": ("opponent_simulation.aggregate", ("cvar",)),
    "planner.temperature": ("planner.name", ("mppi", "policy_guided")),
    "planner.momentum": ("planner.name", ("cem", "icem")),
    "planner.noise_exponent": ("planner.name", ("icem",)),
    "planner.keep_elites": ("planner.name", ("icem",)),
    "planner.sample_decay": ("planner.name", ("icem",)),
    "planner.pi_noise": ("planner.name", ("policy_guided",)),
    "planner.prior_steps": ("planner.prior", ("learned",)),
    **dict.fromkeys(("planner.beta", "planner.guidance"), ("planner.name", ("diffusion",))),
    **dict.fromkeys(
        [f"planner.{key}" for key in ("num_simulations", "num_playouts", "c_puct", "root_noise", "dirichlet_alpha")],
        ("planner.name", ("mcts",)),
    ),
}
"""Key -> the key that chooses a slot or a planner, and the choices that read the first one."""
_REANALYZE = ("reanalyze.batch_size", "reanalyze.log_std_min", "reanalyze.log_std_max")


def check_readers(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Check that a configuration's agent, as its slots are chosen, reads the keys that somebody set, nested as in a configuration.

    Raises:
        ConfigError: it never reads one of them; the message says who does, or what takes its place.
    """
    agent, names = config.agent, list(_names(config, given))
    for name in names:
        readers = READERS.get(name, READERS.get(name.partition(".")[0], (agent,)))
        if agent not in readers:
            raise ConfigError(f"{name}: agent={agent} never reads it; leave it out, or use agent={_choice(readers)}")
        if agent == "director" and config.trainer == "online" and name.startswith(("goal_vae.", "manager.", "worker.")):
            raise ConfigError(f"{name}: trainer=online never reads it; leave it out, or use trainer=director")
        if name in (*CHOSEN, *_REANALYZE) and lookup(config, name) != lookup(type(config)(), name):
            _check_choice(config, name)
    if "multi_gamma.gammas" in names and config.multi_gamma.gammas and not config.multi_gamma.enabled:
        raise ConfigError("multi_gamma.gammas: nothing learns these discounts; add multi_gamma.enabled=true, or leave them out")
    changed = [name for name in names if name.startswith("opponent_simulation.") and lookup(config, name) != lookup(type(config)(), name)]
    unread = [name for name in changed if name != "opponent_simulation.enabled"]
    if unread and not config.opponent_simulation.enabled:
        raise ConfigError(f"{unread[0]}: nobody is imagined; add opponent_simulation.enabled=true, or leave it out")
    if "ppo.gamma" in names and config.env.discount is not None:
        raise ConfigError(f"ppo.gamma: env.discount={config.env.discount:g} takes its place; leave one of them out")


def planner_reads(planner: Mapping[str, Any], key: str) -> bool:
    """Return whether a planner, of which ``name`` and ``prior`` are given, reads a key of its section."""
    if f"planner.{key}" not in CHOSEN:
        return True
    choice, choices = CHOSEN[f"planner.{key}"]
    return planner[choice.removeprefix("planner.")] in choices


def _check_choice(config: RunConfig, name: str) -> None:
    """Check that the slot which a key belongs to is chosen such that it reads it."""
    if name in _REANALYZE:
        if not config.reanalyze.interval:
            raise ConfigError(f"{name}: nothing is planned anew with reanalyze.interval=0; leave it out, or use reanalyze.interval=10")
        return
    choice, choices = CHOSEN[name]
    if (now := lookup(config, choice)) not in choices:
        raise ConfigError(f"{name}: {choice}={now} never reads it; leave it out, or use {choice}={_choice(choices)}")


def _names(config: RunConfig, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield dotted keys; a section given as text, ``planner="cem"``, is its name."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in value)
        else:
            yield f"{key}.name" if dataclasses.is_dataclass(getattr(config, key)) else key


def _choice(names: tuple[str | None, ...]) -> str:
    words = ["null" if name is None else name for name in names]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
