"""Configuration: one frozen dataclass per part, agents' defaults, presets, dotted overrides, validation.

Plain data in, plain data out: ``RunConfig.from_dict(config.to_dict()) == config``. Nothing here
imports torch, so that the command line starts fast. A field's ``help`` is the text that
``worldmpc train --help`` prints.
"""

from worldmpc.config.base import ConfigError, lookup, merge, nest
from worldmpc.config.checks import validate
from worldmpc.config.hierarchy import GoalVAEConfig, ManagerConfig, WorkerConfig, goal_weight, too_long_interval
from worldmpc.config.opponents import OpponentsConfig, OpponentSimulationConfig
from worldmpc.config.presets import AGENTS, NAMED_TASKS, PRESETS, TUNED, expand_task, preset_values
from worldmpc.config.readers import LATENT, planner_reads
from worldmpc.config.run import (
    RunConfig,
    check_env_config,
    discount_from_episode_length,
    exact_ratio,
    flat_fields,
    make_config,
    network_width,
    plans,
    seed_decisions,
    unknown_key,
    updates_worth,
)
from worldmpc.config.sections import (
    MODEL_SIZES,
    CheckpointConfig,
    DQNConfig,
    DynamicsConfig,
    EnvConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    MBMPCConfig,
    ModelConfig,
    MultiGammaConfig,
    OptimConfig,
    PlannerConfig,
    PolicyConfig,
    PPOConfig,
    ReanalyzeConfig,
    ReplayConfig,
    SACConfig,
    TD3Config,
    TrainConfig,
    ValueConfig,
    resolve_model,
)
from worldmpc.config.sweeps import SWEEPS, sweep_overrides
from worldmpc.config.variants import auxiliary_gammas, auxiliary_warning, uses_plans

__all__ = [
    "too_long_interval",
    "goal_weight",
    "WorkerConfig",
    "ManagerConfig",
    "GoalVAEConfig",
    "AGENTS",
    "NAMED_TASKS",
    "expand_task",
    "LATENT",
    "MODEL_SIZES",
    "PRESETS",
    "SWEEPS",
    "TUNED",
    "CheckpointConfig",
    "ConfigError",
    "DQNConfig",
    "DynamicsConfig",
    "EnvConfig",
    "EvalConfig",
    "LogConfig",
    "LossConfig",
    "MBMPCConfig",
    "ModelConfig",
    "MultiGammaConfig",
    "OpponentSimulationConfig",
    "OpponentsConfig",
    "OptimConfig",
    "PPOConfig",
    "PlannerConfig",
    "PolicyConfig",
    "ReanalyzeConfig",
    "ReplayConfig",
    "RunConfig",
    "SACConfig",
    "TD3Config",
    "TrainConfig",
    "ValueConfig",
    "auxiliary_gammas",
    "auxiliary_warning",
    "check_env_config",
    "discount_from_episode_length",
    "exact_ratio",
    "flat_fields",
    "lookup",
    "make_config",
    "merge",
    "nest",
    "network_width",
    "planner_reads",
    "plans",
    "preset_values",
    "resolve_model",
    "seed_decisions",
    "sweep_overrides",
    "unknown_key",
    "updates_worth",
    "uses_plans",
    "validate",
]
