"""Older configurations: Metta's TrainingConfig of June 2025, section by section, into ours. No key is dropped that would have done
something: what has no counterpart is accepted only at the value that leaves it off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldmpc.config import ConfigError, nest

MOVED = {
    "seed": "trainer.seed",
    "checkpoint_dir": "trainer.run_dir",
    "environment.name": "environment.task",
    "environment.max_steps": "environment.episode_length",
    "trainer.checkpoint_dir": "trainer.run_dir",
    "trainer.minibatch_size": "ppo.minibatch_size",
    "hardware.device": "trainer.device",
    "optimizer.learning_rate": "trainer.learning_rate",
    "optimizer.eps": "trainer.adam_eps",
    "evaluation.interval": "trainer.evaluate_interval",
    "evaluation.episodes_per_suite": "trainer.evaluate_episodes",
    "wandb.notes": "notes",
}
"""Older key -> ours."""

OFF: dict[str, tuple[Any, ...]] = {
    "agent.l2_init_weight_update_interval": (0,),
    "agent.analyze_weights_interval": (0,),
    "agent.clip_range": (0, 0.0),
    "agent.params": ({}, None),
    "environment.num_agents": (1,),
    "environment.overrides": ({}, None),
    "trainer.async_factor": (1,),
    "trainer.optimizer": ("adam",),
    "trainer.compile": (False,),
    "trainer.cpu_offload": (False,),
    "trainer.zero_copy": (False,),
    "trainer.replay_interval": (0,),
    "trainer.wandb_checkpoint_interval": (0,),
    "ppo.l2_reg_loss_coef": (0, 0.0),
    "ppo.l2_init_loss_coef": (0, 0.0),
    "ppo.prio_alpha": (0, 0.0),
    "ppo.vtrace_rho_clip": (1, 1.0),
    "ppo.vtrace_c_clip": (1, 1.0),
    "optimizer.type": ("adam",),
    "optimizer.beta1": (0.9,),
    "optimizer.beta2": (0.999,),
    "optimizer.weight_decay": (0, 0.0),
    "hardware.num_gpus": (1,),
    "hardware.distributed": (False,),
    "hardware.cpu_offload": (False,),
    "hardware.gradient_checkpointing": (False,),
    "evaluation.generate_replays": (False,),
    "evaluation.replay_interval": (0,),
    "evaluation.suites": ([], None),
    "curriculum.enabled": (False,),
    "curriculum.stages": ([], None),
}
"""Older key for something that is not here -> values at which it does nothing."""

WITHOUT_EFFECT = (
    "trainer.bptt_horizon",  # policies here have no memory
    "trainer.compile_mode",  # trainer.compile is off
    "ppo.prio_beta0",  # ppo.prio_alpha is 0
    "hardware.backend",  # hardware.distributed is off
    "replay_dir",  # evaluation.generate_replays is off
)
"""Older keys that mean nothing while another one is off."""

SWITCHES = ("evaluation", "curriculum")
"""Older sections of which nothing counts where their ``enabled`` is false."""

WORKERS = ("trainer.num_workers", "hardware.num_workers")
LR_SCHEDULE = ("optimizer.lr_schedule_enabled", "optimizer.lr_schedule_type")

ELSEWHERE = {
    "log_dir": "logs are written to trainer.run_dir",
    "environment.width": "this environment is not here, choose another with environment.task",
    "environment.height": "this environment is not here, choose another with environment.task",
}
"""Older key -> what is to be used instead."""


def translate(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested plain data in our keys; ``data`` is not changed.

    Raises:
        ConfigError: an older key for something that is not here, or of another type, or two keys for one thing with different values.
    """
    flat = _flat({name: value for name, value in data.items() if not (value is None and name in ("curriculum", "wandb"))})
    for section in SWITCHES:
        if flat.get(f"{section}.enabled") is False:
            flat = {name: value for name, value in flat.items() if not name.startswith(f"{section}.")}
            flat |= {"trainer.evaluate_interval": 0} if section == "evaluation" else {}
        elif section == "evaluation":
            flat.pop("evaluation.enabled", None)
    result: dict[str, Any] = {}
    for name, value in flat.items():
        if name in ELSEWHERE:
            raise ConfigError(f"{name}: {ELSEWHERE[name]}; leave it out")
        if name in OFF:
            if value not in OFF[name]:
                raise ConfigError(f"{name}: {value!r} is not available here; leave it out, or use {OFF[name][0]!r}")
        elif name in WORKERS:
            if _count(name, value, least=0) > 1:  # one worker meant: no process of its own
                _put(result, "environment.workers", "async", name)
                _put(result, "environment.num_workers", value, name)
        elif name not in (*WITHOUT_EFFECT, *LR_SCHEDULE):
            _put(result, MOVED.get(name, name), value, name)
    if flat.get("optimizer.lr_schedule_enabled"):
        _put(result, "trainer.schedule", flat.get("optimizer.lr_schedule_type", "cosine"), "optimizer.lr_schedule_type")
    if "trainer.batch_size" in result:
        _rollout_steps(result)
    return nest(result)


def _put(result: dict[str, Any], name: str, value: Any, older: str) -> None:
    if name in result and result[name] != value:
        raise ConfigError(f"{older}: {value!r} is also given as {name}={result[name]!r}; leave one out")
    result[name] = value


def _rollout_steps(result: dict[str, Any]) -> None:
    """A batch was counted over all environments."""
    batch = _count("trainer.batch_size", result.pop("trainer.batch_size"))
    num_envs = _count("environment.num_envs", result.get("environment.num_envs", 8))
    if batch % num_envs:
        raise ConfigError(f"trainer.batch_size: expected a multiple of environment.num_envs ({num_envs}), got {batch}")
    _put(result, "ppo.rollout_steps", batch // num_envs, "trainer.batch_size")


def _count(name: str, value: Any, least: int = 1) -> int:
    """Return a value that is to be computed with before its own section checks it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least or value % 1 != 0:
        raise ConfigError(f"{name}: expected at least {least}, a whole number, got {value!r}")
    return int(value)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys; a mapping that is the value of an older key stays whole."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and dotted not in OFF:
            flat |= _flat(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat
