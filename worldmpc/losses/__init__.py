"""Pure maths of the objectives: of world models, critics and policies."""

from worldmpc.losses.auxiliary import auxiliary_snapshot, auxiliary_targets, auxiliary_value
from worldmpc.losses.behaviour import behaviour_loss, behaviour_targets
from worldmpc.losses.policy import (
    BOX,
    DISCRETE,
    Coefficients,
    PolicyObjective,
    coefficients,
    make_objective,
    policy_noise,
    update_scale,
)
from worldmpc.losses.targets import slow_value, target_noise, value_targets
from worldmpc.losses.world_model import (
    Rollout,
    consistency,
    for_each_dynamics,
    reward,
    roll,
    termination,
    termination_statistics,
    time_weights,
    value,
    weighted_sum,
)

__all__ = [
    "BOX",
    "DISCRETE",
    "Coefficients",
    "PolicyObjective",
    "Rollout",
    "auxiliary_snapshot",
    "auxiliary_targets",
    "auxiliary_value",
    "behaviour_loss",
    "behaviour_targets",
    "coefficients",
    "consistency",
    "for_each_dynamics",
    "make_objective",
    "policy_noise",
    "reward",
    "roll",
    "slow_value",
    "target_noise",
    "termination",
    "termination_statistics",
    "time_weights",
    "update_scale",
    "value",
    "value_targets",
    "weighted_sum",
]
