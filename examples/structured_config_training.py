"""Structured configurations: presets, changes, plain dicts and YAML, and an older configuration."""

import dataclasses
import tempfile
from pathlib import Path

from worldmpc.training.components import PolicyEvaluator, TrainingConfig, run_training, small_fast_config

YAML = """
experiment_name: from_yaml
agent: {hidden_size: 32}
environment: {task: toy/balance, num_envs: 8}
trainer: {total_timesteps: 6000, learning_rate: 5e-3, batch_size: 512, minibatch_size: 64, progress: none, device: cpu}
ppo: {update_epochs: 8}
"""
"""Two older keys among them: `trainer.batch_size` and `trainer.minibatch_size` become ppo.rollout_steps and ppo.minibatch_size."""


def train(config, task):
    evaluator = PolicyEvaluator({"task": [task]}, episodes=8)
    state, policy = run_training(config)
    score = evaluator.evaluate(policy)["task/score"]
    print(f"{config.experiment_name}: {state.agent_steps} decisions on {task}, {state.updates} updates, mean return {score:.1f}")
    return score


def main(steps=12_000):
    preset = small_fast_config()
    trainer = dataclasses.replace(preset.trainer, total_timesteps=steps, progress="none", device="cpu")
    preset = dataclasses.replace(preset, experiment_name="small_fast", trainer=trainer)
    assert TrainingConfig.from_dict(preset.to_dict()) == preset

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.yaml"
        path.write_text(YAML)
        from_yaml = TrainingConfig.from_yaml(path)
    from_yaml = dataclasses.replace(from_yaml, trainer=dataclasses.replace(from_yaml.trainer, total_timesteps=min(steps, 6000)))

    scores = train(preset, "gym/CartPole-v1"), train(from_yaml, "toy/balance")
    print("at random: about 22 on CartPole (500 is perfect) and 18 on toy/balance (100 is perfect)")
    return scores


if __name__ == "__main__":
    main()
