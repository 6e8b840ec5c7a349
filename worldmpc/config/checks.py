"""Which values a configuration may have, as far as that can be said without an environment."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from worldmpc.config.base import ConfigError, lookup
from worldmpc.config.hierarchy import check_director
from worldmpc.config.opponents import check_opponents
from worldmpc.config.presets import PRESETS
from worldmpc.config.readers import LATENT
from worldmpc.config.sections import MODEL_SIZES, resolve_model
from worldmpc.config.variants import check_variant

if TYPE_CHECKING:
    from worldmpc.config.run import RunConfig

_AT_LEAST_1 = (
    "env.num_envs, planner.horizon, planner.iterations, planner.prior_steps, planner.num_samples, planner.num_elites, "
    "planner.num_simulations, planner.num_playouts, planner.sample_decay, loss.batch_size, steps, eval_freq, replay.capacity, "
    "eval.episodes, checkpoint.every, log.every, checkpoint.keep, dynamics.members, dynamics.particles, dynamics.batch_size, "
    "dynamics.max_epochs, dynamics.patience, mbmpc.fit_every, dqn.n_step, dqn.target_every, ppo.rollout_steps, ppo.minibatch_size, "
    "ppo.update_epochs, td3.policy_delay, model.num_dynamics, value.n_step, value.td_horizon, reanalyze.batch_size, "
    "multi_gamma.log_num_examples, goal_vae.n_latents, goal_vae.anneal_steps, manager.goal_interval, manager.imagined_goals, "
    "manager.batch_size, manager.update_every, worker.num_q, opponents.snapshot_every, opponents.snapshots, "
    "opponents.win_bonus_games, opponent_simulation.samples, opponent_simulation.buffer, opponent_simulation.batch_size"
)
_AT_LEAST_1_OR_NULL = (
    "loss.horizon, train.reset_every, goal_vae.hidden_dim, manager.hidden_dim, worker.batch_size, "
    "env.action_repeat, env.episode_length, env.num_workers"
)
_AT_LEAST_0 = (
    "planner.num_pi_trajs, planner.extra_iterations, planner.temperature, planner.noise_exponent, planner.pi_noise, planner.beta, "
    "planner.guidance, planner.gradient_steps, planner.c_puct, optim.warmup_updates, threads, seed, loss.consistency_coef, "
    "loss.reward_coef, loss.value_coef, loss.termination_coef, loss.entropy_coef, dynamics.weight_decay, mbmpc.gradient_steps, "
    "ppo.vf_coef, ppo.ent_coef, td3.exploration_noise, td3.target_noise, td3.noise_clip, planner.uncertainty_coef, "
    "manager.intrinsic_coef, worker.task_weight, "
    "opponents.win_bonus, opponents.win_bonus_final, "
    "policy.scale_threshold, reanalyze.interval, multi_gamma.loss_weight, multi_gamma.hidden_layers"
)
_POSITIVE = (
    "optim.lr, optim.grad_clip_norm, train.utd, train.max_loss, planner.min_std, planner.gradient_lr, planner.dirichlet_alpha, "
    "goal_vae.tau_start, goal_vae.tau_end, goal_vae.lr, manager.lr, worker.task_range, "
    "dynamics.lr, mbmpc.awr_temperature, policy.awac_temperature, ppo.clip_coef, ppo.vf_clip_coef, ppo.max_grad_norm, sac.alpha_init"
)
_SHARES = (
    "planner.uniform_mix, planner.keep_elites, planner.root_noise, dqn.epsilon_start, dqn.epsilon_end, dqn.epsilon_fraction, "
    "ppo.gae_lambda, value.lam, manager.lam, manager.ent_target, goal_vae.kl_target, opponents.win_discount"
)
_SHARES_BELOW_1 = (
    "goal_vae.unimix, manager.gamma, worker.gamma, planner.momentum, dynamics.holdout, ppo.gamma, model.dropout, "
    "opponent_simulation.least_belief"
)
_RATES = (
    "manager.tau, loss.rho, loss.tau, optim.enc_lr_scale, optim.final_lr_scale, mbmpc.tau, sac.tau, td3.tau, "
    "opponent_simulation.cvar_share, opponent_simulation.belief_decay, opponent_simulation.lr_scale"
)
_HIDDEN = "opponent_simulation.hidden, dynamics.hidden, mbmpc.hidden, dqn.hidden, ppo.hidden, sac.hidden, td3.hidden"

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (_AT_LEAST_1, lambda value: value >= 1, "at least 1"),
    (_AT_LEAST_1_OR_NULL, lambda value: value is None or value >= 1, "at least 1 or null"),
    (_AT_LEAST_0, lambda value: value >= 0, "0 or more"),
    (_POSITIVE, lambda value: value > 0, "more than 0"),
    (_SHARES, lambda value: 0 <= value <= 1, "in [0, 1]"),
    (_SHARES_BELOW_1, lambda value: 0 <= value < 1, "in [0, 1)"),
    (_RATES, lambda value: 0 < value <= 1, "in (0, 1]"),
    (_HIDDEN, lambda value: len(value) > 0 and min(value) >= 1, "at least one width, all of them at least 1, as in [256,256]"),
    ("seed", lambda value: value < 2**63, "less than 2**63"),
    ("multi_gamma.hidden_layers", lambda value: value <= 8, "at most 8"),
    ("threads", lambda value: value <= 4096, "at most 4096"),
    ("env.num_envs", lambda value: value <= 65_536, "at most 65536"),
    ("env.action_repeat", lambda value: (value or 0) <= 100_000, "at most 100000"),
    ("env.episode_length", lambda value: (value or 0) <= 10**9, f"at most {10**9}"),
    ("env.discount", lambda value: value is None or 0 <= value < 1, "in [0, 1), or null"),
    ("train.seed_decisions", lambda value: value is None or value >= 0, "0 or more, or null"),
    ("ppo.target_kl", lambda value: value is None or value > 0, "more than 0, or null"),
    ("policy.prior_coef", lambda value: value is None or value >= 0, "0 or more, or null"),
    ("label", lambda value: value is None or re.fullmatch(r"[A-Za-z0-9_.+-]+", value) is not None, "letters, digits and _ . + -"),
    ("goal_vae.beta", lambda value: value is None or value >= 0, "0 or more, or null"),
    ("manager.ent_coef", lambda value: value is None or value >= 0, "0 or more, or null"),
    ("worker.goal_weight", lambda value: value is None or value >= 0, "0 or more, or null"),
    ("sac.alpha", lambda value: value is None or value >= 0, "0 or more, or null"),
)


def validate(config: RunConfig) -> RunConfig:
    """Check every value that can be checked without an environment, and return the configuration.

    Raises:
        ConfigError: a value out of range, or two values that contradict each other.
    """
    presets = [*PRESETS, "tuned"]
    _require(config, config.preset in presets, "preset", f"one of {', '.join(presets)}")
    for name, value in _leaves(config):
        _require(config, not isinstance(value, float) or math.isfinite(value), name, "a finite number")
    for name in ("device", "replay.storage_device"):
        known = re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", lookup(config, name)) is not None
        _require(config, known, name, "auto, cpu, cuda, cuda:<index> or mps")
    for names, holds, expected in _RANGES:
        for name in names.split(", "):
            _require(config, holds(lookup(config, name)), name, expected)
    for check in (
        _check_env,
        check_opponents,
        _check_seeds,
        _check_optim,
        _check_planner,
        _check_model,
        _check_agent,
        check_variant,
        check_director,
    ):
        check(config)
    return config


def _require(config: RunConfig, condition: bool, name: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {lookup(config, name)!r}")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def _check_env(config: RunConfig) -> None:
    if config.env.num_workers is not None:
        _require(config, config.env.workers == "async", "env.num_workers", "null, as env.workers=sync has no worker processes")
        _require(config, config.env.num_workers <= config.env.num_envs, "env.num_workers", f"at most env.num_envs ({config.env.num_envs})")


def _check_seeds(config: RunConfig) -> None:
    if config.seeds is None:
        return
    distinct = len(set(config.seeds)) == len(config.seeds) > 0
    possible = distinct and all(0 <= seed < 2**63 for seed in config.seeds)
    _require(config, possible, "seeds", "different numbers from 0 to 2**63 - 1, as in [1,2,3]")
    _require(config, len(config.seeds) <= 64, "seeds", "at most 64 of them")
    _require(config, config.train.until_return is None, "train.until_return", "null with seeds, as they train in step")
    _require(config, config.resume in ("never", "auto"), "resume", "never or auto with seeds, as each has a folder of its own")


def _check_optim(config: RunConfig) -> None:
    warms_up = config.optim.schedule != "warmup" or config.optim.warmup_updates >= 1
    _require(config, warms_up, "optim.warmup_updates", "at least 1 for optim.schedule=warmup")


def _check_planner(config: RunConfig) -> None:
    planner = config.planner
    samples = f"at most planner.num_samples ({planner.num_samples})"
    _require(config, planner.num_elites <= planner.num_samples, "planner.num_elites", samples)
    _require(config, planner.num_pi_trajs <= planner.num_samples, "planner.num_pi_trajs", samples)
    _require(config, planner.max_std >= planner.min_std, "planner.max_std", f"at least planner.min_std ({planner.min_std})")
    if planner.guidance and planner.prior == "none":
        raise ConfigError("planner.guidance: guides the denoising of a learned prior; use planner.prior=learned, or guidance=0")
    if planner.prior == "learned" and config.loss.horizon not in (None, planner.horizon):
        raise ConfigError(f"loss.horizon: a learned prior needs windows of planner.horizon={planner.horizon} steps; leave loss.horizon out")
    if planner.prior == "learned" and planner.name != "diffusion":
        raise ConfigError(f"planner.prior: planner={planner.name} has no place for a learned prior; use planner=diffusion")
    if planner.name == "mcts" and config.compile:
        raise ConfigError("compile: the searches of mcts would be unrolled one by one, which takes minutes; use compile=false")
    if planner.gradient_steps and config.agent == "mpc" and config.dynamics.name == "simulator":
        raise ConfigError("planner.gradient_steps: a simulator has no gradient; use gradient_steps=0, or dynamics=analytic")
    if planner.gradient_steps and planner.name == "mcts":
        raise ConfigError("planner.gradient_steps: mcts has no continuous plan to refine; use gradient_steps=0, or another planner")


def _check_model(config: RunConfig) -> None:
    _require(config, config.model.size in MODEL_SIZES, "model.size", f"one of {', '.join(MODEL_SIZES)}")
    model = resolve_model(config.model)
    for name in ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "simnorm_dim"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}: expected at least 1, got {getattr(model, name)}")
    assert model.latent_dim is not None and model.num_q is not None
    if model.latent_dim % model.simnorm_dim:
        raise ConfigError(f"model.latent_dim: expected a multiple of model.simnorm_dim ({model.simnorm_dim}), got {model.latent_dim}")
    if model.num_q < 2:
        raise ConfigError(f"model.num_q: expected at least 2, got {model.num_q}")
    _require(config, model.num_bins >= 2, "model.num_bins", "at least 2")
    _require(config, model.vmax > model.vmin, "model.vmax", f"more than model.vmin ({model.vmin})")
    reason = "as bins are in symlog space and exp(80) is near the largest float32"
    _require(config, model.vmax <= 80, "model.vmax", f"at most 80, {reason}")
    _require(config, model.vmin >= -80, "model.vmin", f"at least -80, {reason}")
    _require(config, model.log_std_max > model.log_std_min, "model.log_std_max", f"more than model.log_std_min ({model.log_std_min})")


def _all_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


_LATENT = _all_of(LATENT)
_STACKED = _all_of([agent for agent in LATENT if agent != "director"])  # whose seeds are trained as one batched model
_WITHOUT_PRIOR = {"mpc": "learns nothing", "pets": "learns dynamics alone"}


def _check_agent(config: RunConfig) -> None:
    """Refuse combinations that mean nothing, and say what to use."""
    agent, planner = config.agent, config.planner
    if agent not in LATENT:
        if config.seeds is not None:
            raise ConfigError(f"seeds: only agent={_STACKED} train stacked seeds; agent={agent} trains one run per seed with -m seed=1,2,3")
        for name in ("compile", "cuda_graph", "train.overlap"):
            if lookup(config, name):
                raise ConfigError(f"{name}: only agent={_LATENT} have it; leave it out with agent={agent}")
        for name in ("planner.precision", "train.precision"):
            if lookup(config, name) != "fp32":
                raise ConfigError(f"{name}: only agent={_LATENT} have bf16; leave it out with agent={agent}")
    if agent in ("mbmpc", "pets") and config.dynamics.name in ("analytic", "simulator"):
        raise ConfigError(f"dynamics.name: agent={agent} learns dynamics, mlp or ensemble; with {config.dynamics.name} ones use agent=mpc")
    if agent == "mpc" and config.dynamics.name in ("mlp", "ensemble"):
        raise ConfigError(
            f"dynamics.name: agent=mpc learns nothing; use analytic or simulator, or agent=mbmpc to learn {config.dynamics.name}"
        )
    if config.dynamics.name == "ensemble" and config.dynamics.particles % config.dynamics.members:
        members = config.dynamics.members
        raise ConfigError(f"dynamics.particles: expected a multiple of dynamics.members ({members}), got {config.dynamics.particles}")
    if agent in _WITHOUT_PRIOR or (agent == "mbmpc" and not config.mbmpc.learn_policy):
        reason = f"agent={agent} has none, as it {_WITHOUT_PRIOR.get(agent, 'does not learn it (mbmpc.learn_policy=false)')}"
        if not planner.mpc:
            raise ConfigError(f"planner.mpc: false acts with the policy prior alone, and {reason}; leave it true")
        if planner.name == "policy_guided":
            raise ConfigError(f"planner.name: policy_guided needs a policy prior, and {reason}; use planner=cem, or agent=mbmpc or tdmpc2")
        if planner.num_pi_trajs and planner.name != "mcts":
            raise ConfigError(f"planner.num_pi_trajs: proposals come from a policy prior, and {reason}; use planner.num_pi_trajs=0")
    if agent == "mbmpc" and config.mbmpc.learn_policy and config.mbmpc.policy_loss == "bc" and not planner.mpc:
        raise ConfigError(
            "planner.mpc: mbmpc.policy_loss=bc imitates plans, and false makes none; use mbmpc.policy_loss=awr, or leave it true"
        )
    if planner.prior == "learned" and (config.seeds is not None or config.cuda_graph or config.compile):
        what = "seeds" if config.seeds is not None else "cuda_graph" if config.cuda_graph else "compile"
        raise ConfigError(f"{what}: a learned prior is trained outside of stacked, captured and compiled updates; use planner.prior=none")
    if agent == "mpc" and planner.prior == "learned":
        raise ConfigError("planner.prior: agent=mpc learns nothing, a prior neither; use planner.prior=none, or agent=mbmpc or tdmpc2")
