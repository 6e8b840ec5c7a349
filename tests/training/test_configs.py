"""Structured configurations: round trips, presets, older keys, errors."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from worldmpc.config import ConfigError, EnvConfig, PPOConfig
from worldmpc.training.configs import (
    AgentConfig,
    CurriculumConfig,
    EnvironmentConfig,
    TrainerConfig,
    TrainingConfig,
    WandbConfig,
    large_distributed_config,
    medium_config,
    small_fast_config,
)

PRESETS = (TrainingConfig, small_fast_config, medium_config, large_distributed_config)
CHANGED = TrainingConfig(
    experiment_name="mine",
    agent=AgentConfig(name="mlp", hidden_size=7, num_layers=3, log_std_init=-1.0),
    environment=EnvironmentConfig(task="toy/balance", num_envs=4, workers="async", num_workers=2, discount=0.5),
    trainer=TrainerConfig(total_timesteps=5, run_dir="somewhere", schedule="linear"),
    ppo=PPOConfig(target_kl=0.02, rollout_steps=64, minibatch_size=64),
    curriculum=CurriculumConfig(strategy="weighted", tasks=("toy/balance", "toy/pointmass"), weights=(1.0, 2.0)),
    wandb=WandbConfig(enabled=True, tags=("a", "b")),
)


@pytest.mark.parametrize("config", [*(preset() for preset in PRESETS), CHANGED])
def test_round_trip(config, tmp_path):
    """Also through JSON and YAML."""
    data = config.to_dict()
    assert TrainingConfig.from_dict(data) == config
    assert TrainingConfig.from_dict(json.loads(json.dumps(data))) == config
    (tmp_path / "config.yaml").write_text(json.dumps(data))  # JSON is YAML
    assert TrainingConfig.from_yaml(tmp_path / "config.yaml") == config


def test_presets():
    small, large = small_fast_config(), large_distributed_config()
    assert small.trainer.total_timesteps == 10_000 and small.agent.hidden_size == 128 and small.trainer.evaluate_interval == 0
    assert small.ppo.rollout_steps * small.environment.num_envs == 512 and small.ppo.minibatch_size == 64 and small.ppo.update_epochs == 2
    assert large.trainer.total_timesteps > medium_config().trainer.total_timesteps > small.trainer.total_timesteps
    assert large.environment.env_cfg() == EnvConfig(num_envs=64, workers="async")


def test_input_is_not_changed():
    data = {"agent": {"hidden_size": 3}, "trainer": {"batch_size": 512, "seed": 4}, "curriculum": None}
    before = copy.deepcopy(data)
    TrainingConfig.from_dict(data)
    assert data == before


def test_the_older_example():
    config = TrainingConfig.from_dict({"agent": {"name": "simple_cnn"}, "trainer": {"total_timesteps": 10_000_000}})
    assert config == TrainingConfig(agent=AgentConfig(name="simple_cnn"))


OLDER = """
experiment_name: older
seed: 7
notes: as it was
checkpoint_dir: ./checkpoints
replay_dir: ./replays
agent: {name: simple_cnn, hidden_size: 256, num_layers: 2, clip_range: 0.0, params: {}, analyze_weights_interval: 0}
environment: {name: gym/Acrobot-v1, max_steps: 500, num_agents: 1, overrides: {}, num_envs: 16}
trainer: {total_timesteps: 1e5, batch_size: 2048, minibatch_size: 256, num_workers: 1, async_factor: 1, bptt_horizon: 16, compile: false}
ppo: {clip_coef: 0.1, ent_coef: 0.01, prio_alpha: 0.0, prio_beta0: 0.6, vtrace_rho_clip: 1.0, l2_reg_loss_coef: 0}
optimizer: {type: adam, learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, lr_schedule_enabled: true, lr_schedule_type: cosine}
curriculum: null
wandb: null
hardware: {device: cpu, num_gpus: 1, num_workers: 1, distributed: false, backend: nccl, cpu_offload: false}
evaluation: {enabled: false, interval: 100, suites: [navigation], generate_replays: true}
"""


def test_a_whole_older_configuration(tmp_path):
    (tmp_path / "older.yaml").write_text(OLDER)
    config = TrainingConfig.from_yaml(tmp_path / "older.yaml")
    assert config.environment == EnvironmentConfig(task="gym/Acrobot-v1", num_envs=16, episode_length=500)
    assert config.trainer == TrainerConfig(
        total_timesteps=100_000, learning_rate=1e-3, adam_eps=1e-8, schedule="cosine", run_dir="./checkpoints", device="cpu", seed=7
    )
    assert config.ppo == PPOConfig(clip_coef=0.1, ent_coef=0.01, rollout_steps=128, minibatch_size=256)
    assert (config.experiment_name, config.notes) == ("older", "as it was")
    assert config.agent == AgentConfig("simple_cnn", 256) and config.curriculum == CurriculumConfig() and config.wandb == WandbConfig()


def test_older_workers_become_processes():
    environment = TrainingConfig.from_dict({"trainer": {"num_workers": 4}}).environment
    assert environment.workers == "async" and environment.num_workers == 4


def test_older_evaluation():
    trainer = TrainingConfig.from_dict({"evaluation": {"enabled": True, "interval": 20, "episodes_per_suite": 5}}).trainer
    assert (trainer.evaluate_interval, trainer.evaluate_episodes) == (20, 5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"optimizer": {"type": "muon"}}, "optimizer.type: 'muon' is not available here"),
        ({"trainer": {"optimizer": "muon"}}, "trainer.optimizer: 'muon'"),
        ({"hardware": {"distributed": True}}, "hardware.distributed: True is not available"),
        ({"ppo": {"prio_alpha": 0.5}}, "ppo.prio_alpha: 0.5"),
        ({"optimizer": {"lr_schedule_enabled": True, "lr_schedule_type": "exponential"}}, "trainer.schedule: expected one of constant"),
        ({"curriculum": {"enabled": True, "stages": [{"width": 10}]}}, "curriculum"),
        ({"environment": {"width": 10}}, "choose another with environment.task"),
        ({"log_dir": "./logs"}, "trainer.run_dir"),
        ({"seed": 3, "trainer": {"seed": 4}}, "leave one out"),
        ({"trainer": {"batch_size": 100}}, "trainer.batch_size: expected a multiple of environment.num_envs"),
        ({"trainer": {"batch_size": None}}, "trainer.batch_size: expected at least 1, a whole number, got None"),
        ({"trainer": {"batch_size": "abc"}}, "trainer.batch_size: expected at least 1"),
        ({"trainer": {"batch_size": 8}, "environment": {"num_envs": 0}}, "environment.num_envs: expected at least 1"),
        ({"trainer": {"batch_size": 8}, "environment": {"num_envs": "x"}}, "environment.num_envs: expected at least 1"),
        ({"trainer": {"num_workers": "two"}}, "trainer.num_workers: expected at least 0, a whole number, got 'two'"),
        ({"hardware": {"num_workers": None}}, "hardware.num_workers: expected at least 0"),
        ([1], "configuration: expected keys and values, got a list"),
        ({"trainer": {"device": "gpu"}}, "trainer.device: expected auto, cpu"),
        ({"agent": {"log_std_init": float("nan")}}, "agent.log_std_init: expected a finite number"),
        ({"curriculum": {"tasks": ["a", "b"], "weights": [1.0]}}, "curriculum.weights: expected 2 finite numbers"),
        ({"curriculum": {"weights": [float("nan")]}}, "curriculum.weights: expected 1 finite numbers"),
        ({"curriculum": {"tasks": ["a", "a"]}}, "curriculum.tasks: expected tasks with different names"),
        ({"agnet": {"name": "mlp"}}, "agnet: unknown key; did you mean agent"),
        ({"trainer": {"totaltimesteps": 3}}, "did you mean trainer.total_timesteps"),
        ({"ppo": {"clip": 0.1}}, "ppo.clip: unknown key"),
        ({"zzz": 1}, "top level: experiment_name"),
        ({"trainer": 3}, "trainer: expected keys below it"),
        ({"trainer": {"total_timesteps": "many"}}, "trainer.total_timesteps: expected int"),
        ({"trainer": {"total_timesteps": 0}}, "trainer.total_timesteps: expected at least 1"),
        ({"trainer": {"learning_rate": 0.0}}, "trainer.learning_rate: expected a finite number above 0"),
        ({"trainer": {"final_lr_scale": 2.0}}, "trainer.final_lr_scale"),
        ({"agent": {"hidden_size": 0}}, "agent.hidden_size"),
        ({"ppo": {"minibatch_size": 0}}, "ppo.minibatch_size: expected at least 1"),
        ({"ppo": {"gamma": 2.0}}, r"ppo.gamma: expected in \[0, 1\)"),
        ({"ppo": {"hidden": [4]}}, "agent.hidden_size"),
        ({"environment": {"num_envs": 0}}, "environment.num_envs: expected at least 1"),
        ({"environment": {"num_workers": 2}}, "environment.num_workers: expected null"),
    ],
)
def test_errors_say_what_to_do(data, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_dict(data)


def test_values_are_checked_however_they_come():
    with pytest.raises(ConfigError, match="trainer.evaluate_interval"):
        TrainingConfig(trainer=TrainerConfig(evaluate_interval=-1))
    with pytest.raises(ConfigError, match="ppo.clip_coef"):
        dataclasses.replace(small_fast_config(), ppo=PPOConfig(clip_coef=-1.0))


def test_unusable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainingConfig.from_yaml(tmp_path / "none.yaml")
    for text, message in (("a: [1", "not a usable YAML file"), ("- 1\n- 2\n", "got a list"), ("trainer: ${nothing}", "not a usable")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            TrainingConfig.from_yaml(tmp_path / "bad.yaml")
