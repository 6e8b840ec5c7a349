"""The training components under one roof, to be composed by hand or by :mod:`worldmpc.training.functional`.

======================  ==============================================================================
collect                 :class:`RolloutCollector` fills an :class:`Experience`
update                  :class:`PPOOptimizer`, with custom losses
evaluate                :class:`PolicyEvaluator` on a suite of environments
save and load           :class:`TrainingCheckpointer`, with policies in a :class:`PolicyStore`
report                  :class:`StatsLogger`
choose tasks            :class:`Curriculum`
======================  ==============================================================================
"""

from __future__ import annotations

from worldmpc.data.rollout import Experience
from worldmpc.data.stream import StreamSource
from worldmpc.learners.ppo import PPOOptimizer
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.on_policy import CustomLoss, LossError
from worldmpc.training.collector import RolloutCollector
from worldmpc.training.configs import (
    AgentConfig,
    CurriculumConfig,
    EnvironmentConfig,
    PPOConfig,
    TrainerConfig,
    TrainingConfig,
    WandbConfig,
    large_distributed_config,
    medium_config,
    small_fast_config,
)
from worldmpc.training.curriculum import Curriculum, CurriculumTask
from worldmpc.training.evaluation import PolicyEvaluator
from worldmpc.training.functional import (
    TrainingState,
    create_training_components,
    default_training_step,
    functional_training_loop,
    make_experience,
    run_training,
)
from worldmpc.training.policy_store import PolicyRecord, PolicyStore, TrainingCheckpointer
from worldmpc.training.stats import StatsLogger

__all__ = [
    "ActorCritic",
    "AgentConfig",
    "Curriculum",
    "CurriculumConfig",
    "CurriculumTask",
    "CustomLoss",
    "EnvironmentConfig",
    "Experience",
    "LossError",
    "PPOConfig",
    "PPOOptimizer",
    "PolicyEvaluator",
    "PolicyRecord",
    "PolicyStore",
    "RolloutCollector",
    "StatsLogger",
    "StreamSource",
    "TrainerConfig",
    "TrainingCheckpointer",
    "TrainingConfig",
    "TrainingState",
    "WandbConfig",
    "create_training_components",
    "default_training_step",
    "functional_training_loop",
    "large_distributed_config",
    "make_experience",
    "medium_config",
    "run_training",
    "small_fast_config",
]
